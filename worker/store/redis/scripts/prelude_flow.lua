-- Prelude of the scripts that move waiting jobs (see lua.py). The last of KEYS is the hash ready:<stream>. The keys below
-- begin with its name and a slash, so all are in the stream's slot:
--   jobs/<lane>   LIST of 'entry id, blank, cost in bytes': the jobs of a lane; their bytes stay in the stream
--   heads   ZSET lane -> arrival (ms) of its first job: every lane
--   flows/<type>   ZSET flow -> start tag: the flows that have a lane which may be served
--   lanes/<type>/<flow>   ZSET lane -> arrival of its first job: these lanes, where the type has limits
--   series_flows/<type>, series_lanes/<type>/<flow>   the same for lanes of one series each, whose jobs run one at a time
--   finish   ZSET flow -> finish tag, while it is above the virtual time
--   tenants   ZSET tenant -> waiting jobs   weights   HASH tenant -> weight
--   config   HASH: version and limits   old   SET of lanes whose limits have changed
--   slots   HASH entry id -> limit keys that the running job holds   running   HASH limit key -> running jobs
--   starts/<limit key>   LIST of the times (ms) of the last starts   until   HASH key -> time (ms) until which it waits
--   asked   SET of types with such a key
--   late   ZSET entry id -> its arrival: jobs behind a younger one in their lane, or put back in front of a lane
--   newest   HASH lane -> arrival of its youngest job, while that is not its last one
--   limited   SET of lanes that a limit has blocked since they were last empty
--   parked/<key>   ZSET lane -> tag: lanes that wait for a key   timers   ZSET key -> time (ms) at which one is woken
-- A flow is a tenant and a priority: '<10 - priority>/<length>/<tenant>'. A lane's name is '<length>/<type>/<flow>', then
-- its limit keys as a JSON list, if it has any. A series is the limit key '~=<digest>' (see conditions.py).
local ready = KEYS[#KEYS]

local lanes_read = {}
local function read_lane(name)
  local lane = lanes_read[name]
  if not lane then
    local length, at = name:match('^(%d+)/()')
    local type = name:sub(at, at + length - 1)
    local flow_at = at + length + 1
    local rank, tenant_length, tenant_at = name:match('^(%d+)/(%d+)/()', flow_at)
    local stop = tenant_at + tenant_length
    local keys = #name >= stop and cjson.decode(name:sub(stop)) or {}
    local flow, series = name:sub(flow_at, stop - 1), nil
    for _, key in ipairs(keys) do
      series = key:sub(1, 2) == '~=' and key or series
    end
    local kind = series and '/series_' or '/'
    lane = {
      type = type, priority = 10 - rank, tenant = name:sub(tenant_at, stop - 1), flow = flow, keys = keys,
      series = series, jobs = ready .. '/jobs/' .. name, flows = ready .. kind .. 'flows/' .. type,
      lanes = #keys > 0 and ready .. kind .. 'lanes/' .. name:sub(1, stop - 1),
    }
    lanes_read[name] = lane
  end
  return lane
end

local function tag(number)
  return string.format('%.17g', number)
end

local function arrival(id)
  return id:match('^%d+')
end

local virtual_time
local function now_virtual()
  virtual_time = virtual_time or tonumber(redis.call('HGET', ready, 'v') or 0)
  return virtual_time
end

-- Finish tags of flows that this script has looked at.
local finishes, has_finishes = {}, nil
local function finish_of(flow)
  if not finishes[flow] then
    if has_finishes == nil then
      has_finishes = redis.call('EXISTS', ready .. '/finish') == 1
    end
    finishes[flow] = has_finishes and tonumber(redis.call('ZSCORE', ready .. '/finish', flow) or 0) or 0
  end
  return finishes[flow]
end

-- Arrivals of first jobs that this script has changed; take.lua stores them at its end.
local arrivals = {}
local function open_lane(name)
  local lane = read_lane(name)
  if lane.lanes then
    local arrived = arrivals[name] or redis.call('ZSCORE', ready .. '/heads', name) or 0
    redis.call('ZADD', lane.lanes, arrived, name)
  end
  redis.call('ZADD', lane.flows, 'NX', tag(math.max(now_virtual(), finish_of(lane.flow))), lane.flow)
end

local function close_lane(name)
  local lane = read_lane(name)
  if lane.lanes then
    redis.call('ZREM', lane.lanes, name)
  end
  if not lane.lanes or redis.call('EXISTS', lane.lanes) == 0 then
    redis.call('ZREM', lane.flows, lane.flow)
  end
end

-- Lets the lane with the lowest tag of those that wait for a key be served again.
local function wake(key)
  local woken = redis.call('ZPOPMIN', ready .. '/parked/' .. key)
  if #woken > 0 then
    open_lane(woken[1])
  end
  return #woken > 0
end

-- What is kept of a lane that is empty now, and of all lanes when none has a job.
local function forget_lane(name)
  redis.call('HDEL', ready .. '/newest', name)
  redis.call('SREM', ready .. '/limited', name)
end

local function forget_all()
  for _, part in ipairs({ '', '/finish', '/tenants', '/timers', '/limited', '/late', '/newest' }) do
    redis.call('DEL', ready .. part)
  end
end

-- Counts jobs that came to lanes, or left them (negative numbers): a table by lane. Returns the number of all waiting
-- jobs.
local function count_jobs(by_lane)
  local fields, tenants, all = {}, {}, 0
  for name, number in pairs(by_lane) do
    local lane = read_lane(name)
    for _, field in ipairs({ (lane.series and 'series/' or 'type/') .. lane.type, 'priority/' .. lane.priority }) do
      fields[field] = (fields[field] or 0) + number
    end
    tenants[lane.tenant] = (tenants[lane.tenant] or 0) + number
    all = all + number
  end
  for field, number in pairs(fields) do
    redis.call('HINCRBY', ready, field, number)
  end
  for tenant, number in pairs(tenants) do
    if tonumber(redis.call('ZINCRBY', ready .. '/tenants', number, tenant)) <= 0 then
      redis.call('ZREM', ready .. '/tenants', tenant)
    end
  end
  return redis.call('HINCRBY', ready, 'n', all)
end

local has_late
local function any_late()
  if has_late == nil then
    has_late = redis.call('EXISTS', ready .. '/late') == 1
  end
  return has_late
end

-- A job that leaves its lane.
local function forget_late(id)
  if any_late() then
    redis.call('ZREM', ready .. '/late', id)
  end
end

-- Arrival of the youngest job of a lane but its last ones, which were just added.
local function youngest(name, added)
  local last = redis.call('LINDEX', read_lane(name).jobs, -1 - added)
  local kept = any_late() and redis.call('HGET', ready .. '/newest', name)
  return math.max(last and tonumber(arrival(last)) or 0, tonumber(kept or 0))
end

-- Trimming may not pass jobs that are older than the first of their lane: entries that a lost reader had, or that were put
-- back. `newest` is the arrival of the youngest job before them.
local function note_late(name, jobs, newest)
  local found = false
  for _, job in ipairs(jobs) do
    local at = tonumber(arrival(job))
    if at < newest then
      redis.call('ZADD', ready .. '/late', at, job:match('^%S+'))
      found, has_late = true, true
    else
      newest = at
    end
  end
  if found then
    redis.call('HSET', ready .. '/newest', name, string.format('%.0f', newest))
  elseif any_late() then
    redis.call('HDEL', ready .. '/newest', name)
  end
end

-- Adds jobs to a lane: a list of 'id, blank, cost'. The command that may fail with OOM comes first. The caller counts them.
-- A caller that did not know the present limits adds to a lane that is sorted again.
local current_version, has_old
local function put_jobs(name, jobs, in_front, version)
  if not current_version then
    current_version = redis.call('HGET', ready .. '/config', 'version') or '0'
    has_old = redis.call('EXISTS', ready .. '/old') == 1
  end
  local is_new = redis.call(in_front and 'LPUSH' or 'RPUSH', read_lane(name).jobs, unpack(jobs)) == #jobs
  if in_front and not is_new then
    redis.call('ZADD', ready .. '/late', arrival(jobs[1]), jobs[1]:match('^%S+'))
    has_late = true
  elseif not in_front then
    note_late(name, jobs, is_new and 0 or youngest(name, #jobs))
  end
  if is_new then
    arrivals[name] = arrival(jobs[1])
    redis.call('ZADD', ready .. '/heads', arrivals[name], name)
  end
  if version == current_version then
    local was_old = has_old and redis.call('SREM', ready .. '/old', name) == 1
    if was_old or is_new then
      open_lane(name)
    end
  elseif is_new then
    redis.call('SADD', ready .. '/old', name)
  end
end

-- A job that ends gives back its slots. An entry has them exactly while it is pending.
local function release_slots(ids)
  if redis.call('EXISTS', ready .. '/slots') == 0 then
    return
  end
  for _, id in ipairs(ids) do
    local held = redis.call('HGET', ready .. '/slots', id)
    if held then
      redis.call('HDEL', ready .. '/slots', id)
      for _, key in ipairs(cjson.decode(held)) do
        if redis.call('HINCRBY', ready .. '/running', key, -1) <= 0 then
          redis.call('HDEL', ready .. '/running', key)
        end
        wake(key)
      end
    end
  end
end

-- Lets the jobs of a key wait for some time, or longer if they do already. Readers sort the jobs of the type meanwhile.
local function wait_for(key, type, ms)
  local time = redis.call('TIME')
  local due = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000) + ms
  local waits = ready .. '/until'
  if due > tonumber(redis.call('HGET', waits, key) or 0) then
    redis.call('HSET', waits, key, string.format('%.0f', due))
    redis.call('SADD', ready .. '/asked', type)
    -- Keys that no job asks for again are forgotten together.
    for _, name in ipairs({ waits, ready .. '/asked' }) do
      if redis.call('PTTL', name) < ms + 1000 then
        redis.call('PEXPIRE', name, ms + 1000)
      end
    end
  end
end

