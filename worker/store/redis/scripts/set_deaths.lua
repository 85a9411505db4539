-- Sets how many workers have died under each entry that is still this consumer's. A count is set, not
-- added to, so that a call whose answer was lost can be repeated.
-- KEYS[1] stream  KEYS[2] fence hash  KEYS[3] deaths hash
-- ARGV[1] group   ARGV[2] consumer   ARGV[3] epoch   ARGV[4...] id, deaths, id, deaths, ...
-- Returns the ids that were charged.
local charged = {}
for i = 4, #ARGV, 2 do
  local id = ARGV[i]
  if owned(id) then
    charged[#charged + 1] = id
    redis.call('HSET', KEYS[3], id, ARGV[i + 1])
  end
end
return charged
