-- Resets the idle time of entries that are still this consumer's; delivery counts do not change.
-- Called by RedisReaderStore.renew, after prelude_epoch.lua. Atomic: an entry that another consumer claimed meanwhile
-- must not change.
-- KEYS[1] stream  KEYS[2] fence hash
-- ARGV[1] group   ARGV[2] consumer   ARGV[3] epoch   ARGV[4...] ids
-- Returns the ids that are no longer this consumer's.
local renewed, lost = {}, {}
for i = 4, #ARGV do
  local id = ARGV[i]
  if owned(id) then
    renewed[#renewed + 1] = id
  else
    lost[#lost + 1] = id
  end
end
if #renewed > 0 then
  local command = { KEYS[1], ARGV[1], ARGV[2], 0, unpack(renewed) }
  command[#command + 1] = 'JUSTID'
  local existing = {}
  for _, id in ipairs(redis.call('XCLAIM', unpack(command))) do
    existing[id] = true
  end
  -- XCLAIM drops pending ids whose entry was deleted from the stream: nothing is left to lease.
  for _, id in ipairs(renewed) do
    if not existing[id] then
      lost[#lost + 1] = id
    end
  end
end
return lost
