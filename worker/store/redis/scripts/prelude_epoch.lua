-- Prepended to every script that acts for a reader; no script of its own.
-- KEYS[1] stream  KEYS[2] fence hash
-- ARGV[1] group   ARGV[2] consumer   ARGV[3] epoch that the reader was given
-- Ends the script with UNFENCED where no epoch is known (the data was flushed), with OUTDATED where the known epoch
-- is older than the caller's (the data is an older snapshot), and with FENCED where it is newer; defines owned(id):
-- pending for this very consumer?
local holder = redis.call('HGET', KEYS[2], ARGV[2])
if not holder then
  return redis.error_reply('UNFENCED no service holds the name ' .. ARGV[2])
end
if tonumber(holder) < tonumber(ARGV[3]) then
  return redis.error_reply('OUTDATED the data is older than the epoch of ' .. ARGV[2])
end
if holder ~= ARGV[3] then
  return redis.error_reply('FENCED a newer reader holds the name ' .. ARGV[2])
end

-- Pending rows are fetched a window at a time from the id asked for: with ids in order one ranged call
-- answers many, which costs less than half of a call for each. The window grows while its rows are used
-- and shrinks to one row where the ids lie far apart. Wrong order costs calls, never a wrong answer.
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

