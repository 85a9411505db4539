-- Moves one dead letter back into its stream, or into another one, as a job.
-- Called by OperatorStore.requeue. Atomic: two operators must not both enqueue it, and it must not get lost.
-- KEYS[1] stream   KEYS[2] dead-letter stream   KEYS[3] hash of the job's batch, if it has one
-- ARGV[1] id of the dead letter   ARGV[2] job
-- Returns 1, or 0 if the dead letter is gone: another operator requeued or purged it.
if #redis.call('XRANGE', KEYS[2], ARGV[1], ARGV[1], 'COUNT', 1) == 0 then
  return 0
end
-- The command that may fail with OOM comes first, so that a failure changes nothing.
redis.call('XADD', KEYS[1], '*', 'data', ARGV[2])
redis.call('XDEL', KEYS[2], ARGV[1])
-- The batch waits for the job again. It may have no record any more, or one that another program has damaged.
if KEYS[3] and (tonumber(redis.pcall('HGET', KEYS[3], 'dead')) or 0) > 0 then
  redis.call('HINCRBY', KEYS[3], 'dead', -1)
end
return 1
