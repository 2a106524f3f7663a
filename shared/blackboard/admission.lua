-- Admission: room on workers is promised (`room.lua`, which comes before this), and requests without room are parked, each in
-- one atomic step.
--
-- Queue. Order: class, then start-time fair queueing between tenants (Goyal, Vin and Cheng, 1996): a request's start tag is
-- the later of the virtual time and its tenant's last finish tag, its finish tag lies its cost further; the virtual time is
-- the start tag of who left last. Whenever room may have come free, the first in the queue whose router is alive is woken;
-- nobody overtakes it. So nobody is admitted twice, and no room is left unnoticed.

local CLASS_WIDTH = 17592186044416 -- 2^44 tokens: class and start tag share the 53 exact bits of a score
local KEEP_MS = 15000 -- a request whose router is gone keeps its place for so long
local PACE_TTL_MS = 60000
local PACE_SAMPLES = 4 -- a pace is told from so many departures on
local MIN_RETRY_MS, MAX_RETRY_MS, UNKNOWN_RETRY_MS = 100, 60000, 1000

-- Queue ---------------------------------------------------------------------------------------------------------------

local function read(id)
  local raw = redis.call('HGET', PARKED, id)
  return raw and cjson.decode(raw)
end

local function write(id, entry)
  redis.call('HSET', PARKED, id, cjson.encode(entry))
end

local function member_of(id, entry)
  return string.format('%012d', entry.number) .. id
end

local function share_of(entry)
  return 'f:' .. entry.class .. ':' .. entry.tenant
end

local function leave(id, entry)
  redis.call('ZREM', QUEUE, member_of(id, entry))
  redis.call('HDEL', PARKED, id)
  if redis.call('ZCARD', QUEUE) == 0 then
    redis.call('DEL', PARKED, SHARES)
  end
end

-- Out of the queue without having been served: its tenant need not pay for it, unless others of it already stand behind.
local function give_up(id, entry)
  local finish = tonumber(redis.call('HGET', SHARES, share_of(entry)) or 0)
  if finish == entry.start + entry.cost then
    redis.call('HSET', SHARES, share_of(entry), exact(entry.start))
  end
  leave(id, entry)
end

local living = {}

local function is_alive(router)
  if living[router] == nil then
    living[router] = redis.call('EXISTS', 'WAITER' .. router) == 1
      and redis.call('PUBSUB', 'NUMSUB', 'WAKE' .. router)[2] > 0
  end
  return living[router]
end

-- The first whose router is alive; requests whose router is gone are passed over, and dropped after a while.
local function first()
  local from, gone, found, entry = 0, {}, nil, nil
  repeat
    local members = redis.call('ZRANGE', QUEUE, from, from + 15)
    for _, member in ipairs(members) do
      local id = string.sub(member, 13)
      entry = read(id)
      if is_alive(entry.router) then
        found = id
        break
      elseif not entry.left then
        entry.left = NOW
        write(id, entry)
      elseif NOW - entry.left > KEEP_MS then
        gone[id] = entry
      end
    end
    from = from + 16
  until found or #members == 0
  for id, lost in pairs(gone) do
    give_up(id, lost)
  end
  if found then
    return found, entry
  end
end

local function wake()
  local id, entry = first()
  if id then
    redis.call('PUBLISH', 'WAKE' .. entry.router, id)
  end
end

local function score_of(class, start)
  return class * CLASS_WIDTH + start
end

-- Mean time between two that leave the queue while it is not empty; nil if it is not known.
local function interval_ms()
  local pace = redis.call('HMGET', PACE, 'interval_ms', 'samples')
  if pace[2] and tonumber(pace[2]) >= PACE_SAMPLES then
    return tonumber(pace[1])
  end
end

local function served(id, entry)
  leave(id, entry)
  local virtual = 'v:' .. entry.class
  if redis.call('EXISTS', SHARES) == 1 and entry.start > tonumber(redis.call('HGET', SHARES, virtual) or 0) then
    redis.call('HSET', SHARES, virtual, exact(entry.start))
  end
  local pace = redis.call('HMGET', PACE, 'interval_ms', 'last')
  local last = math.min(NOW - tonumber(pace[2] or NOW), PACE_TTL_MS)
  local interval = pace[1] and 0.8 * tonumber(pace[1]) + 0.2 * last or last
  redis.call('HSET', PACE, 'interval_ms', tostring(interval), 'last', exact(NOW))
  redis.call('HINCRBY', PACE, 'samples', 1)
  redis.call('PEXPIRE', PACE, PACE_TTL_MS)
end

local function retry_ms(position)
  local interval = interval_ms()
  return interval and math.max(MIN_RETRY_MS, math.min(math.ceil(position * interval), MAX_RETRY_MS)) or UNKNOWN_RETRY_MS
end

-- Tenants whose finish tag the virtual time has passed are as good as new.
local function prune_shares(class)
  local virtual = tonumber(redis.call('HGET', SHARES, 'v:' .. class) or 0)
  local shares = redis.call('HGETALL', SHARES)
  local prefix = 'f:' .. class .. ':'
  for i = 1, #shares, 2 do
    if string.sub(shares[i], 1, #prefix) == prefix and tonumber(shares[i + 1]) <= virtual then
      redis.call('HDEL', SHARES, shares[i])
    end
  end
end

-- 1 if those who were given something have plenty left and nobody waits, else 0.
local function is_plenty(roomy)
  return roomy and redis.call('ZCARD', QUEUE) == 0 and 1 or 0
end

local function refuse(reason, position)
  return { 'refused', reason, retry_ms(position) }
end

-- Commands ------------------------------------------------------------------------------------------------------------

local commands = {}

-- reserve ID ROUTER CLASS TENANT COST REMAINING_MS MAX_QUEUED LEASE_MS PROMISE_MS IS_PARTIAL NEEDS CANDIDATES. NEEDS has
-- for each worker in KEYS the tokens, should it compute the prompt, and pages; CANDIDATES the numbers of decode and prefill
-- worker (0: none) of each. Long lists, and mostly the first candidate is it: so they are text, read no further than that.
-- → placed CANDIDATE IS_PLENTY | parked POSITION | refused REASON RETRY_MS | more (none of a partial list has room)
function commands.reserve()
  local id, router, class, tenant = ARGV[2], ARGV[3], tonumber(ARGV[4]), ARGV[5]
  local cost, remaining, max_queued = tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8])
  local mine = read(id)
  local entry = mine
  if not mine then
    local shares = redis.call('HMGET', SHARES, 'v:' .. class, 'f:' .. class .. ':' .. tenant)
    local start = math.max(tonumber(shares[1] or 0), tonumber(shares[2] or 0))
    entry = { class = class, tenant = tenant, cost = cost, start = start }
  end
  if not mine or entry.router ~= router or entry.left then
    entry.router, entry.left = router, nil
    if mine then
      write(id, entry)
    end
  end
  local score = score_of(entry.class, entry.start)
  living[router] = true

  local head, ahead = first()
  if not head or head == id or (not mine and score < score_of(ahead.class, ahead.start)) then
    local needs = needs_of(ARGV[12])
    local at = 0
    for first_number, second_number in string.gmatch(ARGV[13], '(%d+) (%d+)') do
      local decode, prefill = tonumber(first_number), tonumber(second_number)
      local tokens, pages = prefill == 0 and needs[decode].tokens or 0, needs[decode].pages
      if fits(decode, tokens, pages) and (prefill == 0 or fits(prefill, needs[prefill].tokens, needs[prefill].pages)) then
        local plenty = is_roomy(decode, tokens, pages)
        promise(decode, id, tokens, pages, tonumber(ARGV[10]))
        if prefill > 0 then
          plenty = plenty and is_roomy(prefill, needs[prefill].tokens, needs[prefill].pages)
          promise(prefill, id, needs[prefill].tokens, needs[prefill].pages, tonumber(ARGV[10]))
        end
        if mine then
          served(id, entry)
        end
        wake() -- there may be room for the next one, too
        return { 'placed', at, is_plenty(plenty) }
      end
      at = at + 1
    end
    if ARGV[11] == '1' then
      return { 'more' }
    end
  end

  local position
  if mine then
    position = redis.call('ZRANK', QUEUE, member_of(id, entry)) + 1
  else
    position = redis.call('ZCOUNT', QUEUE, '-inf', exact(score)) + 1
  end
  local interval = interval_ms()
  if remaining >= 0 and interval and position * interval > remaining then
    if mine then
      give_up(id, entry)
      wake()
    end
    return refuse('DEADLINE', position)
  end
  redis.call('SET', 'WAITER' .. router, '1', 'PX', ARGV[9])
  if mine then
    return { 'parked', position }
  end

  if redis.call('ZCARD', QUEUE) >= max_queued then
    local tail = redis.call('ZRANGE', QUEUE, -1, -1, 'WITHSCORES')
    if #tail == 0 or tonumber(tail[2]) <= score then
      return refuse('OVERLOADED', max_queued)
    end
    local last = string.sub(tail[1], 13)
    local evicted = read(last)
    give_up(last, evicted)
    redis.call('PUBLISH', 'WAKE' .. evicted.router, last) -- it asks again, and hears that it is refused
  end
  if redis.call('ZCARD', QUEUE) == 0 then
    redis.call('HSET', PACE, 'last', exact(NOW))
    redis.call('PEXPIRE', PACE, PACE_TTL_MS)
  elseif redis.call('HLEN', SHARES) > 4 * max_queued then
    prune_shares(class)
  end
  entry.number = redis.call('HINCRBY', SHARES, 'number', 1)
  redis.call('HSET', SHARES, share_of(entry), exact(entry.start + cost))
  redis.call('ZADD', QUEUE, exact(score), member_of(id, entry))
  write(id, entry)
  return { 'parked', position }
end

-- promise ID PROMISE_MS NEEDS: it is on its way to the workers in KEYS already, whether they have room or not. NEEDS has for
-- each of them tokens, should it compute the prompt, else 0, and pages.
-- → IS_PLENTY
function commands.promise()
  local id, mine, plenty = ARGV[2], read(ARGV[2]), true
  for number, need in ipairs(needs_of(ARGV[4])) do
    local room, promises = keys_of(number)
    plenty = plenty and is_roomy(number, need.tokens, need.pages)
    if redis.call('ZSCORE', promises, id) and redis.call('HEXISTS', room, 'r:' .. id) == 0 then -- void
      redis.call('ZREM', promises, id)
    else
      promise(number, id, need.tokens, need.pages, tonumber(ARGV[3]))
    end
  end
  if mine then -- another router had parked it
    served(id, mine)
    wake()
  end
  return is_plenty(plenty)
end

-- withdraw ID ROUTER: it is parked there no longer, and what the workers in KEYS promised it is free. ROUTER is empty where
-- its gateway gives that back.
function commands.withdraw()
  local entry = read(ARGV[2])
  if entry and entry.router == ARGV[3] then
    give_up(ARGV[2], entry)
  end
  local over = ARGV[3] == '' and settle or forget
  for number = 1, (#KEYS - 4) / 2 do
    local room, promises = keys_of(number)
    over(room, promises, ARGV[2])
  end
  wake()
  return { 'ok' }
end

-- report MAX_SEQUENCES MAX_TOKENS MAX_PAGES SEQUENCES TOKENS PAGES TTL_MS, then the ids that arrived since the last one.
-- → the length of the queue
function commands.report()
  local room, promises = keys_of(1)
  local lapsed = lapse(room, promises)
  local before = room_of(1)
  for at = 9, #ARGV do
    settle(room, promises, ARGV[at])
  end
  redis.call('HSET', room, 'max_sequences', ARGV[2], 'max_tokens', ARGV[3], 'max_pages', ARGV[4], 'sequences', ARGV[5],
    'tokens', ARGV[6], 'pages', ARGV[7])
  redis.call('PEXPIRE', room, ARGV[8])
  local length = redis.call('ZCARD', QUEUE)
  if length > 0 then
    rooms = {}
    local now = room_of(1)
    if lapsed or now.sequences < before.sequences or now.tokens < before.tokens or now.pages < before.pages
      or now.max_sequences ~= before.max_sequences then
      wake()
    end
  end
  return length
end

-- tend ROUTER LEASE_MS: the router is alive. Wakes the first, because promises lapse in silence.
function commands.tend()
  redis.call('SET', 'WAITER' .. ARGV[2], '1', 'PX', ARGV[3])
  wake()
  return { 'ok' }
end

return commands[ARGV[1]]()
