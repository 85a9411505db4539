-- Ends one write that admit.lua admitted.
-- Called by RedisFence.release. Atomic: only what the caller still holds may be released.
-- KEYS[1] writers hash  KEYS[2] held hash  KEYS[3] rebuild hash  KEYS[4] journal set
-- ARGV[1] token of the attempt   ARGV[2] owner: the job   ARGV[3] number of ids and chapters held
-- ARGV[4...] the ids and chapters held, then the ids of the rows
-- Returns 1 if the write was still admitted, 0 if its lease was over.
local held = tonumber(ARGV[3])
for i = 4, 3 + held do
  local holder = redis.call('HGET', KEYS[2], ARGV[i])
  if holder and holder:match('^%d+ (.*)$') == ARGV[2] then
    redis.call('HDEL', KEYS[2], ARGV[i])
  end
end
-- Recorded again: the rebuild may have copied the rows between the admission and the write.
if redis.call('HEXISTS', KEYS[3], 'active') == 1 then
  for i = 4 + held, #ARGV do
    redis.call('SADD', KEYS[4], ARGV[i])
  end
end
return redis.call('HDEL', KEYS[1], ARGV[1])
