-- Creates the record of a batch on its home stream, or leaves one that exists as it is.
-- Called by RedisBatchStore.batch_open, after prelude_batch.lua. Atomic: two producers may open the same batch.
-- KEYS[1] batch hash of the home stream   KEYS[2] dead-letter stream (names the other keys)
-- ARGV[1] id   ARGV[2...] fields and values
-- Returns 1, or 0 if the batch has finished.
redis.call('HLEN', KEYS[1])
check_batches()
if redis.call('HEXISTS', KEYS[1], 'finished') == 1 then
  return 0
end
-- To the millisecond: batches that follow each other are told apart by it.
local time = redis.call('TIME')
redis.call('HSETNX', KEYS[1], 'created', string.format('%d.%03d', time[1], math.floor(time[2] / 1000)))
for i = 2, #ARGV, 2 do
  redis.call('HSETNX', KEYS[1], ARGV[i], ARGV[i + 1])
end
touch_batch(ARGV[1])
return 1
