-- Gives entries that were not started back to their stream: each is added again at its end, where an idle reader gets it
-- at once, and acknowledged under its old id.
-- Called by RedisReaderStore.hand_back, after prelude_epoch.lua and prelude_batch.lua. Atomic: a job is never in two places
-- or in none, and its batch knows it by one id.
-- KEYS[1] stream  KEYS[2] fence hash
-- ARGV[1] group   ARGV[2] consumer   ARGV[3] epoch   ARGV[4...] id and job of each entry
-- Returns how many entries it gave back.
check_batches()
local given = 0
for i = 4, #ARGV, 2 do
  local id = ARGV[i]
  if owned(id) then
    redis.call('XADD', KEYS[1], '*', 'data', ARGV[i + 1]) -- without memory it ends here: this entry stays as it is
    redis.call('XACK', KEYS[1], ARGV[1], id)
    leave_batches({ id }) -- the reader of the new entry registers it
    own[id] = false
    given = given + 1
  end
end
return given
