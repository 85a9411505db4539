-- Counts one more death against each entry that is still this consumer's.
-- KEYS[1] stream  KEYS[2] fence hash  KEYS[3] deaths hash
-- ARGV[1] group   ARGV[2] consumer   ARGV[3] epoch   ARGV[4...] ids
-- Returns id, deaths, id, deaths, ... of those charged.
local charged = {}
for i = 4, #ARGV do
  local id = ARGV[i]
  if owned(id) then
    charged[#charged + 1] = id
    charged[#charged + 1] = redis.call('HINCRBY', KEYS[3], id, 1)
  end
end
return charged
