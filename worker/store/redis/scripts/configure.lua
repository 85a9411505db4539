-- Replaces limits and weights. Jobs of types whose limits have other keys now are sorted again by the readers.
-- Called by RedisReaderStore.configure. Atomic: each lane is served by the limits that its name states.
-- KEYS[1] ready hash
-- ARGV[1] version that is replaced, or '' for any   ARGV[2] origin   ARGV[3] limits as a JSON list
-- ARGV[4...] tenant, weight, tenant, weight, ...
-- Returns the new version, or nil if the version was another one.
local config = ready .. '/config'
local version = redis.call('HGET', config, 'version') or '0'
if ARGV[1] ~= '' and ARGV[1] ~= version then
  return false
end

local function by_key(text)
  local found = {}
  for _, limit in ipairs(cjson.decode(text)) do
    found[cjson.encode({ limit.name, limit.type, limit.key })] = limit.type
  end
  return found
end
local before, after = by_key(redis.call('HGET', config, 'limits') or '[]'), by_key(ARGV[3])
local is_affected = {}
for key, type in pairs(before) do
  is_affected[type] = is_affected[type] or not after[key]
end
for key, type in pairs(after) do
  is_affected[type] = is_affected[type] or not before[key]
end

for _, name in ipairs(redis.call('ZRANGE', ready .. '/heads', 0, -1)) do
  local lane = read_lane(name)
  local was_parked = false
  for _, key in ipairs(lane.keys) do
    was_parked = redis.call('ZREM', ready .. '/parked/' .. key, name) == 1 or was_parked
  end
  if is_affected[lane.type] then
    for _, key in ipairs({ '=' .. lane.type, '==' .. #lane.type .. '=' .. lane.type .. lane.tenant }) do
      redis.call('ZREM', ready .. '/parked/' .. key, name)
    end
    close_lane(name)
    redis.call('SADD', ready .. '/old', name)
  elseif was_parked then
    open_lane(name)
  end
end

version = string.format('%.0f', tonumber(version) + 1)
redis.call('HSET', config, 'version', version, 'origin', ARGV[2], 'limits', ARGV[3])
redis.call('DEL', ready .. '/weights')
for i = 4, #ARGV, 2 do
  redis.call('HSET', ready .. '/weights', ARGV[i], ARGV[i + 1])
end
return version
