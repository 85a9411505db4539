-- What scripts ask XINFO. Prepended to the scripts that do.

-- The rows of a reply of XINFO GROUPS or CONSUMERS, by the names of their fields.
local function facts_of(reply)
  local found = {}
  for _, flat in ipairs(reply) do
    local facts = {}
    for i = 1, #flat, 2 do
      facts[flat[i]] = flat[i + 1]
    end
    table.insert(found, facts)
  end
  return found
end

-- The consumer groups of a stream; none if the stream does not exist.
local function groups_of(stream)
  return redis.call('EXISTS', stream) == 1 and facts_of(redis.call('XINFO', 'GROUPS', stream)) or {}
end

