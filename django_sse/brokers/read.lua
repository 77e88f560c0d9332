-- Reads what is kept of a channel with history, from the latest event back. Begins the channel's epoch if it has none.
--
-- KEYS: meta (hash: epoch, offset, check), log (stream)
-- ARGV: the highest and the lowest offset that are wanted, bytes after which to stop, ttl (seconds)
-- Returns epoch, offset and check of the latest event (offset 0: there was none), and a list of stream entry IDs
-- (offset-check) and payloads in turn, latest first.
local meta, log = KEYS[1], KEYS[2]
local high, low, room, ttl = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local known = redis.call('HMGET', meta, 'epoch', 'offset', 'check')
local epoch, offset, check = tonumber(known[1]), tonumber(known[2]), tonumber(known[3])
if not epoch then
  local now = redis.call('TIME')
  epoch, offset, check = (now[1] * 1000000 + now[2]) % 4294967296, 0, 0
  redis.call('DEL', log)
  redis.call('HSET', meta, 'epoch', string.format('%.0f', epoch), 'offset', 0, 'check', 0)
end
redis.call('EXPIRE', meta, math.max(ttl, 2592000))
local found = {}
high = math.min(high, offset)
while room > 0 and high >= low and high > 0 do
  local page = redis.call('XREVRANGE', log, string.format('%.0f', high), string.format('%.0f', low), 'COUNT', 16)
  for _, entry in ipairs(page) do
    found[#found + 1] = entry[1]
    found[#found + 1] = entry[2][2]
    room = room - #entry[2][2]
    high = tonumber(string.match(entry[1], '^%d+')) - 1
    if room <= 0 then break end
  end
  if #page < 16 then break end
end
return {epoch, offset, check, found}
