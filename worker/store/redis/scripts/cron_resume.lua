-- Ends the pause of a cron table.
-- Called by RedisCronStore.cron_resume. Atomic: no tick of the pause is enqueued after it.
-- KEYS[1] cron hash (see cron_publish.lua)
-- ARGV[1] name
-- Returns 1, or 0 if the table was not paused.
if redis.call('HDEL', KEYS[1], 'paused/' .. ARGV[1]) == 0 then
  return 0
end
local now = tonumber(redis.call('TIME')[1])
local last = tonumber(redis.call('HGET', KEYS[1], 'last/' .. ARGV[1]) or nil)
if last and last < now then
  redis.call('HSET', KEYS[1], 'last/' .. ARGV[1], now)
end
return 1
