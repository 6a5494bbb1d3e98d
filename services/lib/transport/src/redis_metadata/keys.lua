-- KEYS: index. ARGV: first name and end, as ZRANGEBYLEX wants them, how many at most, what stands before a name in its
-- value's key. Where the next page starts ('' at the end), and the names of this page whose keys are there.
local names = redis.call('ZRANGEBYLEX', KEYS[1], ARGV[1], ARGV[2], 'LIMIT', 0, ARGV[3])
local live = {}
for _, name in ipairs(names) do
  if redis.call('EXISTS', ARGV[4] .. name) == 1 then
    live[#live + 1] = name
  else
    redis.call('ZREM', KEYS[1], name)
  end
end
local is_full = #names == tonumber(ARGV[3])
return { is_full and '(' .. names[#names] or '', live }
