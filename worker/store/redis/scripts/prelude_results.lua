-- Prelude of settle.lua (see lua.py): takes the results off the end of ARGV.
-- The last of ARGV is their number; if that is not 0, before it their lifetime in ms, and before that for each result:
-- entry id, key, record, and 1 if the job succeeded, 2 if it was dropped, else 0. The first two are in succeeded; others are
-- dead letters too. The job that a dropped one gave way to may have the same id, so its result stays.
local results, succeeded, lifetime_ms = {}, {}, nil
for number = tonumber(table.remove(ARGV)), 1, -1 do
  lifetime_ms = lifetime_ms or table.remove(ARGV)
  local kind, record, key, id = table.remove(ARGV), table.remove(ARGV), table.remove(ARGV), table.remove(ARGV)
  results[id] = { key, record, kind == '2' }
  if kind ~= '0' then
    table.insert(succeeded, 1, id)
  end
end

-- A result is kept in the step in which its job ends, so it exists exactly if the job has ended.
local function keep_result(id)
  local result = results[id]
  if result then
    local is_dropped = result[3]
    redis.call('SET', result[1], result[2], 'PX', lifetime_ms, unpack(is_dropped and { 'NX' } or {}))
  end
end
