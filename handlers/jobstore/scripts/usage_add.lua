-- Adds to the counters of tenants on one day.
-- Called by RedisUsages.add. Atomic: the number of fields must stay below the limit.
-- KEYS[1] hash of the day
-- ARGV[1] lifetime in s   ARGV[2] most fields   ARGV[3] name for further tenants
-- ARGV[4...] (tenant, embedded tokens, spared tokens, microseconds of the model, rows) for each
-- Returns 1.
local counters = {'embedded_tokens', 'spared_tokens', 'model_us', 'rows'}
for i = 4, #ARGV, 5 do
  local tenant = ARGV[i]
  local known = redis.call('HEXISTS', KEYS[1], tenant .. '/' .. counters[1]) == 1
  if not known and redis.call('HLEN', KEYS[1]) >= tonumber(ARGV[2]) then
    tenant = ARGV[3]
  end
  for j, counter in ipairs(counters) do
    redis.call('HINCRBY', KEYS[1], tenant .. '/' .. counter, ARGV[i + j])
  end
end
redis.call('EXPIRE', KEYS[1], ARGV[1])
return 1
