-- Records, before rows of a chapter are removed, its new minimum version (tombstone) and the ids of the rows.
-- Called by RedisFence.record_removal. Atomic: a rebuild must see both or neither.
-- KEYS[1] floors hash (minimum versions)  KEYS[2] rebuild hash  KEYS[3] journal set
-- ARGV[1] number of chapters   ARGV[2...] (chapter, version) for each, then the ids of the rows
-- Returns 1. The caller holds the chapters, so a minimum version that it read is still current.
local chapters = tonumber(ARGV[1])
for i = 2, 2 * chapters, 2 do
  redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1])
end
if redis.call('HEXISTS', KEYS[2], 'active') == 1 then
  for i = 2 + 2 * chapters, #ARGV do
    redis.call('SADD', KEYS[3], ARGV[i])
  end
end
return 1
