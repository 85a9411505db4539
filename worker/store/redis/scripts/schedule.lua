-- Puts a new job into the retry ZSET.
-- Called by RedisProducerStore.schedule. Atomic: the due time is the server's, and an equal job must not be replaced.
-- KEYS[1] retry ZSET
-- ARGV[1] delay in s   ARGV[2] job
-- Returns 1. JSON may end in blanks: they make the job distinct from an equal one that waits already.
local time = redis.call('TIME')
local due = string.format('%.6f', tonumber(time[1]) + tonumber(time[2]) / 1e6 + tonumber(ARGV[1]))
local job = ARGV[2]
while redis.call('ZADD', KEYS[1], 'NX', due, job) == 0 do
  job = job .. ' '
end
return 1
