-- Makes entries claimable at once: they look idle for long, and their last delivery is not counted, because they did
-- not run here.
-- Called by RedisReaderStore.release, after prelude_epoch.lua. Atomic: an entry that another consumer claimed meanwhile
-- must stay as it is.
-- KEYS[1] stream  KEYS[2] fence hash
-- ARGV[1] group   ARGV[2] consumer   ARGV[3] epoch   ARGV[4] idle time in ms   ARGV[5...] ids
-- Returns the number of released entries.
local released = 0
for i = 5, #ARGV do
  local id = ARGV[i]
  if owned(id) then
    local row = redis.call('XPENDING', KEYS[1], ARGV[1], id, id, 1, ARGV[2])[1]
    local deliveries = math.max(0, row[4] - 1)
    redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, id, 'IDLE', ARGV[4], 'RETRYCOUNT', deliveries, 'JUSTID')
    released = released + 1
  end
end
return released
