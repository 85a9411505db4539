-- Sets how many workers have died under each entry that is still this consumer's.
-- Called by RedisReaderStore.set_deaths, after prelude_epoch.lua. Atomic: a reader that lost an entry must not change
-- its count. The count is set, not incremented, so a call whose reply was lost is safe to repeat.
-- KEYS[1] stream  KEYS[2] fence hash  KEYS[3] deaths hash
-- ARGV[1] group   ARGV[2] consumer   ARGV[3] epoch   ARGV[4...] id, deaths, id, deaths, ...
-- Returns the ids whose count was set.
local updated = {}
for i = 4, #ARGV, 2 do
  local id = ARGV[i]
  if owned(id) then
    updated[#updated + 1] = id
    redis.call('HSET', KEYS[3], id, ARGV[i + 1])
  end
end
return updated
