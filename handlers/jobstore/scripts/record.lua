-- Stores a versioned record unless a newer version of the same chapter is stored.
-- Called by RedisRecords.put. Atomic: an older version must not replace a newer one that is stored meanwhile.
-- KEYS[1] hash
-- ARGV[1] owner, empty where the key's name is unambiguous   ARGV[2] chapter version   ARGV[3] time of the change
-- ARGV[4] creation of the job in us   ARGV[5...] field, value, field, value, ...; the field `chapter_id` names the chapter of the version
-- Returns {'foreign'}, or {'stored' | 'same' | 'older', field, value, ...} with the record that is stored now.
local has, new = {}, {}
local flat = redis.call('HGETALL', KEYS[1])
for i = 1, #flat, 2 do
  has[flat[i]] = flat[i + 1]
end
for i = 5, #ARGV, 2 do
  new[ARGV[i]] = ARGV[i + 1]
end

-- Versions have 64 bits and Lua numbers 53: decimals are compared as text.
local function version(text)
  return text and text:match('^%-?%d+$') or '0'
end
local function less(a, b)
  local a_negative, b_negative = a:sub(1, 1) == '-', b:sub(1, 1) == '-'
  if a_negative ~= b_negative then
    return a_negative
  elseif a_negative then
    a, b = b, a
  end
  if #a ~= #b then
    return #a < #b
  end
  return a < b
end

local function answer(verdict, fields)
  return {verdict, unpack(fields)}
end

if #flat > 0 then
  if (has.owner or '') ~= ARGV[1] then
    return {'foreign'}
  end
  local stored = version(has.chapter_version)
  if (has.chapter_id or '') == (new.chapter_id or '') and less(ARGV[2], stored) then
    return answer('older', flat)
  end
  local same = stored == ARGV[2]
  for field, value in pairs(new) do
    same = same and has[field] == value
  end
  if same then
    -- A deletion that an older job precedes must leave what a newer job stored as well.
    if tonumber(ARGV[4]) > (tonumber(has.created_us) or 0) then
      redis.call('HSET', KEYS[1], 'created_us', ARGV[4])
    end
    return answer('same', redis.call('HGETALL', KEYS[1]))
  end
  redis.call('DEL', KEYS[1])
end

redis.call('HSET', KEYS[1], 'chapter_version', ARGV[2], 'updated_at', ARGV[3], unpack(ARGV, 5))
if ARGV[4] ~= '0' then
  redis.call('HSET', KEYS[1], 'created_us', ARGV[4])
end
if ARGV[1] ~= '' then
  redis.call('HSET', KEYS[1], 'owner', ARGV[1])
end
return answer('stored', redis.call('HGETALL', KEYS[1]))
