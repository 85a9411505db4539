-- Lets one write to a collection begin, or says why not yet.
-- KEYS[1] writers hash  KEYS[2] held hash  KEYS[3] floors hash  KEYS[4] rebuild hash  KEYS[5] journal set
-- ARGV[1] token   ARGV[2] owner   ARGV[3] lease in ms   ARGV[4] number held   ARGV[5] number of chapters
-- ARGV[6...] what must be held, then the chapters, then the ids of the rows
-- Returns {'closed'}, {'held'}, or {'in', 1 while changes are written down, the floor of each chapter or nil...}.
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local lease, held, chapters = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])

-- Who is inside already may go on: a closing door waits for it.
local closed = tonumber(redis.call('HGET', KEYS[4], 'closed_until') or 0)
if closed > now and redis.call('HEXISTS', KEYS[1], ARGV[1]) == 0 then
  return {'closed'}
end

for i = 6, 5 + held do
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
for i = 6, 5 + held do
  redis.call('HSET', KEYS[2], ARGV[i], till .. ' ' .. ARGV[2])
end
if held > 0 then
  redis.call('PEXPIRE', KEYS[2], lease)
end

local journal = redis.call('HEXISTS', KEYS[4], 'active')
if journal == 1 then
  for i = 6 + held + chapters, #ARGV do
    redis.call('SADD', KEYS[5], ARGV[i])
  end
end
local reply = {'in', journal}
for i = 6 + held, 5 + held + chapters do
  reply[#reply + 1] = redis.call('HGET', KEYS[3], ARGV[i])
end
return reply
