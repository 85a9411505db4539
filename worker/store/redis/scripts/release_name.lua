-- Releases a consumer's name, so the next service takes it without waiting for the lease.
-- Called by RedisReaderStore.release_name. Atomic: only the record of the caller's own epoch may be deleted.
-- The epoch itself stays, so older readers stay fenced off.
-- KEYS[1] stream  KEYS[2] fence hash
-- ARGV[1] consumer   ARGV[2] epoch
-- Returns 1, or 0 if the name has another owner by now.
if redis.call('HGET', KEYS[2], ARGV[1]) ~= ARGV[2] then
  return 0
end
redis.call('HDEL', KEYS[2], '/holder/' .. ARGV[1])
return 1
