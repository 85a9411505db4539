-- Claims entries that were idle for long, whichever consumer owns them, and counts the delivery.
-- Called by RedisReaderStore.claim, after prelude_epoch.lua. Atomic: the deaths must be those at the time of the claim.
-- KEYS[1] stream  KEYS[2] fence hash  KEYS[3] deaths hash
-- ARGV[1] group   ARGV[2] consumer   ARGV[3] epoch   ARGV[4] least idle time in ms   ARGV[5] count
-- ARGV[6] cursor
-- Returns the next cursor, then for each entry: id, data or nil, deliveries, deaths or nil.
redis.call('HLEN', KEYS[3]) -- a key of another type ends the script here, before any write
local reply = redis.call('XAUTOCLAIM', KEYS[1], ARGV[1], ARGV[2], ARGV[4], ARGV[6], 'COUNT', ARGV[5])
if #reply[3] > 0 then
  -- Deleted from the stream while pending; XAUTOCLAIM has dropped them from the pending list.
  redis.call('HDEL', KEYS[3], unpack(reply[3]))
end

local function data_of(fields)
  for i = 1, #fields, 2 do
    if fields[i] == 'data' then
      return fields[i + 1]
    end
  end
  return false
end

local taken = { reply[1] }
for _, entry in ipairs(reply[2]) do
  local id = entry[1]
  local row = redis.call('XPENDING', KEYS[1], ARGV[1], id, id, 1, ARGV[2])[1]
  taken[#taken + 1] = id
  taken[#taken + 1] = data_of(entry[2])
  taken[#taken + 1] = row[4]
  taken[#taken + 1] = redis.call('HGET', KEYS[3], id)
end
return taken
