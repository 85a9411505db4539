-- Deletes the buckets of idempotency keys whose window has passed.
-- Called by RedisReaperStore.forget_keys. Atomic: a reader may create a bucket again at any moment.
-- KEYS[1] ready hash
-- Returns the number of deleted buckets.
local index, time = KEYS[1] .. '/unique', redis.call('TIME')
local now = string.format('%.0f', tonumber(time[1]) * 1000)
local outdated = redis.call('ZRANGEBYSCORE', index, '-inf', now, 'LIMIT', 0, 100)
if #outdated > 0 then
  redis.call('UNLINK', unpack(outdated)) -- millions of keys: DEL would stop the server for seconds
  redis.call('ZREM', index, unpack(outdated))
end
return #outdated
