-- Gives some of the changed ids; they stay under way until they are said to be done.
-- KEYS[1] journal set  KEYS[2] set of changes under way
-- ARGV[1] how many at most   ARGV[2...] ids that are done
-- Returns the ids. New changes go into the other set, so an id that changes again comes again.
for i = 2, #ARGV do
  redis.call('SREM', KEYS[2], ARGV[i])
end
if redis.call('EXISTS', KEYS[2]) == 0 and redis.call('EXISTS', KEYS[1]) == 1 then
  redis.call('RENAME', KEYS[1], KEYS[2])
end
return redis.call('SRANDMEMBER', KEYS[2], ARGV[1])
