-- Moves due retries into the stream.
-- Called by RedisReaperStore.promote. Atomic: a job is in the retry ZSET or in the stream, never in both or neither.
-- KEYS[1] stream  KEYS[2] retry ZSET
-- ARGV[1] most jobs to move   ARGV[2] bytes after which to stop
-- Returns the number of moved jobs, and seconds until the next is due (nil: there is none).
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1e6
local left, bytes, moved = tonumber(ARGV[1]), tonumber(ARGV[2]), 0
local upto = string.format('%.6f', now)

while left > 0 and bytes > 0 do
  -- Sixteen at a time: members may be megabytes, and a page is held in the script's memory.
  local page = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', upto, 'LIMIT', 0, math.min(left, 16))
  if #page == 0 then
    break
  end
  for _, job in ipairs(page) do
    redis.call('XADD', KEYS[1], '*', 'data', job)
    redis.call('ZREM', KEYS[2], job)
    left, bytes, moved = left - 1, bytes - #job, moved + 1
  end
end

local next = redis.call('ZRANGE', KEYS[2], 0, 0, 'WITHSCORES')
if #next == 0 then
  return { moved, false }
end
return { moved, string.format('%.6f', math.max(0, tonumber(next[2]) - now)) }
