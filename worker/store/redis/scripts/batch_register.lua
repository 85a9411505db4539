-- Records to which batches pending entries of the caller belong.
-- Called by RedisReaderStore.register_batches, after prelude_epoch.lua and prelude_batch.lua. Atomic: an entry that another
-- consumer has taken over may have ended, and would be counted again.
-- KEYS[1] stream  KEYS[2] fence hash
-- ARGV[1] group   ARGV[2] consumer   ARGV[3] epoch   ARGV[4...] id of the entry and id of the batch, for each entry
-- Returns the ids of batches that have no record: their jobs are not counted.
check_batches()
local known, unknown, fields = {}, {}, {}
for i = 4, #ARGV, 2 do
  local id, batch = ARGV[i], ARGV[i + 1]
  if known[batch] == nil then
    known[batch] = redis.call('TYPE', batch_key(batch)).ok == 'hash'
    if not known[batch] then
      unknown[#unknown + 1] = batch
    end
  end
  if known[batch] and owned(id) then
    fields[#fields + 1] = id
    fields[#fields + 1] = batch
  end
end
if #fields > 0 then
  redis.call('HSET', batches .. '/jobs', unpack(fields))
end
for batch, is_known in pairs(known) do
  if is_known then
    touch_batch(batch)
  end
end
return unknown
