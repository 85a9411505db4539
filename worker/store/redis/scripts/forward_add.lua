-- Appends entries of a stream to one of its shards, except those that the shard has already.
-- Called by RedisForwardStore.forward_add, after prelude_ids.lua. Atomic: an entry is appended and noted in one step, so a
-- caller that is killed, or that is late, repeats it without effect.
-- KEYS[1] shard  KEYS[2] shards hash of the shard: from/<stream>: the last entry of that stream that the shard has
-- ARGV[1] stream   ARGV[2...] id, field and value of each entry, in the order of ids
-- Returns the number of appended entries.
local noted = 'from/' .. ARGV[1]
local last = redis.call('HGET', KEYS[2], noted) or '0-0'
local added = 0
for i = 2, #ARGV, 3 do
  if less(last, ARGV[i]) then
    redis.call('XADD', KEYS[1], '*', ARGV[i + 1], ARGV[i + 2])
    last, added = ARGV[i], added + 1
  end
end
if added > 0 then
  redis.call('HSET', KEYS[2], noted, last)
end
return added
