"""Keys and usage in the state database, over both kinds."""

from __future__ import annotations

import asyncio

import pytest

from seamount.core.errors import ConfigError, NotFoundError
from seamount.core.identity import Limits, Principal
from seamount.security.keys import ApiKeys, digest_of, id_of
from seamount.security.usage import Tokens, UsageLedger, usage_by_day

CLERK = Principal(
    key_id=None,
    tenant="bank",
    models=("m", "org/模型"),
    routes=("/v1/completions",),
    limits=Limits(requests_per_minute=1, tokens_per_minute=2**35, max_concurrent=3),
    priority=-1,
)
ANYONE = Principal(key_id=None, tenant="bank")


class Clock:
    """Seconds that the test sets."""

    def __init__(self, now_s: float) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock(1_800_000_000.5)


@pytest.fixture
def keys(open_one, clock) -> ApiKeys:
    made = ApiKeys(open_one(), clock)
    made.add_first_administrator(tenant="admin", label="")
    return made


def test_a_key_is_found_with_all_that_was_said_of_it(keys):
    credential, key = keys.add(CLERK, label="Schalter 一", lifetime_s=60)
    found, digest = keys.find(id_of(credential))
    assert found == key
    assert digest == digest_of(credential)
    assert (key.label, key.created_s, key.expires_s, key.revoked_s) == (
        "Schalter 一",
        1_800_000_000,
        1_800_000_060,
        None,
    )
    assert key.principal.key_id == key.id
    assert key.principal.models == ("m", "org/模型")
    assert key.principal.limits == CLERK.limits
    assert key.principal.priority == -1
    _, plain = keys.add(ANYONE)
    assert keys.find(plain.id)[0].principal == Principal(key_id=plain.id, tenant="bank")
    assert keys.find("nobody") is None


def test_any_number_of_keys_is_found_at_once(keys):
    made = {keys.add(ANYONE)[1] for _ in range(3)}
    ids = [key.id for key in made]
    assert set(keys.find_several([*ids, "nobody"])) == made
    assert set(keys.find_several([*(f"nobody{number}" for number in range(70_000)), *ids])) == made
    assert keys.find_several([]) == []


def test_keys_are_listed_as_they_were_made(keys, clock):
    clock.now_s += 5
    _, second = keys.add(ANYONE, label="second")
    clock.now_s += 5
    _, third = keys.add(CLERK, label="third")
    assert [key.label for key in keys.all()] == ["", "second", "third"]
    assert keys.all()[1:] == [second, third]
    assert keys.all()[0].principal.is_admin


def test_a_key_expires_at_its_second_and_is_revoked_at_once_and_for_good(keys, clock):
    _, key = keys.add(ANYONE, lifetime_s=60)
    assert [key.state(clock.now_s + after) for after in (0, 59.4, 59.5)] == ["active", "active", "expired"]
    revoked = keys.revoke(key.id)
    assert revoked.revoked_s == 1_800_000_000
    assert revoked.state(clock.now_s) == "revoked"
    clock.now_s += 100
    assert keys.revoke(key.id) == revoked
    assert keys.find(key.id)[0] == revoked
    with pytest.raises(NotFoundError):
        keys.revoke("nobody")


def test_the_first_administrator_is_made_once_and_counts_for_ever(open_one):
    keys = ApiKeys(open_one())
    assert not keys.has_administrator()
    with pytest.raises(ConfigError, match="no administrator") as caught:
        keys.add(ANYONE)
    assert "seamount init" in caught.value.hint
    _, key = keys.add_first_administrator(tenant="admin", label="")
    with pytest.raises(ConfigError, match="already"):
        keys.add_first_administrator(tenant="admin", label="")
    keys.revoke(key.id)
    assert keys.has_administrator()
    assert len(keys.all()) == 1


async def test_usage_adds_up_over_keys_days_and_servers(keys, open_one, clock):
    _, one = keys.add(ANYONE)
    _, two = keys.add(ANYONE)
    ledgers = [UsageLedger(keys.database, clock), UsageLedger(open_one(), clock)]
    for ledger in ledgers:
        ledger.add(one.id, Tokens(10, 1))
        ledger.add(one.id, Tokens(5, 2))
        ledger.add(two.id, Tokens(2**40, 0))
    await asyncio.gather(*(ledger.flush() for ledger in ledgers))
    clock.now_s += 86_400
    ledgers[0].add(one.id, Tokens(1, 1))
    await ledgers[0].flush()
    await ledgers[0].flush()  # nothing is counted twice
    assert usage_by_day(keys.database) == {
        one.id: {"2027-01-15": Tokens(30, 6), "2027-01-16": Tokens(1, 1)},
        two.id: {"2027-01-15": Tokens(2**41, 0)},
    }
