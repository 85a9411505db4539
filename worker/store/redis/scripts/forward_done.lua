-- Notes that entries of a stream are in its shards, and deletes them from the stream.
-- Called by RedisForwardStore.forward_done, after prelude_ids.lua. Atomic: what is noted never goes back.
-- KEYS[1] stream  KEYS[2] shards hash of the stream (see forward_take.lua)
-- ARGV[1...] ids of the entries, in order
-- Returns the number of deleted entries; a stream with a second group keeps them until all groups have finished them.
local moved, taken = unpack(redis.call('HMGET', KEYS[2], 'moved', 'taken'))
local last = ARGV[#ARGV]
if not moved or not taken or less(taken, last) then
  return 0 -- the hash was deleted meanwhile
end
if less(moved, last) then
  redis.call('HSET', KEYS[2], 'moved', last)
end
if redis.call('EXISTS', KEYS[1]) == 0 or #redis.call('XINFO', 'GROUPS', KEYS[1]) ~= 1 then
  return 0
end
return redis.call('XDEL', KEYS[1], unpack(ARGV))
