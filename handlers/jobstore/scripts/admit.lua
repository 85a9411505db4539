-- Admits one write to a collection, or says why not yet; renews the lease of an admitted write.
-- Called by RedisFence.admit. Atomic: two writers must not both get an id, and a rebuild or a deletion must see every
-- writer that was admitted before.
-- KEYS[1] writers hash  KEYS[2] held hash  KEYS[3] floors hash (minimum versions)  KEYS[4] rebuild hash
-- KEYS[5] journal set  KEYS[6] attempts hash  KEYS[7] erased ZSET (tombstones)  KEYS[8] erasing hash
-- ARGV[1] token of the attempt   ARGV[2] owner: the job   ARGV[3] lease in ms   ARGV[4] model, '' for any
-- ARGV[5] tenant, '' to ignore deletions   ARGV[6] project   ARGV[7] creation of the job in us
-- ARGV[8] name of the delivery or the token   ARGV[9] number of ids and chapters to hold   ARGV[10] number of chapters
-- ARGV[11...] the ids and chapters to hold, then the chapters, then the ids of the rows
-- Returns {'closed'}, {'model', the model in use}, {'held' | 'hold', {}, erased scopes},
-- {'held', {}, erased scopes, ms since the holder was admitted}, or {'in', minimum version of each chapter or nil, erased scopes}.
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local lease, held, chapters = tonumber(ARGV[3]), tonumber(ARGV[9]), tonumber(ARGV[10])
local first_chapter, first_id = 11 + held, 11 + held + chapters

-- Another attempt of a delivery means that the one before ended without a release: its worker died.
local before = redis.call('HGET', KEYS[6], ARGV[8])
if before then
  before = before:match('^%S+')
  if before ~= ARGV[1] then
    redis.call('HDEL', KEYS[1], before)
    redis.call('HDEL', KEYS[6], ARGV[8])
  end
end

-- An admitted writer may continue: the rebuild waits for it before it switches, and a deletion before it deletes.
local continues = redis.call('HEXISTS', KEYS[1], ARGV[1]) == 1
local closed = tonumber(redis.call('HGET', KEYS[4], 'closed_until') or 0)
if closed > now and not continues then
  return {'closed'}
end

local live = redis.call('HGET', KEYS[4], 'live_model')
if live and live ~= '' and ARGV[4] ~= '' and live ~= ARGV[4] then
  return {'model', live}
end

local function each_scope(visit)
  local owner = ARGV[5] .. '/' .. ARGV[6]
  visit('t/' .. ARGV[5])
  visit('p/' .. owner)
  for i = first_chapter, first_id - 1 do
    visit('c/' .. ARGV[i])
  end
  for i = first_id, #ARGV do
    visit('i/' .. owner .. '/' .. ARGV[i])
  end
end

local erased, verdict = {}, nil
if ARGV[5] ~= '' and redis.call('EXISTS', KEYS[7]) == 1 then
  local created = tonumber(ARGV[7])
  each_scope(function(name)
    local cutoff = redis.call('ZSCORE', KEYS[7], name)
    if cutoff and created <= tonumber(cutoff) then
      erased[#erased + 1] = name
    end
  end)
end
if ARGV[5] ~= '' and not continues and redis.call('EXISTS', KEYS[8]) == 1 then
  each_scope(function(name)
    local running = redis.call('HGET', KEYS[8], name)
    if running then
      local till, exclusive = running:match('^(%d+) (%d)')
      if tonumber(till) > now then
        if exclusive == '1' then
          verdict = 'held'
        elseif held == 0 and first_id <= #ARGV then -- a write without rows has nothing to hold
          verdict = verdict or 'hold'
        end
      end
    end
  end)
end
if verdict then
  return {verdict, {}, erased}
end

for i = 11, 10 + held do
  local holder = redis.call('HGET', KEYS[2], ARGV[i])
  if holder then
    local till, owner = holder:match('^(%d+) (.*)$')
    if owner ~= ARGV[2] and tonumber(till) > now then
      return {'held', {}, erased, now + lease - tonumber(till)}
    end
  end
end

local till = string.format('%d', now + lease)
redis.call('HSET', KEYS[1], ARGV[1], till)
redis.call('PEXPIRE', KEYS[1], lease)
redis.call('HSET', KEYS[6], ARGV[8], ARGV[1] .. ' ' .. ARGV[7])
redis.call('PEXPIRE', KEYS[6], lease)
for i = 11, 10 + held do
  redis.call('HSET', KEYS[2], ARGV[i], till .. ' ' .. ARGV[2])
end
if held > 0 then
  redis.call('PEXPIRE', KEYS[2], lease)
end

if redis.call('HEXISTS', KEYS[4], 'active') == 1 then
  for i = first_id, #ARGV do
    redis.call('SADD', KEYS[5], ARGV[i])
  end
end
local floors = {}
for i = first_chapter, first_id - 1 do
  floors[#floors + 1] = redis.call('HGET', KEYS[3], ARGV[i])
end
return {'in', floors, erased}
