-- Prelude of the scripts that cancel jobs, or that must not start one again which was cancelled (see lua.py), after
-- prelude_flow.lua. A pending entry that is cancelled is a field of the hash ready:<stream>/cancels:
--   entry id -> 1 if it becomes a dead letter, 0 if it is dropped
-- In the hash ready:<stream>/config, cancels grows with each new field, and cancelled counts removed jobs that waited.
local cancels, has_cancels = ready .. '/cancels', nil

-- Returns the field of an entry, or false.
local function cancelled(id)
  if has_cancels == nil then
    has_cancels = redis.call('EXISTS', cancels) == 1
  end
  return has_cancels and redis.call('HGET', cancels, id)
end
