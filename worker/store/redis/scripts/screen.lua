-- Compares jobs with others of their supersede keys, and moves those that are not due into the retry ZSET.
-- Called by RedisReaderStore.screen, after prelude_epoch.lua, prelude_ids.lua, prelude_flow.lua, prelude_batch.lua and
-- prelude_conditions.lua. Atomic: of two jobs with one key that several hosts read at once, one runs; a delayed job is
-- pending or in the ZSET.
-- KEYS[1] stream  KEYS[2] fence hash  KEYS[3] retry ZSET  KEYS[4] deaths hash
-- KEYS[5] ready hash
-- ARGV[1] group   ARGV[2] consumer   ARGV[3] epoch   ARGV[4] ms for which the newest job of a series is known, from its due
-- time on   ARGV[5...] (entry, first entry, series, due time, job) of each job: series may be empty, and so is the job if it
-- is due; the newest of a series comes first
-- Returns number of the job, verdict and first entry of the other job, for each job that may not run.
local reply, number, at = {}, 0, 5
redis.call('HLEN', KEYS[4])
redis.call('HLEN', ready) -- a key of another type ends the script here, before any write
check_batches()

local function refuse(verdict, by)
  reply[#reply + 1] = number
  reply[#reply + 1] = verdict
  reply[#reply + 1] = by
end

local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1e6

-- A replaced job that is delayed becomes due: the reader that gets it drops it.
local function hasten(due, first)
  local mark = '"jobworker_first_id":"' .. first .. '"'
  for _, job in ipairs(redis.call('ZRANGEBYSCORE', KEYS[3], due, due, 'LIMIT', 0, 16)) do
    if job:find(mark, 1, true) then
      redis.call('ZADD', KEYS[3], 'XX', string.format('%.6f', now), job)
      return
    end
  end
end

-- Makes the job the newest of its series. Returns the first entry of a newer one.
local function lead(series, id, first, due)
  local newest_first, newest_id, newest_due = newest_of(series)
  if newest_first and less(first, newest_first) then
    return newest_first
  end
  local keep_ms = tonumber(ARGV[4]) + math.max(0, math.ceil((tonumber(due) - now) * 1000))
  local record = first .. ' ' .. id .. ' ' .. due
  redis.call('SET', ready .. '/newest/' .. series, record, 'PX', string.format('%.0f', keep_ms))
  if newest_first and newest_first ~= first and newest_due ~= '0' then
    hasten(newest_due, newest_first)
  end
end

local function delay(id, due, job)
  redis.call('ZADD', KEYS[3], due, job)
  redis.call('XACK', KEYS[1], ARGV[1], id)
  redis.call('HDEL', KEYS[4], id)
  own[id] = false
  release_slots({ id })
  leave_batches({ id })
  if redis.call('EXISTS', ready) == 1 and #redis.call('XINFO', 'GROUPS', KEYS[1]) == 1 then
    redis.call('XDEL', KEYS[1], id) -- trimming cannot pass it while jobs wait in lanes
  end
end

while at <= #ARGV do
  number = number + 1
  local id, first, series, due, job = unpack(ARGV, at, at + 4)
  if not owned(id) then
    refuse('lost', '')
  else
    local newer = series ~= '' and lead(series, id, first, due)
    if newer then
      refuse('superseded', newer)
    elseif job ~= '' then
      delay(id, due, job)
      refuse('delayed', '')
    end
  end
  at = at + 5
end
return reply
