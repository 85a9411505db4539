-- Reads the last id of a stream.
-- Called by RedisStoreBase.key_faults. It need not be atomic: it is a script because XINFO sends the first and the last
-- entry too, which may be megabytes.
-- KEYS[1] stream
-- Returns the id of the newest entry that was ever added.
local flat = redis.call('XINFO', 'STREAM', KEYS[1])
for i = 1, #flat, 2 do
  if flat[i] == 'last-generated-id' then
    return flat[i + 1]
  end
end
