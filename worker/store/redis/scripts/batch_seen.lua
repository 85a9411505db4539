-- Records that the reaper has looked at a batch that was due.
-- Called by RedisBatchStore.batch_seen. Atomic: a job that ended since then makes the batch due again.
-- KEYS[1] hash of due batches
-- ARGV[1] id   ARGV[2] ended jobs, as the reaper read them
-- Returns 1, or 0 if the batch stays due.
if redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[2] then
  return 0
end
return redis.call('HDEL', KEYS[1], ARGV[1])
