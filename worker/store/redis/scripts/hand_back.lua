-- Gives entries that were not started back to their stream: each is added again at its end, where an idle reader gets it
-- at once, and acknowledged under its old id.
-- Called by RedisReaderStore.hand_back, after prelude_epoch.lua and prelude_batch.lua. Atomic: a job is never in two places
-- or in none, and its batch knows it by one id.
-- KEYS[1] stream  KEYS[2] fence hash
-- ARGV[1] group   ARGV[2] consumer   ARGV[3] epoch   ARGV[4] bytes of jobs after which it stops   ARGV[5...] ids
-- Returns how many of the ids it looked at, then how many entries it gave back.
check_batches()
local bytes_left, given, looked_at = tonumber(ARGV[4]), 0, 0
for i = 5, #ARGV do
  local id = ARGV[i]
  looked_at = looked_at + 1
  if owned(id) then
    local entry = redis.call('XRANGE', KEYS[1], id, id)[1]
    if entry then
      redis.call('XADD', KEYS[1], '*', unpack(entry[2])) -- without memory it ends here: this entry stays as it is
      for _, part in ipairs(entry[2]) do
        bytes_left = bytes_left - #part
      end
      given = given + 1
    end
    redis.call('XACK', KEYS[1], ARGV[1], id)
    leave_batches({ id }) -- the reader of the new entry registers it
    own[id] = false
  end
  if bytes_left <= 0 then
    break
  end
end
return { looked_at, given }
