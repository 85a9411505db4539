-- Claims idempotency keys for jobs that are read for the first time, or again.
-- Called by RedisReaderStore.claim_keys, after prelude_epoch.lua, prelude_flow.lua and prelude_conditions.lua. Atomic: of two
-- jobs with one key that two hosts read at once, one gets it.
-- KEYS[1] stream  KEYS[2] fence hash  KEYS[3] ready hash
-- ARGV[1] group   ARGV[2] consumer   ARGV[3] epoch   ARGV[4] window in ms   ARGV[5] number of the bucket: the time of each
-- entry divided by the window
-- ARGV[6] names of the keys, at most 1,000, and no name twice   ARGV[7] name and first entry of each job; both lists in
-- msgpack: that takes the caller a fraction of the time of as many arguments
-- Returns number and owner, for each job whose key another one owns.
redis.call('HLEN', ready) -- a key of another type ends the script here, before any write
local names, claims = cmsgpack.unpack(ARGV[6]), cmsgpack.unpack(ARGV[7])
local window, number = tonumber(ARGV[4]), tonumber(ARGV[5])
local bucket = unique_bucket(ARGV[4] .. '/' .. ARGV[5])
local exists = redis.call('EXISTS', bucket) == 1

local owners, has_owners = {}, false
local function look(key)
  for i, owner in ipairs(redis.call('HMGET', key, unpack(names))) do
    if owner then
      local first = claims[2 * i]
      if owner ~= first and math.abs(arrival(first) - arrival(owner)) < window then
        owners[i], has_owners = owner, true
      end
    end
  end
end
for _, other in ipairs({ number - 1, number, number + 1 }) do
  local key = unique_bucket(ARGV[4] .. '/' .. string.format('%.0f', other))
  if redis.call('EXISTS', key) == 1 then
    look(key)
  end
end

local reply = {}
if has_owners then
  local free = {}
  for i, name in ipairs(names) do
    if owners[i] then
      reply[#reply + 1] = i
      reply[#reply + 1] = owners[i]
    else
      free[#free + 1] = name
      free[#free + 1] = claims[2 * i]
    end
  end
  claims = free
end
if #claims > 0 then
  local set = redis.pcall('HSET', bucket, unpack(claims))
  if type(set) == 'table' and set.err then
    -- Without memory the jobs run unclaimed: else a full server could never be emptied by running its jobs.
    return set.err:find('OOM', 1, true) and reply or set
  end
end
if not exists then
  -- The last job of the bucket is a window old after two windows. The reaper deletes it then, in the background.
  redis.call('ZADD', ready .. '/unique', string.format('%.0f', (number + 2) * window), bucket)
end
return reply
