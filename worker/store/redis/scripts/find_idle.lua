-- Counts the other consumers that own no entry and whose service holds its name: they would start a job at once.
-- Called by RedisReaderStore.idle_readers, after the preludes info and name.
-- Atomic: names and entries belong together.
-- KEYS[1] stream  KEYS[2] fence hash
-- ARGV[1] group   ARGV[2] the caller's consumer
-- Returns their number; 0 while the group has undelivered entries: an idle one takes those first, or is not ready.
local idle = 0
if redis.call('EXISTS', KEYS[1]) == 0 then
  return idle
end
for _, group in ipairs(groups_of(KEYS[1])) do
  local after = '(' .. group['last-delivered-id']
  if group['name'] == ARGV[1] and redis.call('XRANGE', KEYS[1], after, '+', 'COUNT', 1)[1] then
    return idle
  end
end
for _, consumer in ipairs(facts_of(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1]))) do
  local name = consumer['name']
  if name ~= ARGV[2] and consumer['pending'] == 0 and live_record(name, redis.call('HGET', KEYS[2], name)) then
    idle = idle + 1
  end
end
return idle
