-- Takes new entries of a stream for the move into its shards, or returns again those that are not moved yet.
-- Called by RedisForwardStore.forward_take, after the preludes info and ids.
-- Atomic: an entry is taken for the move or delivered to
-- a reader of the group, never both.
-- KEYS[1] stream  KEYS[2] shards hash of the stream: shards, and the number of the last entry that was taken (taken) and
-- that was moved (moved); shards_of/<number> for each number of shards that was ever used; mover and until (ms): who moves
-- ARGV[1] group   ARGV[2] caller   ARGV[3] ms for which no other moves   ARGV[4] number of shards
-- ARGV[5] most entries   ARGV[6] bytes after which to stop
-- Returns {} while another moves; else {number of shards, id of the last entry that was taken, {id, fields, id, fields, ...}}.
-- The entries are always the oldest that are not moved. So a shard gets the entries of a stream in order, and the id of the
-- last one tells which it has (forward_add.lua), also if two callers move at once.
local clock = redis.call('TIME')
local now_ms = tonumber(clock[1]) * 1000 + math.floor(tonumber(clock[2]) / 1000)
local longest_ms = 60000

local mover, until_ms, shards, taken, moved = unpack(
  redis.call('HMGET', KEYS[2], 'mover', 'until', 'shards', 'taken', 'moved'))
local left_ms = (tonumber(until_ms) or 0) - now_ms
if mover and mover ~= ARGV[2] and left_ms > 0 and left_ms <= longest_ms then
  return {}
end

local group
for _, facts in ipairs(groups_of(KEYS[1])) do
  if facts['name'] == ARGV[1] then
    group = facts
  end
end
if not group then
  return {} -- a reader creates it when it starts
end

-- The entries after an id, up to another one, within the caller's limits; and the id of the last one.
local function entries_after(after, upto)
  local found, last, bytes = {}, after, 0
  while #found < 2 * tonumber(ARGV[5]) and bytes < tonumber(ARGV[6]) do
    -- Sixteen at a time: entries may be megabytes, and a page is held in the script's memory.
    local count = math.min(16, tonumber(ARGV[5]) - #found / 2)
    local page = redis.call('XRANGE', KEYS[1], '(' .. last, upto, 'COUNT', count)
    if #page == 0 then
      break
    end
    for _, entry in ipairs(page) do
      found[#found + 1], found[#found + 2] = entry[1], entry[2]
      for _, part in ipairs(entry[2]) do
        bytes = bytes + #part
      end
      last = entry[1]
    end
  end
  return found, last
end

local is_id = '^%d+%-%d+$'
taken = taken and taken:find(is_id) and taken or '0-0'
moved = moved and moved:find(is_id) and moved or taken
local entries = {}
if less(moved, taken) then
  -- By the number of shards that they were taken with: some may be in their shards already.
  entries = entries_after(moved, taken)
end
if #entries == 0 then
  -- What readers of the group took since, such as those of services without shards, is theirs.
  local last_delivered = group['last-delivered-id']
  moved = less(taken, last_delivered) and last_delivered or taken
  shards = ARGV[4]
  entries, taken = entries_after(moved, '+')
  if #entries > 0 then
    local set = { 'SETID', KEYS[1], ARGV[1], taken }
    if group['entries-read'] then
      set[#set + 1] = 'ENTRIESREAD'
      set[#set + 1] = group['entries-read'] + #entries / 2
    end
    redis.call('XGROUP', unpack(set))
  end
end
redis.call('HSET', KEYS[2], 'mover', ARGV[2], 'until', string.format('%.0f', now_ms + tonumber(ARGV[3])),
  'shards', shards, 'taken', taken, 'moved', moved, 'shards_of/' .. shards, 1)
return { tonumber(shards), taken, entries }
