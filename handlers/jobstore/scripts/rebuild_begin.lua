-- Makes one process the only one that rebuilds a collection.
-- KEYS[1] rebuild hash
-- ARGV[1] owner   ARGV[2] lease in ms
-- Returns {epoch, field, value, ...} with what the last one left, or {0, its owner} while that one's lease runs.
-- The same owner is let in at once: an entry is given to another process only when the first is gone.
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local owner = redis.call('HGET', KEYS[1], 'owner')
local till = tonumber(redis.call('HGET', KEYS[1], 'lease_until') or 0)
if owner and owner ~= ARGV[1] and till > now then
  return {0, owner}
end
local epoch = redis.call('HINCRBY', KEYS[1], 'epoch', 1)
local reply = redis.call('HGETALL', KEYS[1])
redis.call('HSET', KEYS[1], 'owner', ARGV[1], 'lease_until', string.format('%d', now + tonumber(ARGV[2])))
table.insert(reply, 1, epoch)
return reply
