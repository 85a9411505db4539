-- Frees slots whose entry is no longer pending: it was deleted from the stream, or its group or consumer was.
-- Called by RedisReaperStore.mend_slots, after prelude_flow.lua. Atomic: an entry may end or begin at any moment.
-- KEYS[1] stream  KEYS[2] ready hash
-- ARGV[1] group
-- Returns the number of entries whose slots were freed. The counts are made from the slots again.
if redis.call('EXISTS', ready .. '/slots', ready .. '/running') == 0 then
  return 0
end
local gone, counts = {}, {}
local held = redis.call('HGETALL', ready .. '/slots')
for i = 1, #held, 2 do
  local rows = redis.pcall('XPENDING', KEYS[1], ARGV[1], held[i], held[i], 1)
  if rows.err or #rows == 0 then
    gone[#gone + 1] = held[i]
  end
end
release_slots(gone)
held = redis.call('HVALS', ready .. '/slots')
for _, keys in ipairs(held) do
  for _, key in ipairs(cjson.decode(keys)) do
    counts[key] = (counts[key] or 0) + 1
  end
end
local running = redis.call('HGETALL', ready .. '/running')
redis.call('DEL', ready .. '/running')
for key, number in pairs(counts) do
  redis.call('HSET', ready .. '/running', key, number)
end
for i = 1, #running, 2 do
  if (counts[running[i]] or 0) < tonumber(running[i + 1]) then
    wake(running[i])
  end
end
return #gone
