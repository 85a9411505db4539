-- Deletes a record, unless a job that was created after the deletion has stored it.
-- Called by RedisRecords.discard. Atomic: a newer job may store it at the same moment.
-- KEYS[1] hash
-- ARGV[1] owner, empty where the key's name is unambiguous   ARGV[2] time of the deletion in us
-- Returns 1 if there is no such record now, 0 if it stays.
if redis.call('EXISTS', KEYS[1]) == 0 then
  return 1
end
local own = redis.call('HMGET', KEYS[1], 'owner', 'created_us')
if (own[1] or '') ~= ARGV[1] or (tonumber(own[2]) or 0) > tonumber(ARGV[2]) then
  return 0
end
return redis.call('DEL', KEYS[1])
