-- Prepended to every script that looks at who holds a consumer's name; no script of its own.
-- KEYS[2] fence hash: consumer -> epoch, and /holder/<consumer> -> record of the service that was given that epoch
-- A record is JSON: epoch, token (of one service start), about (text for people), lease and renewed (ms, as text).
local clock = redis.call('TIME')
local now_ms = tonumber(clock[1]) * 1000 + math.floor(tonumber(clock[2]) / 1000)

local function write_record(consumer, epoch, token, lease_ms, about)
  local record = {
    epoch = epoch, token = token, about = about, lease = lease_ms, renewed = string.format('%.0f', now_ms)
  }
  redis.call('HSET', KEYS[2], '/holder/' .. consumer, cjson.encode(record))
end

-- Returns the record and how long its lease still runs in ms, or nothing where the name may be taken. A record of
-- another epoch counts for nothing: versions of the service that write no record took the name after it.
local function held(consumer, epoch)
  local known, record = pcall(cjson.decode, redis.call('HGET', KEYS[2], '/holder/' .. consumer) or '')
  if not known or type(record) ~= 'table' or record.epoch ~= epoch then
    return nil
  end
  -- A clock that was set back makes the age negative; then too the record must not count for ever.
  local left_ms = (tonumber(record.lease) or 0) - math.abs(now_ms - (tonumber(record.renewed) or 0))
  if left_ms > 0 then
    return record, left_ms
  end
end

