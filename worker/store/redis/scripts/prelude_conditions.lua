-- Prelude of the scripts that compare jobs with others (see lua.py), after prelude_flow.lua. Its keys begin with the name of
-- the ready hash and a slash, so all are in the stream's slot:
--   unique/<window in ms>/<number>   HASH idempotency key -> first entry of the job that owns it: a bucket, for the jobs
--     that were sent within one window   unique   ZSET bucket -> time (ms) at which it is deleted
--   newest/<series>   STRING 'first entry, entry, due time in s' of the newest job of a series (see conditions.py)
-- A job's first entry names it: retries and delayed jobs get new entries, and keep the id of the first one.

local function unique_bucket(number)
  return ready .. '/unique/' .. number
end

local function free_unique(number, name, first)
  if redis.call('HGET', unique_bucket(number), name) == first then
    redis.call('HDEL', unique_bucket(number), name)
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

