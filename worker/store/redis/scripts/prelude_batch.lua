-- Prelude of the scripts that count the jobs of batches (see lua.py). The last of KEYS is any key of the stream whose name
-- is a prefix and the stream, such as ready:<stream>. The keys below are in the same slot:
--   batch:<stream>/<id>   HASH: total, done, dead: the jobs of the batch on this stream
--     on every stream but the home stream: home
--     on the home stream: stream/<name> for each other stream, name, tenant_id, on_complete, created, closed, finished,
--     callback, error
--   batches:<stream>/jobs   HASH entry id -> batch id: pending entries. An entry is counted when it leaves this hash, so
--     it is counted once
--   batches:<stream>/due   HASH batch id -> ended jobs: the reaper looks at these batches
--   batches:<stream>/open, batches:<stream>/finished   ZSET batch id -> time (ms): the batches whose home this is
local batches = 'batches' .. KEYS[#KEYS]:match('^%l+(:.*)$')

-- Seconds for which a batch that has not finished is kept after its last change: 30 days.
local batch_open_s = 2592000

-- A key of another type ends the script, which calls this before any write. True if entries are registered.
local has_members
local function check_batches()
  has_members = redis.call('HLEN', batches .. '/jobs') > 0
  redis.call('HLEN', batches .. '/due')
  return has_members
end

local function batch_key(batch)
  return 'batch' .. batches:sub(8) .. '/' .. batch
end

-- Lists a batch, keeps it for another while, and tells the reaper of it if all its jobs may have ended.
local function touch_batch(batch)
  local key = batch_key(batch)
  local total, done, dead, home, finished = unpack(redis.call('HMGET', key, 'total', 'done', 'dead', 'home', 'finished'))
  if finished then
    return
  end
  local ended = (tonumber(done) or 0) + (tonumber(dead) or 0)
  if not tonumber(total) or ended >= tonumber(total) then
    redis.call('HSET', batches .. '/due', batch, ended)
  end
  if not home then
    local time = redis.call('TIME')
    -- The list is for people: a key of another type must not stop the script, which has written already.
    redis.pcall('ZADD', batches .. '/open', 'NX', time[1] .. string.format('%03d', math.floor(time[2] / 1000)), batch)
  end
  redis.call('EXPIRE', key, batch_open_s)
end

-- Counts jobs of a batch that ended: outcome is 'done' or 'dead'. A batch without a record, or whose record another
-- program has damaged, is not counted.
local function count_in_batch(batch, outcome, number)
  local key = batch_key(batch)
  if redis.call('EXISTS', key) == 1 and type(redis.pcall('HINCRBY', key, outcome, number)) == 'number' then
    touch_batch(batch)
  end
end

-- Takes entries out of their batches, with an outcome ('done' or 'dead') if their jobs ended. The one place where the end
-- of a pending entry is counted. Jobs that were never pending are counted with count_in_batch.
local function leave_batches(ids, outcome)
  if #ids == 0 or not has_members then
    return
  end
  local members, numbers = {}, {}
  for i, batch in ipairs(redis.call('HMGET', batches .. '/jobs', unpack(ids))) do
    if batch then
      members[#members + 1] = ids[i]
      numbers[batch] = (numbers[batch] or 0) + 1
    end
  end
  if #members == 0 then
    return
  end
  redis.call('HDEL', batches .. '/jobs', unpack(members))
  for batch, number in pairs(outcome and numbers or {}) do
    count_in_batch(batch, outcome, number)
  end
end

