-- Enqueues jobs of a batch and adds them to its total.
-- Called by RedisBatchStore.batch_add. Atomic: the total is the number of jobs that were enqueued, whatever is killed.
-- KEYS[1] stream  KEYS[2] retry ZSET  KEYS[3] batch hash
-- ARGV[1] home stream, if it is another   ARGV[2] seconds for which the counters are kept   ARGV[3...] delay in s and job
-- Returns 1, or 0 if the batch has finished.
local total, finished = unpack(redis.call('HMGET', KEYS[3], 'total', 'finished'))
if finished then
  return 0
end
if total and not tonumber(total) then
  return redis.error_reply('ERR the total of the batch is damaged')
end
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1e6
for i = 3, #ARGV, 2 do
  local delay, job = tonumber(ARGV[i]), ARGV[i + 1]
  if delay > 0 then
    -- As schedule.lua does: an equal job must not be replaced.
    while redis.call('ZADD', KEYS[2], 'NX', string.format('%.6f', now + delay), job) == 0 do
      job = job .. ' '
    end
  else
    redis.call('XADD', KEYS[1], '*', 'data', job)
  end
end
redis.call('HINCRBY', KEYS[3], 'total', (#ARGV - 2) / 2)
if ARGV[1] ~= '' then
  redis.call('HSETNX', KEYS[3], 'home', ARGV[1])
end
redis.call('EXPIRE', KEYS[3], ARGV[2])
return 1
