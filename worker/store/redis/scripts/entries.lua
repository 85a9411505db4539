-- Fetches the job data of entries by id, as many as a byte budget allows.
-- Called by RedisReaderStore.bodies. One script, because one XRANGE for each of some thousand entries costs more.
-- KEYS[1] stream
-- ARGV[1] bytes after which to stop   ARGV[2...] ids
-- Returns how many ids were looked up, then id and data for each entry that exists (nil: it has no data field).
-- At least one id is looked up, however large its entry is. The caller asks again for the rest.
local left = tonumber(ARGV[1])
local reply = { 0 }
for i = 2, #ARGV do
  for _, entry in ipairs(redis.call('XRANGE', KEYS[1], ARGV[i], ARGV[i])) do
    local data = false
    for field = 1, #entry[2], 2 do
      if entry[2][field] == 'data' then
        data = entry[2][field + 1]
        break
      end
    end
    reply[#reply + 1] = entry[1]
    reply[#reply + 1] = data
    left = left - (data and #data or 0)
  end
  reply[1] = reply[1] + 1
  if left <= 0 then
    break
  end
end
return reply
