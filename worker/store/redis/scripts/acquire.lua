-- Makes the group where it is missing and gives the consumer's name to the caller.
-- KEYS[1] stream  KEYS[2] fence hash
-- ARGV[1] group   ARGV[2] consumer
-- Returns the new epoch: the server's time in us, or one more than the last where the clock stood back. So
-- an epoch never comes twice, even when the name was forgotten in between.
local exists = redis.pcall('XGROUP', 'CREATE', KEYS[1], ARGV[1], '0', 'MKSTREAM')
if exists.err and not exists.err:find('BUSYGROUP', 1, true) then
  return exists
end
redis.call('XGROUP', 'CREATECONSUMER', KEYS[1], ARGV[1], ARGV[2])
local time = redis.call('TIME')
local now_us = tonumber(time[1]) * 1000000 + tonumber(time[2])
local last = tonumber(redis.call('HGET', KEYS[2], ARGV[2]) or '0')
local epoch = string.format('%.0f', math.max(now_us, last + 1))
redis.call('HSET', KEYS[2], ARGV[2], epoch)
return epoch
