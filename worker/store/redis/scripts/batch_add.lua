-- Enqueues jobs of a batch and adds them to its total.
-- Called by RedisBatchStore.batch_add. Atomic: the total is the number of jobs that were enqueued, whatever is killed.
-- KEYS[1] stream  KEYS[2] batch hash
-- ARGV[1] home stream, if it is another   ARGV[2] seconds for which the counters are kept
-- ARGV[3] the total that is expected, or empty   ARGV[4...] jobs
-- Returns 1, or 0 if the batch has finished, or -1 if its total is another one.
local total, finished = unpack(redis.call('HMGET', KEYS[2], 'total', 'finished'))
if finished then
  return 0
end
if total and not tonumber(total) then
  return redis.error_reply('ERR the total of the batch is damaged')
end
if ARGV[3] ~= '' and tonumber(total or 0) ~= tonumber(ARGV[3]) then
  return -1
end
for i = 4, #ARGV do
  redis.call('XADD', KEYS[1], '*', 'data', ARGV[i])
end
redis.call('HINCRBY', KEYS[2], 'total', #ARGV - 3)
if ARGV[1] ~= '' then
  redis.call('HSETNX', KEYS[2], 'home', ARGV[1])
end
redis.call('EXPIRE', KEYS[2], ARGV[2])
return 1
