-- Cancels one job: removes it if it waits, or asks the service that has it to end it.
-- Called by RedisCancelStore.cancel, after the preludes info, ids, flow, batch and cancel.
-- Atomic: a job that begins at this moment is either removed or asked, and a removed one has its dead letter and its result,
-- and counts in its batch.
-- KEYS[1] stream  KEYS[2] retry ZSET  KEYS[3] dead-letter stream  KEYS[4] deaths hash  KEYS[5] shards hash of the
-- stream (see forward_take.lua)  KEYS[6] ready hash
-- ARGV[1] entry id; empty for a job of the retry ZSET   ARGV[2] lane in which the entry may wait, or the job in the ZSET
-- ARGV[3] dead letter, or empty   ARGV[4] key of the result, or empty   ARGV[5] result   ARGV[6] its lifetime in ms
-- ARGV[7] how long a request is remembered, in s   ARGV[8] 1: change nothing
-- ARGV[9] id of its batch, or empty   ARGV[10] name of its idempotency key, or empty   ARGV[11] its first entry
-- Returns a number of `CancelReply` in worker/store/ports.py.
local GONE, REMOVED, UNSCHEDULED, ASKED, MOVING = 0, 1, 2, 3, 4
local id, is_dry = ARGV[1], ARGV[8] == '1'

-- First: without memory it fails, and the job stays.
local function record()
  if ARGV[3] ~= '' then
    redis.call('XADD', KEYS[3], '*', 'data', ARGV[3])
  end
  if ARGV[4] ~= '' then
    redis.call('SET', ARGV[4], ARGV[5], 'PX', ARGV[6])
  end
  redis.call('HINCRBY', ready .. '/config', 'cancelled', 1)
  if ARGV[9] ~= '' then
    count_in_batch(ARGV[9], 'dead', 1)
  end
  -- The key is free again, whatever the window of the services is.
  for _, bucket in ipairs(ARGV[10] ~= '' and redis.call('ZRANGE', ready .. '/unique', 0, -1) or {}) do
    if redis.call('HGET', bucket, ARGV[10]) == ARGV[11] then
      redis.call('HDEL', bucket, ARGV[10])
    end
  end
end

if id == '' then
  if not redis.call('ZSCORE', KEYS[2], ARGV[2]) then
    return GONE
  end
  if not is_dry then
    record()
    redis.call('ZREM', KEYS[2], ARGV[2])
  end
  return UNSCHEDULED
end

local entry = redis.call('XRANGE', KEYS[1], id, id)[1]
if not entry then
  return GONE
end

local groups, is_unread = {}, false
for _, group in ipairs(groups_of(KEYS[1])) do
  groups[#groups + 1] = group['name']
  is_unread = is_unread or less(group['last-delivered-id'], id)
end

local function pending(one)
  for _, group in ipairs(groups) do
    if #redis.call('XPENDING', KEYS[1], group, one, one, 1) > 0 then
      return true
    end
  end
  return false
end

-- Entries that ended before they could be cancelled leave a field. Without this, a deployment that cancels running jobs
-- all the time would keep the fields of two days.
local function forget_ended()
  if redis.call('HLEN', cancels) < 1000 or redis.call('EXISTS', ready) == 1 then
    return
  end
  for _, one in ipairs(redis.call('HRANDFIELD', cancels, 100)) do
    if not pending(one) then
      redis.call('HDEL', cancels, one)
    end
  end
end

if pending(id) then
  if not is_dry then
    forget_ended()
    redis.call('HSET', cancels, id, ARGV[3] ~= '' and '1' or '0')
    redis.call('EXPIRE', cancels, ARGV[7])
    redis.call('HINCRBY', ready .. '/config', 'cancels', 1)
  end
  return ASKED
end

-- The item of the job in its lane: 'id, blank, cost'.
local item
for i = 1, #entry[2], 2 do
  if entry[2][i] == 'data' then
    item = id .. ' ' .. #entry[2][i + 1]
    break
  end
end

local function waits_in(name)
  return item and redis.call('LPOS', ready .. '/jobs/' .. name, item)
end

-- Whether the entry was taken for the move into a shard, and that is not done.
local function is_moving()
  local moved, taken = unpack(redis.call('HMGET', KEYS[5], 'moved', 'taken'))
  return moved and taken and less(moved, id) and not less(taken, id)
end

local lane = ARGV[2] ~= '' and waits_in(ARGV[2]) and ARGV[2]
if not lane and not is_unread and #groups > 0 then
  for _, name in ipairs(redis.call('SMEMBERS', ready .. '/old')) do
    lane = lane or waits_in(name) and name
  end
  if not lane then
    return is_moving() and MOVING or GONE
  end
end
if is_dry then
  return REMOVED
end

local function park_no_more(name)
  local waiting = read_lane(name)
  for _, key in ipairs({ '=' .. waiting.type, '==' .. #waiting.type .. '=' .. waiting.type .. waiting.tenant }) do
    redis.call('ZREM', ready .. '/parked/' .. key, name)
  end
  for _, key in ipairs(waiting.keys) do
    redis.call('ZREM', ready .. '/parked/' .. key, name)
  end
end

local function leave(name)
  local waiting = read_lane(name)
  redis.call('LREM', waiting.jobs, 1, item)
  forget_late(item:match('^%S+'))
  local first = redis.call('LINDEX', waiting.jobs, 0)
  if first then
    redis.call('ZADD', ready .. '/heads', arrival(first), name)
    if waiting.lanes then
      redis.call('ZADD', waiting.lanes, 'XX', arrival(first), name)
    end
  else
    redis.call('ZREM', ready .. '/heads', name)
    forget_lane(name)
    park_no_more(name)
    if redis.call('SREM', ready .. '/old', name) == 0 then
      close_lane(name)
    end
    -- The lane may have been woken for room of its keys that it does not use now.
    for _, key in ipairs(waiting.keys) do
      wake(key)
    end
  end
  if count_jobs({ [name] = -1 }) <= 0 then
    forget_all()
  end
end

record()
if lane then
  leave(lane)
end
redis.call('XDEL', KEYS[1], id)
redis.call('HDEL', KEYS[4], id)
return REMOVED
