-- Makes entries that are still this consumer's look long idle, so that the next take-over may have them. What
-- is handed back was not run to death here, so its delivery is not counted either.
-- KEYS[1] stream  KEYS[2] fence hash
-- ARGV[1] group   ARGV[2] consumer   ARGV[3] epoch   ARGV[4] idle time in ms   ARGV[5...] ids
-- Returns how many were released.
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
