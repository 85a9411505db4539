-- Makes the group where it is missing and gives the consumer's name to the caller, unless another service holds it.
-- KEYS[1] stream  KEYS[2] fence hash
-- ARGV[1] group   ARGV[2] consumer   ARGV[3] token   ARGV[4] lease in ms   ARGV[5] about the caller
-- ARGV[6] epoch that the caller had last, or 0   ARGV[7...] tokens of service starts that are known to be over
-- Returns {epoch}, or {'', about, token, renewed, ms left} of the service that holds the name.
-- The epoch is the server's time in us, or one more than the last where the clock stood back. So an epoch never
-- comes twice, even when the name was forgotten in between.
local last = redis.call('HGET', KEYS[2], ARGV[2])
local record, left_ms = held(ARGV[2], last)
for i = 7, #ARGV do
  if record and record.token == ARGV[i] then
    record = nil
  end
end
-- A lower epoch than the caller's own: the data is an older snapshot, and the caller held the name after it.
if record and record.token ~= ARGV[3] and tonumber(last) > tonumber(ARGV[6]) then
  return {'', record.about, record.token, record.renewed, left_ms}
end

local exists = redis.pcall('XGROUP', 'CREATE', KEYS[1], ARGV[1], '0', 'MKSTREAM')
if exists.err and not exists.err:find('BUSYGROUP', 1, true) then
  return exists
end
redis.call('XGROUP', 'CREATECONSUMER', KEYS[1], ARGV[1], ARGV[2])
local now_us = tonumber(clock[1]) * 1000000 + tonumber(clock[2])
local epoch = string.format('%.0f', math.max(now_us, tonumber(last or '0') + 1, tonumber(ARGV[6]) + 1))
redis.call('HSET', KEYS[2], ARGV[2], epoch)
write_record(ARGV[2], epoch, ARGV[3], ARGV[4], ARGV[5])
return {epoch}
