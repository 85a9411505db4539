-- Settles entries: acknowledges each and, in the same step, schedules a retry, adds a dead letter or puts it back to wait.
-- Called by RedisReaderStore.settle, after prelude_epoch.lua, prelude_flow.lua, prelude_conditions.lua, prelude_batch.lua,
-- prelude_cancel.lua and prelude_results.lua. Atomic: a job is never in two places or in none, its slots are free, its batch
-- counts it and its result is kept when it has ended, and a reader that lost an entry changes nothing.
-- KEYS[1] stream  KEYS[2] fence hash  KEYS[3] retry ZSET  KEYS[4] dead-letter stream  KEYS[5] deaths hash
-- KEYS[6] ready hash
-- ARGV[1] group   ARGV[2] consumer   ARGV[3] epoch
-- ARGV[4] the ids done, as one list in msgpack   ARGV[5] number of retries   ARGV[6] number of dead
-- ARGV[7] 1 if no other consumer can have taken an id that is done; then refusals of these are not looked for
-- ARGV[8] version of the limits by which lanes were chosen
-- ARGV[9...] (id, delay in s, job) for each retry, then for each dead (id, letter, bucket of its
-- idempotency key or '', key, first entry): an entry with an empty letter ends without one, and the key is free again; then
-- for each job that waits (id, lane, cost, key, ms): it is the first of its lane again, and the key waits; then
-- the results (see prelude_results.lua)
-- Returns the ids that were refused because they were not pending for this consumer. An id behind '!' and a digit is still
-- pending: it was cancelled, so it is neither retried nor put back; the digit is its field of the hash of cancels.
local done, retries, dead = cmsgpack.unpack(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local refused, at = {}, 9
local ended = {}

local function acknowledge(id)
  redis.call('XACK', KEYS[1], ARGV[1], id)
  redis.call('HDEL', KEYS[5], id)
  own[id] = false
  ended[#ended + 1] = id
end

-- While jobs wait in lanes, trimming cannot pass their entries, so entries that ended are deleted here: unless another
-- group may still need them.
local function finish(ids)
  release_slots(ids)
  if #ids > 0 and redis.call('EXISTS', ready) == 1 and #redis.call('XINFO', 'GROUPS', KEYS[1]) == 1 then
    redis.call('XDEL', KEYS[1], unpack(ids))
  end
end

-- Two jobs may be equal byte for byte, but a ZSET has each member once. JSON may end in blanks, so the second job ends
-- in its entry id, which is unique, encoded in spaces and tabs.
local function blanks(id)
  return (id:gsub('.', function(char)
    local bits, code = '', char:byte()
    for _ = 1, 6 do
      bits = bits .. (code % 2 == 0 and ' ' or '\t')
      code = math.floor(code / 2)
    end
    return bits
  end))
end

local function schedule(due, id, job)
  if redis.call('ZADD', KEYS[3], 'NX', due, job) == 0 then
    redis.call('ZADD', KEYS[3], due, job .. blanks(id))
  end
end

-- A key of another type ends the script here, before any write.
redis.call('HLEN', KEYS[5])
redis.call('HLEN', ready)
local has_batches = check_batches()

-- Commands that may fail with OOM come first, and each entry is finished before the next begins:
-- a script that fails has settled some entries wholly and left the others as they were.
local now = 0
if retries > 0 then
  local time = redis.call('TIME')
  now = tonumber(time[1]) + tonumber(time[2]) / 1e6
end
for _ = 1, retries do
  local id = ARGV[at]
  local flag = owned(id) and cancelled(id)
  if flag then
    refused[#refused + 1] = '!' .. flag .. id
  elseif owned(id) then
    schedule(string.format('%.6f', now + tonumber(ARGV[at + 1])), id, ARGV[at + 2])
    acknowledge(id)
    leave_batches({ id })
  else
    refused[#refused + 1] = id
  end
  at = at + 3
end
for _ = 1, dead do
  local id = ARGV[at]
  if owned(id) then
    if ARGV[at + 1] ~= '' then
      redis.call('XADD', KEYS[4], '*', 'data', ARGV[at + 1])
    end
    if ARGV[at + 2] ~= '' then
      free_unique(ARGV[at + 2], ARGV[at + 3], ARGV[at + 4])
    end
    keep_result(id)
    acknowledge(id)
    leave_batches({ id }, 'dead')
  else
    refused[#refused + 1] = id
  end
  at = at + 5
end

for _, id in ipairs(succeeded) do
  if owned(id) then
    keep_result(id)
    acknowledge(id)
    leave_batches({ id }, 'done')
  else
    refused[#refused + 1] = id
  end
end

while at <= #ARGV do
  local id, key, ms = ARGV[at], ARGV[at + 3], tonumber(ARGV[at + 4])
  local flag = owned(id) and cancelled(id)
  if flag then
    refused[#refused + 1] = '!' .. flag .. id
  elseif owned(id) then
    put_jobs(ARGV[at + 1], { id .. ' ' .. ARGV[at + 2] }, true, ARGV[8])
    count_jobs({ [ARGV[at + 1]] = 1 })
    redis.call('XACK', KEYS[1], ARGV[1], id)
    own[id] = false
    leave_batches({ id })
    wait_for(key, read_lane(ARGV[at + 1]).type, ms)
    release_slots({ id })
  else
    refused[#refused + 1] = id
  end
  at = at + 5
end
finish(ended)

-- If no other consumer owns entries in this group, all pending ones are ours: no id has to be looked up.
local function is_only_owner()
  local owners = redis.call('XPENDING', KEYS[1], ARGV[1])[4]
  return owners and #owners == 1 and owners[1][1] == ARGV[2]
end

if #done > 0 and is_only_owner() then
  local acknowledged
  if ARGV[7] == '1' then
    redis.call('XACK', KEYS[1], ARGV[1], unpack(done))
  else
    -- One by one, because the number of acknowledged ids does not tell which were not pending any more.
    acknowledged = {}
    for _, id in ipairs(done) do
      local is_ours = redis.call('XACK', KEYS[1], ARGV[1], id) == 1
      local list = is_ours and acknowledged or refused
      list[#list + 1] = id
    end
  end
  if redis.call('EXISTS', KEYS[5]) == 1 then
    redis.call('HDEL', KEYS[5], unpack(done))
  end
  if has_batches then
    leave_batches(acknowledged or done, 'done')
  end
  if redis.call('EXISTS', ready, ready .. '/slots') > 0 then
    finish(acknowledged or done)
  end
  return refused
end
local finished = {}
for _, id in ipairs(done) do
  if owned(id) then
    finished[#finished + 1] = id
    own[id] = false
  else
    refused[#refused + 1] = id
  end
end
if #finished > 0 then
  redis.call('XACK', KEYS[1], ARGV[1], unpack(finished))
  if redis.call('EXISTS', KEYS[5]) == 1 then
    redis.call('HDEL', KEYS[5], unpack(finished))
  end
  leave_batches(finished, 'done')
  finish(finished)
end
return refused
