-- Saves the state of a rebuild, renews its lease, and stops or resumes the admission of writes.
-- Called by RedisFence.save. Atomic: a process that lost the rebuild must change nothing.
-- KEYS[1] rebuild hash  KEYS[2] journal set  KEYS[3] set of ids in progress
-- ARGV[1] epoch   ARGV[2] lease in ms   ARGV[3] ms for which no write is admitted, '0' admits them, '' for no change
-- ARGV[4] '1' to record written ids from now on, '0' to stop that and forget them, '' for no change
-- ARGV[5...] (field, value) for each field to save
-- Returns 1, or 0 if another process has taken over the rebuild.
if redis.call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then
  return 0
end
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
redis.call('HSET', KEYS[1], 'lease_until', string.format('%d', now + tonumber(ARGV[2])))
if ARGV[3] == '0' then
  redis.call('HDEL', KEYS[1], 'closed_until')
elseif ARGV[3] ~= '' then
  redis.call('HSET', KEYS[1], 'closed_until', string.format('%d', now + tonumber(ARGV[3])))
end
if ARGV[4] == '1' then
  redis.call('HSET', KEYS[1], 'active', 1)
elseif ARGV[4] == '0' then
  redis.call('HDEL', KEYS[1], 'active')
  redis.call('DEL', KEYS[2], KEYS[3])
end
for i = 5, #ARGV, 2 do
  redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1])
end
return 1
