-- Makes some open batches due, and removes batches whose time is over from the lists.
-- Called by RedisBatchStore.batch_sweep, after prelude_batch.lua. It need not be atomic: it is a script because it looks up
-- hundreds of keys.
-- KEYS[1] dead-letter stream (names the other keys)
-- ARGV[1] rank of the first open batch   ARGV[2] most open batches   ARGV[3] most finished batches that are kept
-- ARGV[4] seconds for which one is kept
-- Returns the number of open batches and the rank of the next call (0: from the first).
check_batches()
local open, finished = batches .. '/open', batches .. '/finished'
local time = redis.call('TIME')
redis.call('ZREMRANGEBYSCORE', finished, '-inf', '(' .. string.format('%.0f', (time[1] - ARGV[4]) * 1000))
local surplus = math.min(tonumber(ARGV[2]), redis.call('ZCARD', finished) - tonumber(ARGV[3]))
for _ = 1, surplus do
  redis.call('UNLINK', batch_key(redis.call('ZPOPMIN', finished)[1]))
end

local rank, size = tonumber(ARGV[1]), tonumber(ARGV[2])
local found = redis.call('ZRANGE', open, rank, rank + size - 1)
local next = #found == size and rank + size or 0
for _, batch in ipairs(found) do
  local key = batch_key(batch)
  if redis.call('TYPE', key).ok ~= 'hash' then
    redis.call('ZREM', open, batch)
  else
    if redis.call('TTL', key) == -1 then
      redis.call('EXPIRE', key, batch_open_s)
    end
    redis.call('HSETNX', batches .. '/due', batch, -1)
  end
end
return { redis.call('ZCARD', open), next }
