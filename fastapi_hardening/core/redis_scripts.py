"""The scripts that run inside the shared store, in Lua 5.1, on Redis 6.2 and later and on Valkey.

A script is one round trip, and nothing else happens in the server while it runs. Both ask the server for the time, so
that all hosts agree on it.
"""

import hashlib

# The arithmetic of core/window.py, number by number. One key holds the states of all limits of a budget. The time is
# counted from 2026, so that a double has places left for microseconds. A server's clock may go backwards, as after a
# failover: by less than a window it stands still, and nobody is ever in debt for longer than a window.
SPEND = """
local now = tonumber(ARGV[1])
if not now then
  local time = redis.call('TIME')
  now = (time[1] - 1767225600) + time[2] / 1000000
end
local EPSILON, HUGE = 1e-9, math.huge

local function window_of(state, window)
  local index, at = math.floor(now / window), now
  if index * window > at then index = index - 1 end
  local stored, first, second = string.match(state or '', '^(%-?%d+):(%d+):?(%d*)$')
  stored = tonumber(stored)
  if stored and stored == index + 1 then
    index = stored
    at = index * window
  end
  return index, at, stored, tonumber(first) or 0, tonumber(second) or 0
end

local function wait(before, spent, elapsed, room, window)
  if room < 0 then return HUGE end
  if spent <= room then
    if before == 0 then return 0 end
    return math.max(0, window * (1 - (room - spent) / before) - elapsed)
  end
  return window - elapsed + window * (1 - room / spent)
end

local decide = {}

function decide.t(state, quota, window, cost)
  local interval = window / quota
  local debt = math.min(math.max((tonumber(state) or now) - now, 0), window)
  local after = debt + interval * cost
  local allowed, retry = after <= window + EPSILON, 0
  if allowed then debt = after
  elseif cost > quota then retry = HUGE
  else retry = after - window end
  local remaining = math.floor((window - debt) / interval + EPSILON)
  local following = 0
  if debt > 0 then following = math.max(0, debt - (quota - remaining - 1) * interval) end
  return allowed, remaining, following, retry, debt, string.format('%.17g', now + debt), debt
end

function decide.f(state, quota, window, cost)
  local index, at, stored, spent = window_of(state, window)
  if stored ~= index then spent = 0 end
  local left = (index + 1) * window - at
  local allowed, retry = spent + cost <= quota, 0
  if allowed then spent = spent + cost
  elseif cost > quota then retry = HUGE
  else retry = left end
  local reset = 0
  if spent > 0 then reset = left end
  return allowed, quota - spent, reset, retry, reset, string.format('%d:%d', index, spent), left
end

function decide.s(state, quota, window, cost)
  local index, at, stored, before, spent = window_of(state, window)
  if stored == index - 1 then before, spent = spent, 0
  elseif stored ~= index then before, spent = 0, 0 end
  local elapsed = at - index * window
  local weighted = before * (1 - elapsed / window)
  local allowed, retry = weighted + spent + cost <= quota + EPSILON, 0
  if allowed then spent = spent + cost
  else retry = wait(before, spent, elapsed, quota - cost, window) end
  local remaining = math.max(0, math.floor(quota - weighted - spent + EPSILON))
  local following = 0
  if before > 0 or spent > 0 then following = wait(before, spent, elapsed, quota - remaining - 1, window) end
  local reset = 0
  if spent > 0 then reset = 2 * window - elapsed elseif before > 0 then reset = window - elapsed end
  return allowed, remaining, following, retry, reset, string.format('%d:%d:%d', index, before, spent),
    2 * window - elapsed
end

-- A key has a text of its own: its cost, the letter of the strategy, and quota and window of each limit.
local answer, writes, all = {}, {}, true
for number, key in ipairs(KEYS) do
  local cost, strategy, numbers = string.match(ARGV[number + 1], '^(%d+) (%a)(.*)$')
  cost = tonumber(cost)
  local states, lifetime, limits = {}, 0, 0
  for state in string.gmatch(redis.call('GET', key) or '', '[^;]+') do states[#states + 1] = state end
  for quota, window in string.gmatch(numbers, '(%d+) (%d+)') do
    limits = limits + 1
    local allowed, remaining, following, retry, reset, state, life =
      decide[strategy](states[limits], tonumber(quota), tonumber(window), cost)
    all = all and allowed
    states[limits] = state
    lifetime = math.max(lifetime, life)
    answer[#answer + 1] =
      string.format('%d %d %.17g %.17g %.17g', allowed and 1 or 0, remaining, following, retry, reset)
  end
  if cost > 0 then writes[#writes + 1] = {key, table.concat(states, ';', 1, limits), lifetime} end
end
if all then
  for _, write in ipairs(writes) do
    redis.call('SET', write[1], write[2], 'PX', math.max(1, math.ceil(write[3] * 1000) + 1))
  end
end
return table.concat(answer, ' ')
"""

# Says that a worker is there, and counts who else is. It writes, so it also tells whether the server can.
BEAT = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('ZADD', KEYS[1], now, ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - ARGV[2])
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return redis.call('ZCARD', KEYS[1])
"""


def _digest(script: str) -> str:
    return hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest()  # what EVALSHA asks for


SPEND_DIGEST, BEAT_DIGEST = _digest(SPEND), _digest(BEAT)
SCRIPTS = {SPEND_DIGEST: SPEND, BEAT_DIGEST: BEAT}
