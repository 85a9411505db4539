-- Takes the jobs whose turn it is out of their lanes and makes them pending for the caller, by start-time fair queueing:
-- the flow with the lowest start tag is served, and its next tag is higher by cost / weight.
-- Called by RedisReaderStore.take, after prelude_epoch.lua, prelude_flow.lua and prelude_conditions.lua. Atomic: a job is in
-- a lane or pending, and a limit is checked and used in one step. Superseded jobs are taken whatever the limits are, so that
-- the caller can drop them.
-- KEYS[1] stream  KEYS[2] fence hash  KEYS[3] deaths hash  KEYS[4] ready hash
-- ARGV[1] group   ARGV[2] consumer   ARGV[3] epoch   ARGV[4] most jobs   ARGV[5] bytes after which to stop
-- ARGV[6] most jobs of lanes whose limits have changed   ARGV[7...] types that the caller runs now
-- Returns the number of waiting jobs, ms until a lane may be woken (-1: none), the number of jobs that must be sorted
-- again, a list of type and number of jobs to be run that waited for a limit, then id, data and deaths of each job: first
-- those to be sorted, then those to be run.
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local most, bytes, again = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
-- Lanes that are looked at without taking a job: bounds the time that the server runs nothing else.
local looks = 1000
local ids, names, sorted_again = {}, {}, 0
redis.call('HLEN', KEYS[3])
if redis.call('EXISTS', ready) == 0 then
  return { 0, -1, 0, {} }
end

-- Lanes in which all jobs count as limited: a limit blocked the lane since it was last empty.
local limited_lanes, has_limited = {}, redis.call('EXISTS', ready .. '/limited') == 1
local function was_limited(name)
  if limited_lanes[name] == nil then
    limited_lanes[name] = has_limited and redis.call('SISMEMBER', ready .. '/limited', name) == 1
  end
  return limited_lanes[name]
end

-- Jobs that leave their lanes, as negative numbers.
local left_by_lane = {}
local function take_out(name, number)
  local lane = read_lane(name)
  local jobs = redis.call('LPOP', lane.jobs, number) or {}
  left_by_lane[name] = (left_by_lane[name] or 0) - #jobs
  local first = redis.call('LINDEX', lane.jobs, 0)
  arrivals[name] = first and arrival(first)
  for _, job in ipairs(jobs) do
    forget_late(job:match('^%S+'))
  end
  if not first and (has_limited or any_late()) then
    forget_lane(name)
  end
  return jobs, first
end

while again > 0 do
  local name = redis.call('SRANDMEMBER', ready .. '/old')
  if not name then
    break
  end
  local jobs, first = take_out(name, again)
  for _, job in ipairs(jobs) do
    ids[#ids + 1] = job:match('^%S+')
  end
  again = again - #jobs
  if not first then
    redis.call('SREM', ready .. '/old', name)
  end
end
sorted_again = #ids

local limits, is_limited = {}, {}
for _, limit in ipairs(cjson.decode(redis.call('HGET', ready .. '/config', 'limits') or '[]')) do
  limits[limit.name] = limit
  is_limited[limit.type] = true
end
limits['~'] = { concurrency = 1 } -- of each series
local has_waits = redis.call('EXISTS', ready .. '/until') == 1

-- Returns whether a key has room for one more job and, where only time helps, when (ms).
local function room(key)
  local until_ms = has_waits and tonumber(redis.call('HGET', ready .. '/until', key) or 0) or 0
  if until_ms > now then
    return false, until_ms
  elseif until_ms > 0 then
    redis.call('HDEL', ready .. '/until', key)
  end
  local limit = limits[key:match('^[^=]*')]
  if not limit then
    return true
  end
  if limit.concurrency then
    local running = tonumber(redis.call('HGET', ready .. '/running', key) or 0)
    if running >= limit.concurrency then
      return false
    end
  end
  if limit.starts then
    local first = redis.call('LINDEX', ready .. '/starts/' .. key, limit.starts - 1)
    if first and tonumber(first) + limit.per_ms > now then
      return false, tonumber(first) + limit.per_ms
    end
  end
  return true
end

-- The keys of a lane; those of its type and tenant count only while a handler asked one to wait.
local function keys_of(lane)
  if not has_waits then
    return lane.keys
  end
  local keys = { '=' .. lane.type, '==' .. #lane.type .. '=' .. lane.type .. lane.tenant }
  for _, key in ipairs(lane.keys) do
    keys[#keys + 1] = key
  end
  return keys
end

-- After a lane was served or parked, another lane may use the room of a key that they share.
local function wake_others(lane, but)
  for _, key in ipairs(lane.keys) do
    if key ~= but then
      local has_room, at = room(key)
      if has_room then
        wake(key)
      elseif at and redis.call('EXISTS', ready .. '/parked/' .. key) == 1 then
        redis.call('ZADD', ready .. '/timers', at, key)
      end
    end
  end
end

for _, key in ipairs(redis.call('ZRANGEBYSCORE', ready .. '/timers', '-inf', now, 'LIMIT', 0, 100)) do
  redis.call('ZREM', ready .. '/timers', key)
  if key:sub(1, 1) == '=' then
    -- No limit has this key, so serving one lane wakes no other.
    for _ = 1, 100 do
      if not wake(key) then
        break
      end
    end
    if redis.call('EXISTS', ready .. '/parked/' .. key) == 1 then
      redis.call('ZADD', ready .. '/timers', now, key)
    end
  else
    wake(key)
  end
end

-- Where no limit applies, a lane is a flow. Such flows are kept in a binary heap by key, and their new tags are stored
-- at the end: with many tenants each job has another flow than the one before.
local heaps, new_tags = {}, {}

local function is_before(flow, other)
  return flow.tag < other.tag or (flow.tag == other.tag and flow.name < other.name)
end

local function load_heap(flows)
  local heap, found = { size = 0 }, redis.call('ZRANGE', flows, 0, most, 'WITHSCORES')
  for i = 1, #found, 2 do
    heap.size = heap.size + 1
    heap[heap.size] = { name = found[i], tag = tonumber(found[i + 1]) }
  end
  -- Flows behind this one are not in the heap.
  heap.last = heap.size > most and heap[heap.size] or nil
  heaps[flows], new_tags[flows] = heap, {}
end

local function store_tags(flows)
  local command = { 'ZADD', flows, 'XX' }
  for name, finish in pairs(new_tags[flows]) do
    command[#command + 1] = tag(finish)
    command[#command + 1] = name
  end
  if #command > 3 then
    redis.call(unpack(command))
  end
end

-- Gives the first flow of a heap its next tag; without one, the flow has no job left.
local function move_first(flows, finish)
  local heap = heaps[flows]
  local flow = { name = heap[1].name, tag = finish }
  new_tags[flows][flow.name] = finish
  if not finish then
    flow = heap[heap.size]
    heap[heap.size] = nil
    heap.size = heap.size - 1
    if heap.size == 0 then
      return
    end
  end
  local at, child = 1, 2
  while child <= heap.size do
    if child < heap.size and is_before(heap[child + 1], heap[child]) then
      child = child + 1
    end
    if not is_before(heap[child], flow) then
      break
    end
    heap[at] = heap[child]
    at, child = child, 2 * child
  end
  heap[at] = flow
end

-- The flow with the lowest tag of each key of flows, and the one after it.
local heads, seconds = {}, {}
local function look(flows)
  local heap = heaps[flows]
  if not heap then
    local lowest = redis.call('ZRANGE', flows, 0, 1, 'WITHSCORES')
    heads[flows] = lowest[1] and { name = lowest[1], tag = tonumber(lowest[2]) }
    seconds[flows] = lowest[3] and { name = lowest[3], tag = tonumber(lowest[4]) }
    return
  end
  local last = heap.last
  if last and (heap.size < 2 or is_before(last, heap[1])) then
    store_tags(flows)
    load_heap(flows)
    heap, last = heaps[flows], heaps[flows].last
  end
  local second = heap[2]
  if heap[3] and is_before(heap[3], second) then
    second = heap[3]
  end
  heads[flows], seconds[flows] = heap[1], last and is_before(last, second) and last or second
end
-- Type and kind of each key of flows.
local types, kinds = {}, {}
for i = 7, #ARGV do
  for _, kind in ipairs({ '/', '/series_' }) do
    local flows = ready .. kind .. 'flows/' .. ARGV[i]
    types[flows], kinds[flows] = ARGV[i], kind
    if kind == '/' and not is_limited[ARGV[i]] and not has_waits then
      load_heap(flows)
    end
    look(flows)
  end
end

local function next_flows()
  local best
  for flows, head in pairs(heads) do
    if not best or is_before(head, heads[best]) then
      best = flows
    end
  end
  return best
end

local function blocked_by(lane)
  for _, key in ipairs(keys_of(lane)) do
    local has_room, at = room(key)
    if not has_room then
      return key, at
    end
  end
end

local function use_limits(lane, id)
  if #lane.keys == 0 then
    return
  end
  redis.call('HSET', ready .. '/slots', id, cjson.encode(lane.keys))
  for _, key in ipairs(lane.keys) do
    redis.call('HINCRBY', ready .. '/running', key, 1)
    local limit = limits[key:match('^[^=]*')]
    if limit and limit.starts then
      local starts = ready .. '/starts/' .. key
      redis.call('LPUSH', starts, now)
      redis.call('LTRIM', starts, 0, limit.starts - 1)
      redis.call('PEXPIRE', starts, limit.per_ms)
    end
  end
end

local weights = {}
local function weight(lane)
  local own = weights[lane.tenant]
  if not own then
    own = tonumber(redis.call('HGET', ready .. '/weights', lane.tenant) or 1) or 1
    weights[lane.tenant] = own
  end
  return own * 2 ^ lane.priority
end

-- The flow with the lowest tag of all but the first one of a key.
local function rival_of(flows)
  local rival = seconds[flows]
  for other, head in pairs(heads) do
    if other ~= flows and (not rival or is_before(head, rival)) then
      rival = head
    end
  end
  return rival
end

local waited_for_limits = {}

-- The first jobs of lanes of heaps; those that are taken leave their lane at the end.
local runs = {}
local function read_on(name, at_once)
  local run = runs[name] or { taken = 0, is_whole = false }
  local jobs = redis.call('LRANGE', read_lane(name).jobs, #run, #run + at_once - 1)
  run.is_whole = #jobs < at_once
  for _, job in ipairs(jobs) do
    run[#run + 1] = job
  end
  runs[name] = run
  return run
end

-- Takes the jobs of a lane of a heap that come before any other flow's.
local function serve_run(flows, name, lane, start, rival)
  local shift, at_once = weight(lane), rival and 16 or 250
  local run, finish, taken = runs[name] or read_on(name, at_once), start, #ids - sorted_again
  local first = run.taken
  local at, is_due = first, true
  while is_due do
    if not run[at + 1] and not run.is_whole then
      read_on(name, at_once)
    end
    if not run[at + 1] then
      break
    end
    local id, cost = run[at + 1]:match('^(%S+) (%d+)')
    cost = math.max(1, tonumber(cost))
    at = at + 1
    ids[sorted_again + taken + at - first] = id
    bytes = bytes - cost
    virtual_time, finish = finish, finish + cost / shift
    is_due = taken + at - first < most and bytes > 0
      and (not rival or finish < rival.tag or (finish == rival.tag and lane.flow <= rival.name))
  end
  run.taken = at
  if was_limited(name) then
    waited_for_limits[lane.type] = (waited_for_limits[lane.type] or 0) + at - first
  end
  finishes[lane.flow] = at > first and finish or finishes[lane.flow]
  if not run[at + 1] and not run.is_whole then
    read_on(name, at_once)
  end
  if run[at + 1] then
    move_first(flows, finish)
  else
    move_first(flows)
    close_lane(name)
  end
end

-- Takes the jobs of runs out of their lanes.
local function end_runs()
  for name, run in pairs(runs) do
    local lane, first = read_lane(name), run[run.taken + 1]
    redis.call('LTRIM', lane.jobs, run.taken, -1)
    left_by_lane[name] = (left_by_lane[name] or 0) - run.taken
    arrivals[name] = first and arrival(first)
    if any_late() then
      for i = 1, run.taken do
        forget_late(run[i]:match('^%S+'))
      end
    end
    if not first and (has_limited or any_late()) then
      forget_lane(name)
    end
  end
  for flows in pairs(heaps) do
    store_tags(flows)
  end
end

local function serve(name, lane, start, superseded)
  local counts = was_limited(name)
  local jobs, first = take_out(name, 1)
  local finish = start
  if jobs[1] and superseded then
    ids[#ids + 1] = jobs[1]:match('^%S+')
  elseif jobs[1] then
    local id, cost = jobs[1]:match('^(%S+) (%d+)')
    ids[#ids + 1] = id
    bytes = bytes - tonumber(cost)
    use_limits(lane, id)
    finish = start + math.max(1, tonumber(cost)) / weight(lane)
    finishes[lane.flow] = finish
    virtual_time = start
    if counts then
      waited_for_limits[lane.type] = (waited_for_limits[lane.type] or 0) + 1
    end
  end
  if not first then
    close_lane(name)
  elseif lane.lanes then
    redis.call('ZADD', lane.lanes, arrivals[name], name)
  end
  if first or lane.lanes then
    redis.call('ZADD', lane.flows, 'XX', tag(finish), lane.flow)
  end
  wake_others(lane)
end

local function has_superseded_job(lane)
  local first = lane.series and redis.call('LINDEX', lane.jobs, 0)
  return first and is_superseded(lane.series, first:match('^%S+'))
end

local taken = 0
while taken < most and bytes > 0 and looks > 0 do
  local flows = next_flows()
  if not flows then
    break
  end
  local type, kind = types[flows], kinds[flows]
  local flow, start = heads[flows].name, math.max(heads[flows].tag, now_virtual())
  local finish = finish_of(flow)
  local name = #type .. '/' .. type .. '/' .. flow
  if is_limited[type] or kind == '/series_' then
    name = redis.call('ZRANGE', ready .. kind .. 'lanes/' .. name, 0, 0)[1]
  end
  if not name then
    redis.call('ZREM', flows, flow)
    looks = looks - 1
  elseif finish > start then -- it was served in another type
    if heaps[flows] then
      move_first(flows, finish)
    else
      redis.call('ZADD', flows, tag(finish), flow)
    end
    looks = looks - 1
  elseif heaps[flows] then
    serve_run(flows, name, read_lane(name), start, rival_of(flows))
    taken = #ids - sorted_again
  else
    local lane = read_lane(name)
    local superseded = has_superseded_job(lane)
    local key, at
    if not superseded then
      key, at = blocked_by(lane)
    end
    if key then
      close_lane(name)
      redis.call('ZADD', ready .. '/parked/' .. key, tag(start), name)
      if limits[key:match('^[^=]*')] and key:sub(1, 1) ~= '~' then
        redis.call('SADD', ready .. '/limited', name)
        limited_lanes[name], has_limited = true, true
      end
      if at then
        redis.call('ZADD', ready .. '/timers', at, key)
      end
      wake_others(lane, key)
      looks = looks - 1
    else
      serve(name, lane, start, superseded)
      taken = #ids - sorted_again
    end
  end
  look(flows)
end

end_runs()
for name, number in pairs(left_by_lane) do
  if number == 0 then
    left_by_lane[name] = nil
  end
  if arrivals[name] then
    redis.call('ZADD', ready .. '/heads', arrivals[name], name)
  else
    redis.call('ZREM', ready .. '/heads', name)
  end
end
local waiting = count_jobs(left_by_lane)
if waiting <= 0 then
  forget_all()
elseif virtual_time then
  redis.call('HSET', ready, 'v', tag(virtual_time))
  for flow, finish in pairs(finishes) do
    if finish > virtual_time then
      redis.call('ZADD', ready .. '/finish', tag(finish), flow)
    end
  end
  redis.call('ZREMRANGEBYSCORE', ready .. '/finish', '-inf', tag(virtual_time))
end

local due = redis.call('ZRANGE', ready .. '/timers', 0, 0, 'WITHSCORES')
local due_ms = #due > 0 and math.max(0, tonumber(due[2]) - now) or -1
local reply = { waiting, due_ms, sorted_again, {} }
for type, number in pairs(waited_for_limits) do
  table.insert(reply[4], type)
  table.insert(reply[4], number)
end
if #ids == 0 then
  return reply
end

-- The idle time is longer than any: entries that are pending already, for whichever consumer, are left alone.
local command = { KEYS[1], ARGV[1], ARGV[2], '1000000000000000', unpack(ids) }
for _, word in ipairs({ 'RETRYCOUNT', '1', 'FORCE' }) do
  command[#command + 1] = word
end
local data_by_id = {}
for _, entry in ipairs(redis.call('XCLAIM', unpack(command))) do
  data_by_id[entry[1]] = false
  for i = 1, #entry[2], 2 do
    if entry[2][i] == 'data' then
      data_by_id[entry[1]] = entry[2][i + 1]
    end
  end
end
local has_deaths, gone = redis.call('EXISTS', KEYS[3]) == 1, {}
for i, id in ipairs(ids) do
  if data_by_id[id] == nil then
    gone[#gone + 1] = id -- deleted from the stream while it waited
    if i <= sorted_again then
      reply[3] = reply[3] - 1
    end
  else
    reply[#reply + 1] = id
    reply[#reply + 1] = data_by_id[id]
    reply[#reply + 1] = has_deaths and redis.call('HGET', KEYS[3], id)
  end
end
release_slots(gone)
return reply
