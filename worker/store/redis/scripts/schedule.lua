-- Lets a new job wait in the retry ZSET.
-- KEYS[1] retry ZSET
-- ARGV[1] delay in s   ARGV[2] job
-- Returns 1. An equal job that waits already stays: JSON may end in blanks, which make this one distinct.
local time = redis.call('TIME')
local due = string.format('%.6f', tonumber(time[1]) + tonumber(time[2]) / 1e6 + tonumber(ARGV[1]))
local job = ARGV[2]
while redis.call('ZADD', KEYS[1], 'NX', due, job) == 0 do
  job = job .. ' '
end
return 1
