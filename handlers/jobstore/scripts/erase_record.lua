-- Records the tombstones of a deletion, renews its lease, and returns the writes that are admitted.
-- Called by RedisFence.record. Atomic: a write is either in the answer, or its admission sees the tombstones.
-- KEYS[1] writers hash  KEYS[2] attempts hash  KEYS[3] erased ZSET (tombstones)  KEYS[4] erasing hash
-- ARGV[1] owner: the job   ARGV[2] time of the deletion in us   ARGV[3] lifetime of tombstones in ms
-- ARGV[4] lease in ms   ARGV[5] 1: admit no newer work of the scopes   ARGV[6...] names of the scopes
-- Returns {'busy'} if another deletion has one of the scopes, or {'in', token, creation in us, ...}.
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local lease = tonumber(ARGV[4])
for i = 6, #ARGV do
  local running = redis.call('HGET', KEYS[4], ARGV[i])
  if running then
    local till, owner = running:match('^(%d+) %d (.*)$')
    if owner ~= ARGV[1] and tonumber(till) > now then
      return {'busy'}
    end
  end
end

-- An earlier attempt of this deletion may have died while it deleted.
local before = redis.call('HGET', KEYS[2], ARGV[1])
if before then
  redis.call('HDEL', KEYS[1], before:match('^%S+'))
  redis.call('HDEL', KEYS[2], ARGV[1])
end

local till = string.format('%d', now + lease)
for i = 6, #ARGV do
  redis.call('ZADD', KEYS[3], 'GT', ARGV[2], ARGV[i])
  redis.call('HSET', KEYS[4], ARGV[i], till .. ' ' .. ARGV[5] .. ' ' .. ARGV[1])
end
redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', string.format('(%d', (now - tonumber(ARGV[3])) * 1000))
redis.call('PEXPIRE', KEYS[3], ARGV[3])
redis.call('PEXPIRE', KEYS[4], lease)

local created = {}
local attempts = redis.call('HGETALL', KEYS[2])
for i = 2, #attempts, 2 do
  local token, at = attempts[i]:match('^(%S+) (%d+)$')
  if token then
    created[token] = at
  end
end
local reply = {'in'}
local writers = redis.call('HGETALL', KEYS[1])
for i = 1, #writers, 2 do
  if tonumber(writers[i + 1]) > now then
    reply[#reply + 1] = writers[i]
    reply[#reply + 1] = created[writers[i]] or '0'
  end
end
return reply
