-- Prelude of the scripts that compare jobs with others (see lua.py), after prelude_flow.lua. Its keys begin with the name of
-- the ready hash and a slash, so all are in the stream's slot:
--   unique/<digest>   STRING: first entry of the job that took the idempotency key; expires with the window
--   newest/<series>   STRING 'first entry, entry, due time in s' of the newest job of a series (see conditions.py)
-- A job's first entry names it: retries and delayed jobs get new entries, and keep the id of the first one.

-- Ids are compared as text: a sequence has 64 bits and a Lua number holds 53.
local function is_older(a, b)
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

-- Takes an idempotency key for a job. Returns the first entry of another job that has it.
local function claim_unique(digest, first, window_ms)
  local owner = redis.call('SET', ready .. '/unique/' .. digest, first, 'NX', 'GET', 'PX', window_ms)
  return owner and owner ~= first and owner
end

local function free_unique(digest, first)
  local key = ready .. '/unique/' .. digest
  if redis.call('GET', key) == first then
    redis.call('DEL', key)
  end
end

local function newest_of(series)
  local record = redis.call('GET', ready .. '/newest/' .. series)
  if record then
    return record:match('^(%d+%-%d+) (%d+%-%d+) (%S+)$')
  end
end

-- Whether a newer job of the series than the one with this entry has been read.
local function is_superseded(series, id)
  local _, newest_id = newest_of(series)
  return newest_id and newest_id ~= id
end

