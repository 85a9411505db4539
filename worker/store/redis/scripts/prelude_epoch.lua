-- Prelude of the scripts that act for a reader (see lua.py). It ends the script with an error, before any write, if the
-- reader no longer owns its name, and defines owned(id): is the entry pending for this consumer?
-- KEYS[1] stream  KEYS[2] fence hash
-- ARGV[1] group   ARGV[2] consumer   ARGV[3] the reader's epoch
-- Errors: UNFENCED, no epoch is stored (the data was flushed), or what is stored is none (see acquire.lua). OUTDATED, the stored epoch is older (the data is an
-- older snapshot). FENCED, the stored epoch is newer (another reader owns the name).
local epoch = redis.call('HGET', KEYS[2], ARGV[2])
if not epoch or not epoch:find('^%d+$') or tonumber(epoch) > 9e15 then
  return redis.error_reply('UNFENCED no service holds the name ' .. ARGV[2])
end
if tonumber(epoch) < tonumber(ARGV[3]) then
  return redis.error_reply('OUTDATED the data is older than the epoch of ' .. ARGV[2])
end
if epoch ~= ARGV[3] then
  return redis.error_reply('FENCED a newer reader holds the name ' .. ARGV[2])
end

-- Pending rows are fetched in windows that begin at the requested id. With sorted ids one ranged call answers for
-- many, at less than half the cost of one call each. The window grows while its rows are used and shrinks to one row
-- where the ids lie far apart. Unsorted ids cost more calls, never a wrong answer.
local own, rows_fetched, rows_used = {}, 0, 0
local window = math.max(1, math.min(64, #ARGV - 3))

local function owned(id)
  if own[id] == nil then
    if rows_used * 2 < rows_fetched then
      window = math.max(1, math.floor(window / 2))
    elseif rows_fetched > 0 then
      window = math.min(1024, window * 2)
    end
    local rows = redis.call('XPENDING', KEYS[1], ARGV[1], id, '+', window, ARGV[2])
    for i = 1, #rows do
      own[rows[i][1]] = true
    end
    rows_fetched, rows_used = #rows, 0
    if not own[id] then
      own[id] = false
    end
  end
  if own[id] then
    rows_used = rows_used + 1
  end
  return own[id]
end

