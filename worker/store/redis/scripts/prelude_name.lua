-- Prelude of the scripts that use the record of the service that owns a consumer's name (see lua.py). It defines
-- write_record, last_record and live_record, and the server's time as clock and now_ms.
-- KEYS[2] fence hash: consumer -> epoch, and /holder/<consumer> -> record of the service that got that epoch
-- A record is JSON: epoch, token (of one service start), about (text for people), lease and renewed (ms, as text).
-- Other programs can write to the hash: a record with a field of another kind or an endless lease does not count.
local clock = redis.call('TIME')
local now_ms = tonumber(clock[1]) * 1000 + math.floor(tonumber(clock[2]) / 1000)

-- Longest lease that counts, in ms: a year.
local longest_lease = 366 * 86400 * 1000

local function write_record(consumer, epoch, token, lease_ms, about)
  local record = {
    epoch = epoch, token = token, about = about, lease = lease_ms, renewed = string.format('%.0f', now_ms)
  }
  redis.call('HSET', KEYS[2], '/holder/' .. consumer, cjson.encode(record))
end

-- Returns the record of the last service that held the name, and the ms since its last renewal; or nothing. A record of
-- another epoch does not count: versions of the service that write no record took the name after it.
local function last_record(consumer, epoch)
  local is_json, record = pcall(cjson.decode, redis.call('HGET', KEYS[2], '/holder/' .. consumer) or '')
  if not is_json or type(record) ~= 'table' or record.epoch ~= epoch then
    return nil
  end
  for _, field in ipairs({ 'token', 'about', 'renewed' }) do
    if type(record[field]) ~= 'string' then
      return nil
    end
  end
  -- A clock that was set back makes the age negative; the record must expire then too.
  return record, math.abs(now_ms - (tonumber(record.renewed) or 0))
end

-- Returns the record and the ms that its lease still has, or nothing if the name is free.
local function live_record(consumer, epoch)
  local record, age_ms = last_record(consumer, epoch)
  local lease_ms = record and tonumber(record.lease) or 0
  if record and age_ms < lease_ms and lease_ms <= longest_lease then
    return record, lease_ms - age_ms
  end
end
