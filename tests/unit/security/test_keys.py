"""How keys are made, and what of them is kept."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from seamount.core.errors import InvalidRequestError
from seamount.core.identity import Limits, Principal
from seamount.core.state import open_state
from seamount.security.keys import ApiKeys, id_of

ANYONE = Principal(key_id=None, tenant="lab")


@pytest.fixture
def keys(tmp_path: Path) -> Iterator[ApiKeys]:
    database = open_state(str(tmp_path / "state.db"))
    made = ApiKeys(database)
    made.add_first_administrator(tenant="admin", label="")
    yield made
    database.close()


def test_a_key_has_256_random_bits_and_its_id_in_front(keys):
    made = [keys.add(ANYONE) for _ in range(50)]
    for credential, key in made:
        assert re.fullmatch(r"sm-[A-Za-z0-9]{10}-[A-Za-z0-9]{43}", credential)  # 62^43 > 2^256
        assert id_of(credential) == key.id
    assert len({credential for credential, _ in made}) == 50
    letters = [credential[14 + place] for credential, _ in made for place in range(43)]
    assert len(set(letters)) == 62


def test_the_secret_is_nowhere_in_the_files(keys, tmp_path):
    credential, key = keys.add(ANYONE, label="findable")
    keys.database.close()
    data = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert b"findable" in data
    assert key.id.encode() in data
    assert credential[14:].encode() not in data
    assert credential not in repr(key)


@pytest.mark.parametrize(
    ("change", "label", "lifetime_s", "param"),
    [
        ({"tenant": ""}, "", None, "tenant"),
        ({"tenant": "a b"}, "", None, "tenant"),
        ({"tenant": "-a"}, "", None, "tenant"),
        ({"tenant": "x" * 64}, "", None, "tenant"),
        ({}, "two\nlines", None, "label"),
        ({}, "x" * 201, None, "label"),
        ({"models": ()}, "", None, "models"),
        ({"models": ("",)}, "", None, "models"),
        ({"routes": ("/v1",) * 101}, "", None, "routes"),
        ({"is_admin": True, "models": ("m",)}, "", None, "is_admin"),
        ({"is_admin": True, "routes": ("/v1",)}, "", None, "is_admin"),
        ({"limits": Limits(requests_per_minute=0)}, "", None, "requests_per_minute"),
        ({"limits": Limits(tokens_per_minute=-1)}, "", None, "tokens_per_minute"),
        ({"limits": Limits(max_concurrent=2**41)}, "", None, "max_concurrent"),
        ({"priority": 2}, "", None, "priority"),
        ({}, "", 0, "lifetime_s"),
        ({}, "", 2**40, "lifetime_s"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(keys, change, label, lifetime_s, param):
    with pytest.raises(InvalidRequestError) as caught:
        keys.add(replace(ANYONE, **change), label=label, lifetime_s=lifetime_s)
    assert caught.value.param == param
    assert len(keys.all()) == 1
