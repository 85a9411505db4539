-- Deletes the entries that every group of the stream has read and acknowledged, and that neither wait in a lane
-- nor for their move into a shard.
-- Called by RedisReaperStore.trim, after the preludes info and ids. Atomic: no group may be created between
-- the comparison and the deletion.
-- KEYS[1] stream  KEYS[2] ready hash  KEYS[3] shards hash (see forward_take.lua)
-- ARGV[1] about how many at most in one call
-- Returns the number of deleted entries; 0 for a stream without a group.

local function following(id)
  local ms, seq = id:match('(%d+)-(%d+)')
  if #seq > 15 then
    return id -- too long to increment exactly; one finished entry may stay
  end
  return ms .. '-' .. string.format('%.0f', tonumber(seq) + 1)
end

local function first_needed(group)
  if group['pending'] > 0 then
    local lowest = redis.call('XPENDING', KEYS[1], group['name'])[2]
    -- No pending entry is newer than the last delivered one, unless the group was set back by hand.
    local after = following(group['last-delivered-id'])
    return less(lowest, after) and lowest or after
  end
  return following(group['last-delivered-id'])
end

local min_id
for _, group in ipairs(groups_of(KEYS[1])) do
  local first = first_needed(group)
  if not min_id or less(first, min_id) then
    min_id = first
  end
end
if not min_id then
  return 0
end
for _, part in ipairs({ '/heads', '/late' }) do
  local waiting = redis.call('ZRANGE', KEYS[2] .. part, 0, 0, 'WITHSCORES')[2]
  if waiting and less(string.format('%.0f-0', waiting), min_id) then
    min_id = string.format('%.0f-0', waiting)
  end
end
local moved, taken = unpack(redis.call('HMGET', KEYS[3], 'moved', 'taken'))
if moved and taken and less(moved, taken) and less(following(moved), min_id) then
  min_id = following(moved)
end
-- Whole nodes first, because they are freed at once; part of a node only when no whole one is left.
local dropped = redis.call('XTRIM', KEYS[1], 'MINID', '~', min_id, 'LIMIT', ARGV[1])
if dropped == 0 then
  dropped = redis.call('XTRIM', KEYS[1], 'MINID', '=', min_id)
end
return dropped
