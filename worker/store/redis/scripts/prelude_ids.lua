-- Prelude of the scripts that compare entry ids (see lua.py).

-- Ids are compared as text: a sequence has 64 bits and a Lua number holds 53.
local function less(a, b)
  local a_ms, a_seq = a:match('(%d+)-(%d+)')
  local b_ms, b_seq = b:match('(%d+)-(%d+)')
  if a_ms == b_ms then
    a_ms, b_ms = a_seq, b_seq
  end
  if #a_ms ~= #b_ms then
    return #a_ms < #b_ms
  end
  return a_ms < b_ms
end

