-- Counts jobs as dead whose entry was not settled and is gone: it was deleted by hand, alone or with its stream.
-- Called by RedisReaperStore.mend_batches, after prelude_batch.lua. Atomic: an entry may end at any moment.
-- KEYS[1] stream  KEYS[2] ready hash (names the other keys)
-- ARGV[1] cursor   ARGV[2] about how many entries to look at
-- Returns the next cursor ('0': from the start) and the number of entries that were counted.
check_batches()
local page = redis.call('HSCAN', batches .. '/jobs', ARGV[1], 'COUNT', ARGV[2])
if #page[2] == 0 then
  return { page[1], 0 }
end
local groups = redis.call('EXISTS', KEYS[1]) == 1 and redis.call('XINFO', 'GROUPS', KEYS[1]) or {}
local gone = {}
for i = 1, #page[2], 2 do
  local id, is_pending = page[2][i], false
  for _, group in ipairs(groups) do
    local rows = redis.pcall('XPENDING', KEYS[1], group[2], id, id, 1)
    is_pending = is_pending or (not rows.err and #rows > 0)
  end
  -- If only the group was deleted, the entry is delivered again.
  local entries = is_pending and {} or redis.pcall('XRANGE', KEYS[1], id, id)
  if not is_pending and (entries.err or #entries == 0) then
    gone[#gone + 1] = id
  end
end
for first = 1, #gone, 1000 do
  leave_batches({ unpack(gone, first, math.min(#gone, first + 999)) }, 'dead')
end
return { page[1], #gone }
