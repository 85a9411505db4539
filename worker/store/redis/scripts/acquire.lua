-- Takes a consumer's name for the calling service, unless another service owns it; creates a missing group.
-- Called by RedisReaderStore.acquire, after prelude_name.lua. Atomic: two services that start at once must not both
-- get the name, and no reader may act on an epoch that is not stored.
-- KEYS[1] stream  KEYS[2] fence hash
-- ARGV[1] group   ARGV[2] consumer   ARGV[3] token   ARGV[4] lease in ms   ARGV[5] description of the caller
-- ARGV[6] the caller's last epoch, or 0   ARGV[7...] tokens of service starts that are proven to be over
-- Returns {epoch}, or {'', description, token, renewed, ms left} of the service that owns the name.
-- The epoch is the server's time in us, or the last epoch plus one if the clock was set back. So an epoch never
-- repeats, even when the name was deleted in between. A stored value that is no epoch, or above the numbers
-- that Lua holds exactly, counts as deleted.
local last = redis.call('HGET', KEYS[2], ARGV[2])
if last and (not last:find('^%d+$') or tonumber(last) > 9e15) then
  last = false
end
local record, left_ms = live_record(ARGV[2], last)
for i = 7, #ARGV do
  if record and record.token == ARGV[i] then
    record = nil
  end
end
-- An epoch lower than the caller's: the data is an older snapshot, and the caller owned the name after it.
if record and record.token ~= ARGV[3] and tonumber(last) > tonumber(ARGV[6]) then
  return {'', record.about, record.token, record.renewed, left_ms}
end

local created = redis.pcall('XGROUP', 'CREATE', KEYS[1], ARGV[1], '0', 'MKSTREAM')
if created.err and not created.err:find('BUSYGROUP', 1, true) then
  return created
end
redis.call('XGROUP', 'CREATECONSUMER', KEYS[1], ARGV[1], ARGV[2])
local now_us = tonumber(clock[1]) * 1000000 + tonumber(clock[2])
local epoch = string.format('%.0f', math.max(now_us, tonumber(last or '0') + 1, tonumber(ARGV[6]) + 1))
redis.call('HSET', KEYS[2], ARGV[2], epoch)
write_record(ARGV[2], epoch, ARGV[3], ARGV[4], ARGV[5])
return {epoch}
