-- Prelude of settle.lua (see lua.py): takes the results off the end of ARGV.
-- The last of ARGV is their number; if that is not 0, before it their lifetime in ms, and before that for each result:
-- entry id, key, record, 1 if the job succeeded. A job that succeeded is one of succeeded; others are dead letters too.
local results, succeeded, lifetime_ms = {}, {}, nil
for number = tonumber(table.remove(ARGV)), 1, -1 do
  lifetime_ms = lifetime_ms or table.remove(ARGV)
  local has_succeeded, record, key, id = table.remove(ARGV), table.remove(ARGV), table.remove(ARGV), table.remove(ARGV)
  results[id] = { key, record }
  if has_succeeded == '1' then
    table.insert(succeeded, 1, id)
  end
end

-- A result is kept in the step in which its job ends, so it exists exactly if the job has ended.
local function keep_result(id)
  local result = results[id]
  if result then
    redis.call('SET', result[1], result[2], 'PX', lifetime_ms)
  end
end
