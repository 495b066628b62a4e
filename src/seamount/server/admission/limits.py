"""How much one key may use: requests and tokens per minute, and requests at once.

Pure bookkeeping over a clock that the caller reads: no HTTP, no tasks. Used by `call`, which asks before a
request is worked on; whoever authenticated the caller says which limits its key has. What a key has used is kept in
memory only: a minute's worth is not worth a database's write per request.
"""

from __future__ import annotations

import math

from seamount.core.errors import QuotaError
from seamount.core.identity import Limits, Principal

_MINUTE_S = 60.0
# A slot of a key comes free when one of its own requests ends; nobody knows when, so it is asked for again soon.
_CONCURRENCY_RETRY_S = 1.0
# Keys that are known beyond this many are forgotten once they have nothing in flight and nothing to make up for.
_MAX_IDLE_METERS = 4096


class Bucket:
    """Holds up to a minute's worth and refills evenly. May be overdrawn: what is owed is refilled first.

    Args:
        per_minute: how much comes in a minute, and how much it holds; at first it is full.
        now_s: the clock's time; times that go backwards count as no time passed.
    """

    def __init__(self, per_minute: int, now_s: float) -> None:
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._seen_s = now_s

    def level(self, now_s: float) -> float:
        """Return how much is there; below zero when overdrawn."""
        passed_s = max(now_s - self._seen_s, 0.0)
        self._seen_s = max(now_s, self._seen_s)
        self._level = min(self._level + passed_s * self.per_minute / _MINUTE_S, float(self.per_minute))
        return self._level

    def wait_s(self, amount: float, now_s: float) -> float:
        """Return the seconds until `amount` can be taken; more than it can ever hold needs it to be full."""
        lacking = min(amount, self.per_minute) - self.level(now_s)
        # What rounding loses over many small refills must not make somebody wait who has waited as told.
        return 0.0 if lacking <= 1e-6 else lacking * _MINUTE_S / self.per_minute

    def take(self, amount: float, now_s: float) -> None:
        """Take `amount`, overdrawing if need be; a negative one is given back."""
        self._level = min(self.level(now_s) - amount, float(self.per_minute))

    def full_in_s(self, now_s: float) -> float:
        """Return the seconds until it is full."""
        return (self.per_minute - self.level(now_s)) * _MINUTE_S / self.per_minute


class Meter:
    """What one key has used of its limits."""

    def __init__(self, limits: Limits, now_s: float) -> None:
        self.limits = limits
        self.num_in_flight = 0
        self._requests = _bucket(limits.requests_per_minute, now_s)
        self._tokens = _bucket(limits.tokens_per_minute, now_s)

    def change(self, limits: Limits, now_s: float) -> None:
        """Follow a change of the key's limits; a limit that stays keeps what was used of it."""
        if limits.requests_per_minute != self.limits.requests_per_minute:
            self._requests = _bucket(limits.requests_per_minute, now_s)
        if limits.tokens_per_minute != self.limits.tokens_per_minute:
            self._tokens = _bucket(limits.tokens_per_minute, now_s)
        self.limits = limits

    def begin(self, now_s: float) -> None:
        """Take one request's place; `end` gives it back.

        Raises:
            QuotaError: the key has no request left, no token left, or too many at once; nothing is taken.
        """
        most = self.limits.max_concurrent
        if most is not None and self.num_in_flight >= most:
            raise QuotaError(
                f"This key already has {self.num_in_flight} requests in progress; its limit is {most} at once.",
                code="concurrency_limit_exceeded",
                retry_after=_CONCURRENCY_RETRY_S,
            )
        if self._requests is not None and (wait_s := self._requests.wait_s(1, now_s)):
            raise _spent("requests", self._requests.per_minute, wait_s)
        if self._tokens is not None and (wait_s := self._tokens.wait_s(1, now_s)):
            raise _spent("tokens", self._tokens.per_minute, wait_s)
        if self._requests is not None:
            self._requests.take(1, now_s)
        self.num_in_flight += 1

    def end(self) -> None:
        """Give a request's place back."""
        if self.num_in_flight <= 0:
            raise RuntimeError("a request was ended more often than it was begun")
        self.num_in_flight -= 1

    def reserve(self, num_tokens: int, now_s: float) -> None:
        """Take the tokens that a request will probably need; `settle` corrects them.

        Raises:
            QuotaError: the key has not that many left; nothing is taken.
        """
        if self._tokens is None:
            return
        if wait_s := self._tokens.wait_s(num_tokens, now_s):
            raise _spent("tokens", self._tokens.per_minute, wait_s)
        self._tokens.take(num_tokens, now_s)

    def settle(self, reserved: int, used: int, now_s: float) -> None:
        """Give back what was reserved and not used, or take what was used beyond it."""
        if self._tokens is not None:
            self._tokens.take(used - reserved, now_s)

    def is_fresh(self, now_s: float) -> bool:
        """Say whether forgetting this meter would change nothing."""
        buckets = [bucket for bucket in (self._requests, self._tokens) if bucket is not None]
        return not self.num_in_flight and all(bucket.full_in_s(now_s) <= 0 for bucket in buckets)

    def headers(self, now_s: float) -> dict[str, str]:
        """Return the rate headers, under OpenAI's names: the limit, what remains, and when it is full again."""
        found = {}
        for name, bucket in (("requests", self._requests), ("tokens", self._tokens)):
            if bucket is not None:
                found[f"x-ratelimit-limit-{name}"] = str(bucket.per_minute)
                found[f"x-ratelimit-remaining-{name}"] = str(max(math.floor(bucket.level(now_s) + 1e-6), 0))
                found[f"x-ratelimit-reset-{name}"] = duration(bucket.full_in_s(now_s))
        return found


class Meters:
    """The meters of all keys that have been seen lately."""

    def __init__(self) -> None:
        self._meters: dict[str, Meter] = {}

    def of(self, caller: Principal, now_s: float) -> Meter | None:
        """Return the meter of the caller's key; None when it has no limits."""
        if caller.key_id is None or caller.limits == Limits():
            return None
        meter = self._meters.get(caller.key_id)
        if meter is None:
            if len(self._meters) >= _MAX_IDLE_METERS:
                self._meters = {key: m for key, m in self._meters.items() if not m.is_fresh(now_s)}
            meter = self._meters[caller.key_id] = Meter(caller.limits, now_s)
        elif meter.limits != caller.limits:
            meter.change(caller.limits, now_s)
        return meter


def duration(seconds: float) -> str:
    """Return seconds as rate headers spell them: `0s`, `17ms`, `1.5s`, `6m0s`."""
    milliseconds = math.ceil(max(seconds, 0.0) * 1000 - 1e-6)
    if 0 < milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    text = f"{rest / 1000:.3f}".rstrip("0").rstrip(".") + "s"
    return f"{minutes}m{text}" if minutes else text


def _bucket(per_minute: int | None, now_s: float) -> Bucket | None:
    return None if per_minute is None else Bucket(per_minute, now_s)


def _spent(what: str, per_minute: int, wait_s: float) -> QuotaError:
    return QuotaError(
        f"This key's limit of {per_minute} {what} per minute is used up for now.",
        hint=f"Try again in {duration(wait_s)}.",
        code=f"{what}_per_minute_exceeded",
        retry_after=wait_s,
    )
