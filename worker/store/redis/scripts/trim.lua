-- Drops the entries that every group of the stream has finished: read and acknowledged.
-- KEYS[1] stream
-- ARGV[1] about how many at most in one call
-- Returns how many were dropped. A stream without a group is left alone.

-- Ids are compared as text: a sequence has 64 bits and a Lua number holds 53.
local function less(a, b)
  local a_ms, a_seq = a:match('(%d+)-(%d+)')
  local b_ms, b_seq = b:match('(%d+)-(%d+)')
  if a_ms == b_ms then
    a_ms, b_ms = a_seq, b_seq
  end
  if #a_ms ~= #b_ms then
    return #a_ms < #b_ms
  end
  return a_ms < b_ms
end

local function following(id)
  local ms, seq = id:match('(%d+)-(%d+)')
  if #seq > 15 then
    return id -- too long to count up exactly; keeping one finished entry does no harm
  end
  return ms .. '-' .. string.format('%.0f', tonumber(seq) + 1)
end

local function first_kept(group)
  if group['pending'] > 0 then
    local lowest = redis.call('XPENDING', KEYS[1], group['name'])[2]
    -- Nothing pending lies beyond the last delivered, unless the group was set back by hand.
    local after = following(group['last-delivered-id'])
    return less(lowest, after) and lowest or after
  end
  return following(group['last-delivered-id'])
end

local keep
for _, flat in ipairs(redis.call('EXISTS', KEYS[1]) == 1 and redis.call('XINFO', 'GROUPS', KEYS[1]) or {}) do
  local group = {}
  for i = 1, #flat, 2 do
    group[flat[i]] = flat[i + 1]
  end
  local first = first_kept(group)
  if not keep or less(first, keep) then
    keep = first
  end
end
if not keep then
  return 0
end
-- Whole nodes first, for they go at once; the part of a node only when no whole one is left.
local dropped = redis.call('XTRIM', KEYS[1], 'MINID', '~', keep, 'LIMIT', ARGV[1])
if dropped == 0 then
  dropped = redis.call('XTRIM', KEYS[1], 'MINID', '=', keep)
end
return dropped
