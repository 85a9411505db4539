-- Writes down, before rows of a chapter are removed, that they are and from which version on others count.
-- KEYS[1] floors hash  KEYS[2] rebuild hash  KEYS[3] journal set
-- ARGV[1] number of floors   ARGV[2...] (chapter, version) for each, then the ids of the rows
-- Returns 1. The caller holds the chapters, so that a floor it read is still the floor.
local floors = tonumber(ARGV[1])
for i = 2, 2 * floors, 2 do
  redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1])
end
if redis.call('HEXISTS', KEYS[2], 'active') == 1 then
  for i = 2 + 2 * floors, #ARGV do
    redis.call('SADD', KEYS[3], ARGV[i])
  end
end
return 1
