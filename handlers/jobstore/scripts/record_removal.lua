-- Records, before rows of a chapter are removed, its new minimum version (tombstone) and the ids of the rows.
-- Called by RedisFence.record_removal. Atomic: a rebuild must see both or neither.
-- KEYS[1] floors hash (minimum versions)  KEYS[2] rebuild hash  KEYS[3] journal set
-- ARGV[1] number of chapters   ARGV[2] creation of the job in us, 0 if it is not known
-- ARGV[3...] (chapter, version) for each, then the ids of the rows
-- The field '/' and chapter has the latest creation of a job that set this minimum version: a deletion leaves what is newer.
-- Returns 1. The caller holds the chapters, so a minimum version that it read is still current.
local chapters = tonumber(ARGV[1])
for i = 3, 1 + 2 * chapters, 2 do
  local known = redis.call('HMGET', KEYS[1], ARGV[i], '/' .. ARGV[i])
  redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1])
  if known[1] ~= ARGV[i + 1] or tonumber(ARGV[2]) > tonumber(known[2] or 0) then
    redis.call('HSET', KEYS[1], '/' .. ARGV[i], ARGV[2])
  end
end
if redis.call('HEXISTS', KEYS[2], 'active') == 1 then
  for i = 3 + 2 * chapters, #ARGV do
    redis.call('SADD', KEYS[3], ARGV[i])
  end
end
return 1
