-- KEYS: counter. ARGV: amount, milliseconds or ''. The sum, as text: Lua's numbers are exact to 2^53 only.
local is_new = redis.call('EXISTS', KEYS[1]) == 0
local sum = redis.pcall('INCRBY', KEYS[1], ARGV[1])
if type(sum) == 'table' and sum.err then
  if not string.find(sum.err, 'overflow') then
    return sum
  end
  local limit = string.sub(ARGV[1], 1, 1) == '-' and '-9223372036854775808' or '9223372036854775807'
  redis.call('SET', KEYS[1], limit, 'KEEPTTL')
end
if is_new and ARGV[2] ~= '' then
  redis.call('PEXPIRE', KEYS[1], ARGV[2])
end
return redis.call('GET', KEYS[1])
