-- Deletes consumers that own no entry, were idle for long, and whose name was not renewed for as long.
-- Redis 7.0 counts a consumer as idle while its reads find nothing, so only the name tells that its service lives.
-- Called by RedisReaperStore.remove_idle_consumers, after the preludes info and name.
-- Atomic: deleting a consumer that was given
-- an entry meanwhile would lose that entry.
-- KEYS[1] stream  KEYS[2] fence hash
-- ARGV[1] group   ARGV[2] consumer to keep   ARGV[3] least idle time in ms
-- Returns the number of deleted consumers.
local removed, idle_ms = 0, tonumber(ARGV[3])

local function is_abandoned(name)
  local epoch = redis.call('HGET', KEYS[2], name)
  local record, age_ms = last_record(name, epoch)
  return not record or (age_ms >= idle_ms and not live_record(name, epoch))
end

if redis.call('EXISTS', KEYS[1]) == 0 then
  return removed
end
for _, consumer in ipairs(facts_of(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1]))) do
  local name = consumer['name']
  local is_idle = consumer['pending'] == 0 and consumer['idle'] >= idle_ms
  if name ~= ARGV[2] and is_idle and is_abandoned(name) then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], name)
    redis.call('HDEL', KEYS[2], name, '/holder/' .. name)
    removed = removed + 1
  end
end
return removed
