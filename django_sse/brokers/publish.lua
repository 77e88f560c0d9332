-- Publishes one event on a channel with history: count, keep and PUBLISH are one step.
--
-- KEYS: meta (hash: epoch, offset, check), log (stream), and, if the event has a key of its own, that key's place
-- ARGV: channel, payload (a JSON list of name and data), size (events), ttl (seconds)
-- Returns epoch, offset and check of the event: of the earlier one, if one with that key is still in the history.
local meta, log, key = KEYS[1], KEYS[2], KEYS[3]
local channel, payload, size, ttl = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
if not (size and size >= 1 and ttl and ttl >= 1) then
  return redis.error_reply('ERR size and ttl must be 1 or more')
end
if string.sub(payload, 1, 1) ~= '[' or string.sub(payload, -1) ~= ']' then
  return redis.error_reply('ERR the payload must be a JSON list of name and data')
end
local now = redis.call('TIME')
local microseconds = now[1] * 1000000 + now[2]
local known = redis.call('HMGET', meta, 'epoch', 'offset', 'check')
local epoch, offset = tonumber(known[1]), tonumber(known[2])
if not epoch then
  epoch, offset = microseconds % 4294967296, 0
  redis.call('DEL', log)  -- of an epoch whose count is lost
end
if key then
  local before = redis.call('HMGET', key, 'epoch', 'offset', 'check')
  if tonumber(before[1]) == epoch and tonumber(before[2]) > offset - size and tonumber(before[2]) <= offset then
    return {epoch, tonumber(before[2]), tonumber(before[3])}
  end
end
if offset > 0 and redis.call('EXISTS', log) == 0 then
  -- Those before have expired. Who had seen the last of them has missed nothing but this event.
  redis.call('XADD', log, string.format('%.0f', offset) .. '-' .. known[3], 'payload', '')
end
offset = offset + 1
local check = microseconds % 16777216
local position = string.format('"epoch":%.0f,"offset":%.0f,"check":%.0f', epoch, offset, check)
redis.call('HSET', meta, 'epoch', string.format('%.0f', epoch), 'offset', string.format('%.0f', offset), 'check', check)
redis.call('EXPIRE', meta, math.max(ttl, 2592000))
-- One more than can be missed: it tells whether who was there is still in the same history.
redis.call('XADD', log, 'MAXLEN', '=', size + 1, string.format('%.0f-%.0f', offset, check), 'payload', payload)
redis.call('EXPIRE', log, ttl)
if key then
  redis.call('HSET', key, 'epoch', string.format('%.0f', epoch), 'offset', string.format('%.0f', offset), 'check', check)
  redis.call('EXPIRE', key, ttl)
end
redis.call('PUBLISH', channel, string.sub(payload, 1, -2) .. ',{' .. position .. '}]')
return {epoch, offset, check}
