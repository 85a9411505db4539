-- Ends a deletion: its leases, what it holds, and what dead writes held. Its tombstones stay.
-- Called by RedisFence.finish. Atomic: what another job has taken over must stay.
-- KEYS[1] erasing hash  KEYS[2] held hash
-- ARGV[1] owner: the job
-- Returns 1.
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local running = redis.call('HGETALL', KEYS[1])
for i = 1, #running, 2 do
  local till, owner = running[i + 1]:match('^(%d+) %d (.*)$')
  if owner == ARGV[1] or tonumber(till) <= now then
    redis.call('HDEL', KEYS[1], running[i])
  end
end
local held = redis.call('HGETALL', KEYS[2])
for i = 1, #held, 2 do
  local till, owner = held[i + 1]:match('^(%d+) (.*)$')
  if owner == ARGV[1] or tonumber(till) <= now then
    redis.call('HDEL', KEYS[2], held[i])
  end
end
return 1
