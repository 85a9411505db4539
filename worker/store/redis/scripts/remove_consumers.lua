-- Deletes consumers that own nothing and were idle for long. In one step, for deleting a consumer that was
-- given an entry meanwhile would lose that entry.
-- KEYS[1] stream  KEYS[2] fence hash
-- ARGV[1] group   ARGV[2] consumer to keep   ARGV[3] least idle time in ms
-- Returns how many were deleted.
local removed = 0
if redis.call('EXISTS', KEYS[1]) == 0 then
  return removed
end
for _, flat in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])) do
  local consumer = {}
  for i = 1, #flat, 2 do
    consumer[flat[i]] = flat[i + 1]
  end
  local name = consumer['name']
  if name ~= ARGV[2] and consumer['pending'] == 0 and consumer['idle'] >= tonumber(ARGV[3]) then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], name)
    redis.call('HDEL', KEYS[2], name)
    removed = removed + 1
  end
end
return removed
