-- Finishes a batch and enqueues its callback.
-- Called by RedisBatchStore.batch_finish, after prelude_batch.lua. Atomic: the callback is enqueued once, whichever hosts
-- try and whatever is killed.
-- KEYS[1] home stream  KEYS[2] batch hash  KEYS[3] dead-letter stream (names the other keys)
-- ARGV[1] id   ARGV[2] callback, a job; empty: there is none   ARGV[3] why there is none; empty: none was wanted
-- ARGV[4] seconds for which the record is kept
-- Returns 1, or 0 if the batch is not closed or has finished before.
check_batches()
local closed, finished = unpack(redis.call('HMGET', KEYS[2], 'closed', 'finished'))
if not closed or finished then
  return 0
end
local time = redis.call('TIME')
-- First: if the stream takes no entry, the batch stays due.
if ARGV[2] ~= '' then
  redis.call('HSET', KEYS[2], 'callback', redis.call('XADD', KEYS[1], '*', 'data', ARGV[2]))
elseif ARGV[3] ~= '' then
  redis.call('HSET', KEYS[2], 'error', ARGV[3])
end
redis.call('HSET', KEYS[2], 'finished', time[1])
redis.call('EXPIRE', KEYS[2], ARGV[4])
redis.call('ZREM', batches .. '/open', ARGV[1])
redis.call('ZADD', batches .. '/finished', time[1] .. string.format('%03d', math.floor(time[2] / 1000)), ARGV[1])
return 1
