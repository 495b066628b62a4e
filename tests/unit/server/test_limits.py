"""What a key may use: requests and tokens per minute, requests at once; and how it is told."""

from __future__ import annotations

import pytest

from seamount.core.errors import QuotaError
from seamount.core.identity import Limits, Principal
from seamount.server.admission.limits import Meter, Meters, duration


def test_requests_per_minute_come_back_evenly() -> None:
    meter = Meter(Limits(requests_per_minute=2), 0.0)
    meter.begin(0.0)
    meter.begin(0.0)
    with pytest.raises(QuotaError) as caught:
        meter.begin(0.0)
    assert (caught.value.code, caught.value.retry_after) == ("requests_per_minute_exceeded", pytest.approx(30))
    with pytest.raises(QuotaError):
        meter.begin(29.0)
    meter.begin(30.0)


def test_tokens_are_reserved_and_settled_by_what_was_used() -> None:
    meter = Meter(Limits(tokens_per_minute=600), 0.0)
    meter.reserve(500, 0.0)
    with pytest.raises(QuotaError) as caught:
        meter.reserve(200, 0.0)
    assert (caught.value.code, caught.value.retry_after) == ("tokens_per_minute_exceeded", pytest.approx(10))
    meter.settle(500, 100, 0.0)
    assert meter.headers(0.0)["x-ratelimit-remaining-tokens"] == "500"
    meter.reserve(500, 0.0)
    meter.settle(500, 800, 0.0)
    assert meter.headers(0.0)["x-ratelimit-remaining-tokens"] == "0"
    with pytest.raises(QuotaError) as caught:
        meter.begin(0.0)
    # Overdrawn by 300, at 10 a second, and one more for there to be any.
    assert caught.value.retry_after == pytest.approx(30.1)


def test_a_request_larger_than_a_minutes_tokens_goes_when_nothing_was_used() -> None:
    meter = Meter(Limits(tokens_per_minute=60), 0.0)
    meter.reserve(1000, 0.0)
    with pytest.raises(QuotaError):
        meter.reserve(1, 60.0)


def test_requests_at_once() -> None:
    meter = Meter(Limits(max_concurrent=1), 0.0)
    meter.begin(0.0)
    with pytest.raises(QuotaError) as caught:
        meter.begin(100.0)
    assert caught.value.code == "concurrency_limit_exceeded"
    meter.end()
    meter.begin(100.0)
    meter.end()
    with pytest.raises(RuntimeError):
        meter.end()


def test_a_refused_request_takes_nothing() -> None:
    meter = Meter(Limits(requests_per_minute=5, max_concurrent=1), 0.0)
    meter.begin(0.0)
    for _ in range(10):
        with pytest.raises(QuotaError):
            meter.begin(0.0)
    assert meter.headers(0.0)["x-ratelimit-remaining-requests"] == "4"


def test_headers_carry_openais_names_and_spelling() -> None:
    meter = Meter(Limits(requests_per_minute=60, tokens_per_minute=1000), 0.0)
    meter.begin(0.0)
    meter.reserve(250, 0.0)
    assert meter.headers(0.0) == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "1s",
        "x-ratelimit-limit-tokens": "1000",
        "x-ratelimit-remaining-tokens": "750",
        "x-ratelimit-reset-tokens": "15s",
    }
    assert Meter(Limits(max_concurrent=1), 0.0).headers(0.0) == {}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (-3, "0s"),
        (0.017, "17ms"),
        (0.0001, "1ms"),
        (1, "1s"),
        (1.5, "1.5s"),
        (59.9999, "1m0s"),
        (361, "6m1s"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def caller(key_id: str | None, limits: Limits) -> Principal:
    return Principal(key_id=key_id, tenant="t", limits=limits)


def test_a_changed_limit_holds_at_once_and_others_keep_what_was_used() -> None:
    meters = Meters()
    meter = meters.of(caller("k", Limits(requests_per_minute=1, tokens_per_minute=100)), 0.0)
    assert meter is not None
    meter.begin(0.0)
    meter.reserve(60, 0.0)
    same = meters.of(caller("k", Limits(requests_per_minute=9, tokens_per_minute=100)), 0.0)
    assert same is meter
    meter.begin(0.0)
    assert meter.headers(0.0)["x-ratelimit-remaining-tokens"] == "40"


def test_keys_have_meters_of_their_own_and_who_has_no_limits_has_none() -> None:
    meters = Meters()
    one, other = (meters.of(caller(key, Limits(requests_per_minute=1)), 0.0) for key in "kl")
    assert one is not None
    assert other is not None
    assert one is not other
    assert meters.of(caller("k", Limits()), 0.0) is None
    assert meters.of(caller(None, Limits(requests_per_minute=1)), 0.0) is None


def test_keys_that_are_not_used_any_more_are_forgotten() -> None:
    meters = Meters()
    busy = meters.of(caller("busy", Limits(max_concurrent=1)), 0.0)
    assert busy is not None
    busy.begin(0.0)
    for number in range(20_000):
        meters.of(caller(f"k{number}", Limits(requests_per_minute=1)), float(number))
    assert len(meters._meters) <= 4096 + 1
    assert meters.of(caller("busy", Limits(max_concurrent=1)), 0.0) is busy
