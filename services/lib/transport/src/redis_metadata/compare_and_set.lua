-- KEYS: value, version counter, index. ARGV: name in the index, expected version or '', value, milliseconds or '',
-- what stands before a name in its value's key. The new version, or nothing.
local version = redis.call('HGET', KEYS[1], 'version') or ''
if version ~= ARGV[2] then
  return false
end
-- Versions count microseconds: a Redis that lost its data, or went back to older data, is above all that it gave before.
local now = redis.call('TIME')
local last = tonumber(redis.call('GET', KEYS[2]) or '0')
local next = string.format('%.0f', math.max(last + 1, now[1] * 1000000 + now[2]))
redis.call('SET', KEYS[2], next)
redis.call('HSET', KEYS[1], 'value', ARGV[3], 'version', next)
if ARGV[4] == '' then
  redis.call('PERSIST', KEYS[1])
else
  redis.call('PEXPIRE', KEYS[1], ARGV[4])
end
redis.call('ZADD', KEYS[3], 0, ARGV[1])
-- Names of expired keys stay in the index until someone looks: for each new one, two are looked at.
if version == '' then
  for _, name in ipairs(redis.call('ZRANDMEMBER', KEYS[3], 2)) do
    if redis.call('EXISTS', ARGV[5] .. name) == 0 then
      redis.call('ZREM', KEYS[3], name)
    end
  end
end
return next
