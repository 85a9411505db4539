-- Appends entries of a stream to one of its shards, except those that the shard has already.
-- Called by RedisForwardStore.forward_add, after prelude_ids.lua. Atomic: an entry is appended and noted in one step, so a
-- caller that is killed, or that is late, repeats it without effect.
-- KEYS[1] shard  KEYS[2] shards hash of the shard: from/<stream>: the last entry of that stream that the shard has. With
-- /from/<stream> behind its name a LIST 'id, blank, checksum' of the entries that were appended lately
-- ARGV[1] stream   ARGV[2...] id, checksum, field and value of each entry, in the order of ids
-- Returns the number of appended entries.
local noted = 'from/' .. ARGV[1]
local list, longest = KEYS[2] .. '/' .. noted, 10000
local last = redis.call('HGET', KEYS[2], noted) or '0-0'
local appended = {}

local recent, oldest
local function read_recent()
  recent = {}
  for _, item in ipairs(redis.call('LRANGE', list, 0, -1)) do
    recent[item] = true
    oldest = oldest or item:match('^%S+')
  end
end

-- The ids of a stream go back if a replica becomes its master that lacks the last entries, and whose clock is behind. So an
-- entry with a lower id that was not appended is new. Of entries before the list nothing is known: they count as appended.
local function is_new(id, item)
  if less(last, id) then
    return true
  end
  if not recent then
    read_recent()
  end
  return oldest and less(oldest, id) and not recent[item]
end

for i = 2, #ARGV, 4 do
  local item = ARGV[i] .. ' ' .. ARGV[i + 1]
  if is_new(ARGV[i], item) then
    redis.call('XADD', KEYS[1], '*', ARGV[i + 2], ARGV[i + 3])
    last, appended[#appended + 1] = ARGV[i], item
  end
end
if #appended > 0 then
  redis.call('HSET', KEYS[2], noted, last)
  if redis.call('RPUSH', list, unpack(appended)) > 1.1 * longest then
    redis.call('LTRIM', list, -longest, -1)
  end
end
return #appended
