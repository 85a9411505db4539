-- Gives the rebuild of a collection to one process, with a new epoch.
-- Called by RedisFence.begin. Atomic: two processes must not both get it.
-- KEYS[1] rebuild hash
-- ARGV[1] owner: the job   ARGV[2] lease in ms
-- Returns {epoch, field, value, ...} with the state that the last process saved, or {0, its owner} during its lease.
-- The same owner gets it at once: an entry is given to another process only after the first is gone.
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
