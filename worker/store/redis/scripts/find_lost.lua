-- Says whether a consumer whose name no service owns any more has entries that another may claim. It looks at the
-- consumers and at few of their entries, so it costs little beside a sweep through all pending entries.
-- Called by RedisReaderStore.has_lost, after the preludes info and name.
-- Atomic: a consumer's name and its entries belong together.
-- KEYS[1] stream  KEYS[2] fence hash
-- ARGV[1] group   ARGV[2] the caller's consumer   ARGV[3] least idle time in ms
-- Returns 1 or 0.
local rows_looked_at = 16

-- The oldest entries were renewed last by a service that died; a service that stopped has released all of them.
local function has_idle(name)
  for _, row in ipairs(redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', rows_looked_at, name)) do
    if row[3] >= tonumber(ARGV[3]) then
      return true
    end
  end
  return false
end

if redis.call('EXISTS', KEYS[1]) == 0 then
  return 0
end
for _, consumer in ipairs(facts_of(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1]))) do
  local name = consumer['name']
  if name ~= ARGV[2] and consumer['pending'] > 0 and not live_record(name, redis.call('HGET', KEYS[2], name)) then
    -- A consumer is at most as idle as its entries.
    if consumer['idle'] >= tonumber(ARGV[3]) or has_idle(name) then
      return 1
    end
  end
end
return 0
