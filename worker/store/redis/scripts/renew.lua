-- Resets the idle time of entries that are still this consumer's; delivery counts stay as they are.
-- KEYS[1] stream  KEYS[2] fence hash
-- ARGV[1] group   ARGV[2] consumer   ARGV[3] epoch   ARGV[4...] ids
-- Returns the ids that are not this consumer's any more.
local kept, lost = {}, {}
for i = 4, #ARGV do
  local id = ARGV[i]
  if owned(id) then
    kept[#kept + 1] = id
  else
    lost[#lost + 1] = id
  end
end
if #kept > 0 then
  local command = { KEYS[1], ARGV[1], ARGV[2], 0, unpack(kept) }
  command[#command + 1] = 'JUSTID'
  local found = {}
  for _, id in ipairs(redis.call('XCLAIM', unpack(command))) do
    found[id] = true
  end
  -- XCLAIM drops pending ids whose entry was deleted from the stream: nothing is left to lease.
  for _, id in ipairs(kept) do
    if not found[id] then
      lost[#lost + 1] = id
    end
  end
end
return lost
