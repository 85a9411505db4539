-- Moves pending entries of the caller into lanes: their bytes stay in the stream, their ids wait for a turn.
-- Called by RedisReaderStore.sort, after prelude_epoch.lua, prelude_flow.lua and prelude_batch.lua. Atomic: a job is pending
-- or in a lane, never in both or neither.
-- KEYS[1] stream  KEYS[2] fence hash  KEYS[3] ready hash
-- ARGV[1] group   ARGV[2] consumer   ARGV[3] epoch   ARGV[4] version of the limits by which the lanes were chosen
-- ARGV[5] lowest id   ARGV[6] highest id   ARGV[7] number of jobs
-- ARGV[8...] for each lane: its name, then id and cost in bytes of each job, as one list in msgpack: that takes the caller a
-- fraction of the time of as many arguments
-- Returns the ids that were not pending for this consumer.
check_batches()
local refused, added = {}, {}
redis.call('HINCRBY', ready, 'n', 0) -- without memory, or with a key of another type, it ends here
-- One look at all entries: lane by lane, their ids are in no order. Ids of unequal length would only cost more looks.
for _, row in ipairs(redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[5], ARGV[6], ARGV[7], ARGV[2])) do
  own[row[1]] = true
end
for at = 8, #ARGV, 2 do
  local name, waiting = ARGV[at], cmsgpack.unpack(ARGV[at + 1])
  local ids, jobs = {}, {}
  for i = 1, #waiting, 2 do
    local id = waiting[i]
    if owned(id) then
      ids[#ids + 1] = id
      jobs[#jobs + 1] = id .. ' ' .. waiting[i + 1]
      own[id] = false
    else
      refused[#refused + 1] = id
    end
  end
  if #ids > 0 then
    put_jobs(name, jobs, false, ARGV[4])
    added[name] = (added[name] or 0) + #jobs
    redis.call('XACK', KEYS[1], ARGV[1], unpack(ids))
    release_slots(ids)
    leave_batches(ids)
  end
end
if count_jobs(added) == 0 then
  redis.call('DEL', ready)
end
return refused
