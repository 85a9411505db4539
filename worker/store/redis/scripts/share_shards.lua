-- Shares the shards of a stream among the readers that live: each owns as many, give or take one.
-- Called by RedisReaderStore.share_shards. Atomic: a shard has one owner.
-- KEYS[1] shards hash of the stream: reader/<consumer>: time (ms) until which the reader counts;
-- owner/<number of shards>/<number>: consumer
-- ARGV[1] consumer   ARGV[2] ms for which the caller counts from now; 0: it leaves   ARGV[3] number of shards
-- Returns the numbers of the caller's shards, from 0 on. They only say which shards a reader serves first: leases and the
-- fence decide who runs a job.
local clock = redis.call('TIME')
local now_ms = tonumber(clock[1]) * 1000 + math.floor(tonumber(clock[2]) / 1000)
local longest_ms = 86400000
local me, lease_ms, count = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])

local held, owners, gone = {}, {}, {}
local flat = redis.call('HGETALL', KEYS[1])
for i = 1, #flat, 2 do
  local reader = flat[i]:match('^reader/(.*)$')
  local of, number = flat[i]:match('^owner/(%d+)/(%d+)$')
  if reader then
    local left_ms = (tonumber(flat[i + 1]) or 0) - now_ms
    if left_ms > 0 and left_ms <= longest_ms then
      held[reader] = 0
    else
      gone[#gone + 1] = flat[i]
    end
  elseif of == ARGV[3] and tonumber(number) < count then
    owners[tonumber(number)] = flat[i + 1]
  end
end
if lease_ms > 0 then
  held[me] = 0
  redis.call('HSET', KEYS[1], 'reader/' .. me, string.format('%.0f', now_ms + lease_ms))
else
  held[me] = nil
  gone[#gone + 1] = 'reader/' .. me
end
if #gone > 0 then
  redis.call('HDEL', KEYS[1], unpack(gone))
end

local mine, free = {}, {}
for number = 0, count - 1 do
  local owner = owners[number]
  if owner and held[owner] then
    held[owner] = held[owner] + 1
  else
    free[#free + 1] = number
  end
  if owner == me and held[me] then
    mine[#mine + 1] = number
  end
end

local readers = 0
for _ in pairs(held) do
  readers = readers + 1
end
local least, most = math.floor(count / readers), math.ceil(count / readers)
local missing = 0 -- shards that the others need to have the least number
for reader, number in pairs(held) do
  if reader ~= me then
    missing = missing + math.max(0, least - number)
  end
end

local function field(number)
  return 'owner/' .. ARGV[3] .. '/' .. number
end
if held[me] then
  while #free > 0 and (#mine < least or (#mine < most and #free > missing)) do
    local number = table.remove(free, 1)
    mine[#mine + 1] = number
    redis.call('HSET', KEYS[1], field(number), me)
  end
  while #mine > most or (#mine > least and #free < missing) do
    local number = table.remove(mine)
    free[#free + 1] = number
    redis.call('HDEL', KEYS[1], field(number))
  end
end
return mine
