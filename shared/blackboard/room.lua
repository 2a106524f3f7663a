-- Room on workers, as `admission.lua` deals with it: both files are one script.
--
-- KEYS   queue, parked, shares, pace (of a model), then room and promises of each worker that takes part.
-- ARGV   a command and its arguments, see the functions at the end of `admission.lua`.
--
-- A worker reports what it has (absolute numbers); a router adds promises, which count until the worker reports that their
-- request arrived, or lapse. A router that knows of plenty of room sends a request on its way first, and promises it then:
-- so its arrival may be reported, or it may be given back, before. Then its id is kept for a while without a promise, and
-- the promise is void when it comes.

local QUEUE, PARKED, SHARES, PACE = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local PROMISES_TTL_MS = 60000
local VOID_MS = 5000 -- no promise comes later than that behind its request

local clock = redis.call('TIME')
local NOW = clock[1] * 1000 + math.floor(clock[2] / 1000)

local function exact(number)
  return string.format('%.0f', number)
end

local function forget(room, promises, id)
  redis.call('ZREM', promises, id)
  local promise = redis.call('HGET', room, 'r:' .. id)
  if not promise then
    return false
  end
  local tokens, pages = string.match(promise, '(%d+) (%d+)')
  redis.call('HDEL', room, 'r:' .. id)
  redis.call('HINCRBY', room, 'promised_sequences', -1)
  redis.call('HINCRBY', room, 'promised_tokens', -tokens)
  redis.call('HINCRBY', room, 'promised_pages', -pages)
  return true
end

local function lapse(room, promises)
  local lapsed = false
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', promises, '-inf', NOW)) do
    lapsed = forget(room, promises, id) or lapsed
  end
  return lapsed
end

local function keys_of(number)
  return KEYS[3 + 2 * number], KEYS[4 + 2 * number]
end

local rooms = {}

local function room_of(number)
  if not rooms[number] then
    local room, promises = keys_of(number)
    lapse(room, promises)
    local fields = redis.call('HMGET', room, 'max_sequences', 'max_tokens', 'max_pages', 'sequences', 'tokens', 'pages',
      'promised_sequences', 'promised_tokens', 'promised_pages')
    for i = 1, 9 do
      fields[i] = tonumber(fields[i] or 0)
    end
    rooms[number] = {
      max_sequences = fields[1], max_tokens = fields[2], max_pages = fields[3],
      sequences = fields[4] + fields[7], tokens = fields[5] + fields[8], pages = fields[6] + fields[9],
    }
  end
  return rooms[number]
end

-- A worker without limits has not reported yet; one that has nobody takes whatever it is given.
local function fits(number, tokens, pages)
  local room = room_of(number)
  if room.max_sequences == 0 or room.sequences <= 0 then
    return true
  end
  return room.sequences < room.max_sequences
    and (tokens == 0 or room.tokens <= 0 or room.tokens + tokens <= room.max_tokens)
    and room.pages + pages <= room.max_pages
end

-- Whether it would still be less than half full.
local function is_roomy(number, tokens, pages)
  local room = room_of(number)
  return 2 * (room.sequences + 1) <= room.max_sequences
    and 2 * (room.tokens + tokens) <= room.max_tokens
    and 2 * (room.pages + pages) <= room.max_pages
end

local function promise(number, id, tokens, pages, ttl_ms)
  local room, promises = keys_of(number)
  forget(room, promises, id)
  redis.call('HSET', room, 'r:' .. id, tokens .. ' ' .. pages)
  redis.call('HINCRBY', room, 'promised_sequences', 1)
  redis.call('HINCRBY', room, 'promised_tokens', tokens)
  redis.call('HINCRBY', room, 'promised_pages', pages)
  redis.call('ZADD', promises, exact(NOW + ttl_ms), id)
  redis.call('PEXPIRE', promises, PROMISES_TTL_MS)
  if redis.call('PTTL', room) < 0 then
    redis.call('PEXPIRE', room, PROMISES_TTL_MS)
  end
end

-- What was promised is over, if it was; else it is void when it comes.
local function settle(room, promises, id)
  if not forget(room, promises, id) then
    redis.call('ZADD', promises, exact(NOW + VOID_MS), id)
    redis.call('PEXPIRE', promises, PROMISES_TTL_MS)
  end
end

local function needs_of(text)
  local needs = {}
  for tokens, pages in string.gmatch(text, '(%d+) (%d+)') do
    needs[#needs + 1] = { tokens = tonumber(tokens), pages = tonumber(pages) }
  end
  return needs
end
