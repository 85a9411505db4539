-- Gives a consumer's name up: the next service takes it without waiting. The epoch stays and fences older readers off.
-- KEYS[1] stream  KEYS[2] fence hash
-- ARGV[1] consumer   ARGV[2] epoch
-- Returns 1, or 0 where the name is another's by now.
if redis.call('HGET', KEYS[2], ARGV[1]) ~= ARGV[2] then
  return 0
end
redis.call('HDEL', KEYS[2], '/holder/' .. ARGV[1])
return 1
