-- Admits one write to a collection, or says why not yet; renews the lease of an admitted write.
-- Called by RedisFence.admit. Atomic: two writers must not both get an id, and a rebuild that stops admission must see
-- every writer that was admitted before.
-- KEYS[1] writers hash  KEYS[2] held hash  KEYS[3] floors hash (minimum versions)  KEYS[4] rebuild hash
-- KEYS[5] journal set
-- ARGV[1] token of the attempt   ARGV[2] owner: the job   ARGV[3] lease in ms   ARGV[4] model, '' for any
-- ARGV[5] number of ids and chapters to hold   ARGV[6] number of chapters
-- ARGV[7...] the ids and chapters to hold, then the chapters, then the ids of the rows
-- Returns {'closed'}, {'model', the model in use}, {'held'}, or {'in', minimum version of each chapter or nil...}.
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local lease, held, chapters = tonumber(ARGV[3]), tonumber(ARGV[5]), tonumber(ARGV[6])

-- An admitted writer may continue: the rebuild waits for it before it switches.
local closed = tonumber(redis.call('HGET', KEYS[4], 'closed_until') or 0)
if closed > now and redis.call('HEXISTS', KEYS[1], ARGV[1]) == 0 then
  return {'closed'}
end

local live = redis.call('HGET', KEYS[4], 'live_model')
if live and live ~= '' and ARGV[4] ~= '' and live ~= ARGV[4] then
  return {'model', live}
end

for i = 7, 6 + held do
  local holder = redis.call('HGET', KEYS[2], ARGV[i])
  if holder then
    local till, owner = holder:match('^(%d+) (.*)$')
    if owner ~= ARGV[2] and tonumber(till) > now then
      return {'held'}
    end
  end
end

local till = string.format('%d', now + lease)
redis.call('HSET', KEYS[1], ARGV[1], till)
redis.call('PEXPIRE', KEYS[1], lease)
for i = 7, 6 + held do
  redis.call('HSET', KEYS[2], ARGV[i], till .. ' ' .. ARGV[2])
end
if held > 0 then
  redis.call('PEXPIRE', KEYS[2], lease)
end

if redis.call('HEXISTS', KEYS[4], 'active') == 1 then
  for i = 7 + held + chapters, #ARGV do
    redis.call('SADD', KEYS[5], ARGV[i])
  end
end
local reply = {'in'}
for i = 7 + held, 6 + held + chapters do
  reply[#reply + 1] = redis.call('HGET', KEYS[3], ARGV[i])
end
return reply
