-- KEYS: value, version counter, index. ARGV: name in the index, expected version or '', value, milliseconds or '',
-- what stands before a name in its value's key. The new version, or nothing.
local version = redis.call('HGET', KEYS[1], 'version') or ''
if version ~= ARGV[2] then
  return false
end
-- A Redis that lost its data starts above all versions that it gave before: they count microseconds at most.
if redis.call('EXISTS', KEYS[2]) == 0 then
  local now = redis.call('TIME')
  redis.call('SET', KEYS[2], string.format('%.0f', now[1] * 1000000 + now[2]))
end
redis.call('INCR', KEYS[2])
local next = redis.call('GET', KEYS[2])
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
