-- Closes a batch: its total is final.
-- Called by RedisBatchStore.batch_close, after prelude_batch.lua. Atomic: the reaper looks at the batch after it.
-- KEYS[1] batch hash of the home stream   KEYS[2] dead-letter stream (names the other keys)
-- ARGV[1] id
-- Returns 1, or 0 if the batch has no record any more.
check_batches()
if redis.call('EXISTS', KEYS[1]) == 0 then
  return 0
end
redis.call('HSETNX', KEYS[1], 'closed', redis.call('TIME')[1])
redis.call('HSETNX', KEYS[1], 'total', 0)
if redis.call('HEXISTS', KEYS[1], 'finished') == 0 then
  touch_batch(ARGV[1])
  -- No number: the reaper may have looked at the batch just before, while it was open.
  redis.call('HSET', batches .. '/due', ARGV[1], 'closed')
end
return 1
