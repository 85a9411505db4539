-- Makes entries that are still this consumer's look long idle, so that the next take-over may have them.
-- KEYS[1] stream  KEYS[2] fence hash
-- ARGV[1] group   ARGV[2] consumer   ARGV[3] epoch   ARGV[4] idle time in ms   ARGV[5...] ids
-- Returns how many were released.
local command = { KEYS[1], ARGV[1], ARGV[2], 0 }
for i = 5, #ARGV do
  if owned(ARGV[i]) then
    command[#command + 1] = ARGV[i]
  end
end
local released = #command - 4
if released > 0 then
  command[#command + 1] = 'IDLE'
  command[#command + 1] = ARGV[4]
  command[#command + 1] = 'JUSTID'
  redis.call('XCLAIM', unpack(command))
end
return released
