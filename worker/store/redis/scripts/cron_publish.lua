-- Records the cron tables that a service has in its file and, if they changed, makes them those of the stream.
-- Called by RedisCronStore.cron_publish. Atomic: a tick is taken by the old tables or by the new ones.
-- KEYS[1] cron hash: version, digest, table/<name>, rule/<name>, last/<name>, ran/<name>, paused/<name>, host/<consumer>
-- ARGV[1] consumer   ARGV[2] digest of its tables   ARGV[3] age (s) at which a record is deleted
-- ARGV[4] how far a last tick may be ahead of the clock (s)   ARGV[5...] name, rule and JSON of each table
-- Returns 1 if the tables changed, else 0.
local now = tonumber(redis.call('TIME')[1])
local record = redis.call('HGET', KEYS[1], 'host/' .. ARGV[1])
local has_none = #ARGV == 4
if has_none and not record and redis.call('EXISTS', KEYS[1]) == 0 then
  return 0
end

local changed = 0
local function set(field, value)
  if redis.call('HGET', KEYS[1], field) ~= value then
    redis.call('HSET', KEYS[1], field, value)
    changed = 1
    return true
  end
end

-- A service that restarts with the file that it had must not undo what another has published since.
local is_news = record and string.match(record, '^%S+') ~= ARGV[2] or not record and not has_none
if is_news then
  local kept = {}
  for i = 5, #ARGV, 3 do
    local name = ARGV[i]
    kept[name] = true
    if set('rule/' .. name, ARGV[i + 1]) then
      redis.call('HSET', KEYS[1], 'last/' .. name, now)
    end
    set('table/' .. name, ARGV[i + 2])
  end
  for _, field in ipairs(redis.call('HKEYS', KEYS[1])) do
    local name = string.match(field, '^table/(.*)$')
    if name and not kept[name] then
      -- A pause survives: the table may come back with the next change of the file.
      redis.call('HDEL', KEYS[1], field, 'rule/' .. name, 'last/' .. name, 'ran/' .. name)
      changed = 1
    end
  end
  if changed == 1 then
    redis.call('HINCRBY', KEYS[1], 'version', 1)
  end
  redis.call('HSET', KEYS[1], 'digest', ARGV[2])
end
redis.call('HSET', KEYS[1], 'host/' .. ARGV[1], ARGV[2] .. ' ' .. now)

local flat = redis.call('HGETALL', KEYS[1])
for i = 1, #flat, 2 do
  local field, value = flat[i], flat[i + 1]
  if string.find(field, '^host/') then
    local seen = tonumber(string.match(value, ' (%d+)$')) or 0
    if math.abs(now - seen) > tonumber(ARGV[3]) then
      redis.call('HDEL', KEYS[1], field)
    end
  elseif string.find(field, '^last/') and (tonumber(value) or math.huge) > now + tonumber(ARGV[4]) then
    -- The clock was wrong, or another program wrote this: the table would not be due for long.
    redis.call('HSET', KEYS[1], field, now)
  end
end
return changed
