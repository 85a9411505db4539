-- Claims entries that were idle for long, whichever consumer owns them, and counts the delivery.
-- Called by RedisReaderStore.claim, after prelude_epoch.lua. Atomic: the deaths must be those at the time of the claim.
-- KEYS[1] stream  KEYS[2] fence hash  KEYS[3] deaths hash
-- ARGV[1] group   ARGV[2] consumer   ARGV[3] epoch   ARGV[4] least idle time in ms   ARGV[5] count
-- ARGV[6] cursor   ARGV[7] bytes of jobs after which it stops
-- Returns the next cursor, then for each entry: id, data or nil, deliveries, deaths or nil.
local has_deaths = redis.call('HLEN', KEYS[3]) > 0 -- a key of another type ends the script here, before any write

-- The sizes of entries are unknown before they are claimed: few come first, then as many as fit the bytes. XAUTOCLAIM
-- looks at 10 times its count, so a larger count passes faster over entries that are not idle.
local chunk, largest_chunk, looks, look_ahead = 8, 256, 16, 64
local count, bytes_left = tonumber(ARGV[5]), tonumber(ARGV[7])
local taken, largest = { ARGV[6] }, 1

local function data_of(fields)
  for i = 1, #fields, 2 do
    if fields[i] == 'data' then
      return fields[i + 1]
    end
  end
  return false
end

-- Entries of a chunk follow each other in this consumer's list unless it owned some in between.
local function deliveries_of(entries)
  local first, last = entries[1][1], entries[#entries][1]
  local found = {}
  for _, row in ipairs(redis.call('XPENDING', KEYS[1], ARGV[1], first, last, 2 * #entries, ARGV[2])) do
    found[row[1]] = row[4]
  end
  for _, entry in ipairs(entries) do
    local id = entry[1]
    if not found[id] then
      found[id] = redis.call('XPENDING', KEYS[1], ARGV[1], id, id, 1, ARGV[2])[1][4]
    end
  end
  return found
end

local function take(entries)
  local deliveries = deliveries_of(entries)
  for _, entry in ipairs(entries) do
    local id, data = entry[1], data_of(entry[2])
    taken[#taken + 1] = id
    taken[#taken + 1] = data
    taken[#taken + 1] = deliveries[id]
    taken[#taken + 1] = has_deaths and redis.call('HGET', KEYS[3], id)
    largest = math.max(largest, data and #data or 0)
    bytes_left = bytes_left - (data and #data or 0)
  end
  count = count - #entries
end

for _ = 1, looks do
  local some = math.min(chunk, count)
  local reply = redis.call('XAUTOCLAIM', KEYS[1], ARGV[1], ARGV[2], ARGV[4], taken[1], 'COUNT', some)
  taken[1] = reply[1]
  if #reply[3] > 0 then
    -- Deleted from the stream while pending; XAUTOCLAIM has dropped them from the pending list.
    redis.call('HDEL', KEYS[3], unpack(reply[3]))
  end
  if #reply[2] > 0 then
    take(reply[2])
    chunk = math.max(1, math.min(2 * chunk, largest_chunk, math.floor(bytes_left / largest)))
  else
    chunk = math.max(chunk, math.min(2 * chunk, look_ahead))
  end
  if taken[1] == '0-0' or count <= 0 or bytes_left <= 0 then
    break
  end
end
return taken
