-- Ends one write that admit.lua admitted, or leaves it to its lease.
-- Called by RedisFence.release and abandon. Atomic: only what the caller still holds may be released.
-- KEYS[1] writers hash  KEYS[2] held hash  KEYS[3] rebuild hash  KEYS[4] journal set  KEYS[5] attempts hash
-- ARGV[1] token of the attempt   ARGV[2] owner: the job   ARGV[3] 1 to leave it to its lease
-- ARGV[4] name of the delivery or the token   ARGV[5] number of ids and chapters held
-- ARGV[6...] the ids and chapters held, then the ids of the rows
-- Returns 1 if the write was still admitted, 0 if its lease was over.
local attempt = redis.call('HGET', KEYS[5], ARGV[4])
if attempt and attempt:match('^%S+') == ARGV[1] then
  redis.call('HDEL', KEYS[5], ARGV[4])
end
if ARGV[3] == '1' then
  return redis.call('HEXISTS', KEYS[1], ARGV[1])
end
local held = tonumber(ARGV[5])
for i = 6, 5 + held do
  local holder = redis.call('HGET', KEYS[2], ARGV[i])
  if holder and holder:match('^%d+ (.*)$') == ARGV[2] then
    redis.call('HDEL', KEYS[2], ARGV[i])
  end
end
-- Recorded again: the rebuild may have copied the rows between the admission and the write.
if redis.call('HEXISTS', KEYS[3], 'active') == 1 then
  for i = 6 + held, #ARGV do
    redis.call('SADD', KEYS[4], ARGV[i])
  end
end
local till = redis.call('HGET', KEYS[1], ARGV[1])
redis.call('HDEL', KEYS[1], ARGV[1])
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
return till and tonumber(till) > now and 1 or 0
