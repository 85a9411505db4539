-- Ends one write that admit.lua let in.
-- KEYS[1] writers hash  KEYS[2] held hash  KEYS[3] rebuild hash  KEYS[4] journal set
-- ARGV[1] token   ARGV[2] owner   ARGV[3] number held   ARGV[4...] what was held, then the ids of the rows
-- Returns 1 where the write was still let in, 0 where its lease was over.
local held = tonumber(ARGV[3])
for i = 4, 3 + held do
  local holder = redis.call('HGET', KEYS[2], ARGV[i])
  if holder and holder:match('^%d+ (.*)$') == ARGV[2] then
    redis.call('HDEL', KEYS[2], ARGV[i])
  end
end
-- Once more: a copy may have been taken between the first time and the write.
if redis.call('HEXISTS', KEYS[3], 'active') == 1 then
  for i = 4 + held, #ARGV do
    redis.call('SADD', KEYS[4], ARGV[i])
  end
end
return redis.call('HDEL', KEYS[1], ARGV[1])
