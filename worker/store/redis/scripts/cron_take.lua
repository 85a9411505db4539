-- Takes one tick of a cron table and appends its job to the stream.
-- Called by RedisCronStore.cron_take. Atomic: a tick is taken together with its job, and once, whichever hosts try.
-- KEYS[1] stream   KEYS[2] cron hash (see cron_publish.lua)
-- ARGV[1] version of the tables that the tick was computed from   ARGV[2] name   ARGV[3] tick, unix seconds
-- ARGV[4] id of the job   ARGV[5] job; empty: the tick is dropped
-- Returns a number of `Taken` in worker/store/cron.py, and the last tick of the table.
local DONE, LATE, OUTDATED, PAUSED, EARLY = 1, 2, 3, 4, 5
local name, tick = ARGV[2], tonumber(ARGV[3])
local last = tonumber(redis.call('HGET', KEYS[2], 'last/' .. name) or nil)

if redis.call('HGET', KEYS[2], 'version') ~= ARGV[1] or not last then
  return { OUTDATED, 0 }
end
if tick <= last then
  return { LATE, last }
end
if tick > tonumber(redis.call('TIME')[1]) then
  return { EARLY, last }
end

local outcome = DONE
if redis.call('HEXISTS', KEYS[2], 'paused/' .. name) == 1 then
  outcome = PAUSED
elseif ARGV[5] ~= '' then
  -- First: if the stream takes no entry, the tick stays due.
  local entry = redis.call('XADD', KEYS[1], '*', 'data', ARGV[5])
  redis.call('HSET', KEYS[2], 'ran/' .. name, ARGV[3] .. ' ' .. entry .. ' ' .. ARGV[4])
end
redis.call('HSET', KEYS[2], 'last/' .. name, ARGV[3])
return { outcome, tick }
