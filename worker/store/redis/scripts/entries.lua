-- Fetches the data of entries by id, as many as a byte budget allows.
-- Called by RedisReaderStore.fetch. It need not be atomic: it is a script because the reader looks up thousands of
-- entries after a worker's death, and a pipeline of XRANGE has no bound in bytes.
-- KEYS[1] stream
-- ARGV[1] bytes after which to stop   ARGV[2...] ids
-- Returns the number of ids looked up, then id and data (nil: no data field) of each entry that exists. It looks up
-- at least one id, however large the entry is. The caller asks again for the rest.
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
