"""Keys as proof: what a wrong one learns, and how soon a change holds."""

from __future__ import annotations

import hmac
from collections.abc import Iterator
from pathlib import Path

import pytest

from seamount.core.errors import UnauthenticatedError
from seamount.core.identity import Principal
from seamount.core.state import open_state
from seamount.security import authenticators
from seamount.security.authenticators import KeyAuthenticator
from seamount.security.keys import ApiKeys

ANYONE = Principal(key_id=None, tenant="lab")


class Clock:
    """Seconds that the test sets."""

    now_s = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def keys(tmp_path: Path, clock: Clock) -> Iterator[ApiKeys]:
    database = open_state(str(tmp_path / "state.db"))
    made = ApiKeys(database, clock)
    made.add_first_administrator(tenant="admin", label="")
    yield made
    database.close()


async def refusal(door: KeyAuthenticator, credential: str | None) -> UnauthenticatedError:
    with pytest.raises(UnauthenticatedError) as caught:
        await door.authenticate(credential, "127.0.0.1")
    return caught.value


def other_secret(credential: str) -> str:
    return credential[:-1] + ("a" if credential[-1] != "a" else "b")


async def test_only_the_holder_of_the_right_key_is_told_more(keys, clock):
    door = KeyAuthenticator(keys, clock)
    credential, key = keys.add(ANYONE, lifetime_s=60)
    assert (await door.authenticate(credential, None)) == key.principal
    clock.now_s += 60
    assert (await refusal(door, credential)).code == "expired_api_key"
    keys.revoke(key.id)
    assert (await refusal(door, credential)).code == "revoked_api_key"
    stranger = await refusal(door, "sm-aaaaaaaaaa-" + "b" * 43)
    assert str(await refusal(door, other_secret(credential))) == str(stranger)
    assert stranger.code == "invalid_api_key"
    assert (await refusal(door, None)).code == "missing_api_key"


async def test_whatever_is_sent_takes_the_same_steps(keys, monkeypatch):
    """What takes other steps takes another time: one look-up and one comparison of equal lengths, for all."""
    steps: list[object] = []
    find, compare_digest = keys.find, hmac.compare_digest

    def compare(one: str, other: str) -> bool:
        steps.append((len(one), len(other)))
        return compare_digest(one, other)

    monkeypatch.setattr(keys, "find", lambda key_id: (steps.append("find"), find(key_id))[1])
    monkeypatch.setattr(authenticators.hmac, "compare_digest", compare)
    credential, key = keys.add(ANYONE)
    keys.revoke(key.id)
    door = KeyAuthenticator(keys)
    taken = []
    for sent in (credential, other_secret(credential), "sm-aaaaaaaaaa-" + "b" * 43, "sm-short", "", "é" * 999):
        steps.clear()
        await refusal(door, sent)
        taken.append(list(steps))
    assert taken == [["find", (64, 64)]] * 6


async def test_a_revocation_by_another_process_holds_from_the_next_request(keys, clock, tmp_path):
    door = KeyAuthenticator(keys, clock)
    credential, key = keys.add(ANYONE)
    await door.authenticate(credential, None)
    other = open_state(str(tmp_path / "state.db"))
    ApiKeys(other, clock).revoke(key.id)
    assert (await refusal(door, credential)).code == "revoked_api_key"
    other.close()


async def test_which_keys_ended_is_asked_for_all_at_once_and_told_as_to_their_holders(keys, clock):
    door = KeyAuthenticator(keys, clock)
    made = {name: keys.add(ANYONE, lifetime_s=60 if name == "short" else None) for name in ("short", "revoked", "good")}
    ids = {name: key.id for name, (_, key) in made.items()}
    asked = [*ids.values(), "nobodys"]
    assert {key_id: error.code for key_id, error in (await door.ended(asked)).items()} == {"nobodys": "invalid_api_key"}
    clock.now_s += 60
    keys.revoke(ids["revoked"])
    ended = await door.ended(asked)
    assert set(ended) == {ids["short"], ids["revoked"], "nobodys"}
    for name in ("short", "revoked"):
        told = await refusal(door, made[name][0])
        assert (str(ended[ids[name]]), ended[ids[name]].code) == (str(told), told.code)
