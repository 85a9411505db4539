-- Returns some of the ids that were written during a rebuild. They stay in progress until the caller reports them done.
-- Called by RedisFence.changed. Atomic: an id that is written meanwhile must be in one of the two sets.
-- KEYS[1] journal set  KEYS[2] set of ids in progress
-- ARGV[1] how many at most   ARGV[2...] ids that are done
-- Returns the ids. New writes go into the journal set, so an id that is written again is returned again.
for i = 2, #ARGV do
  redis.call('SREM', KEYS[2], ARGV[i])
end
if redis.call('EXISTS', KEYS[2]) == 0 and redis.call('EXISTS', KEYS[1]) == 1 then
  redis.call('RENAME', KEYS[1], KEYS[2])
end
return redis.call('SRANDMEMBER', KEYS[2], ARGV[1])
