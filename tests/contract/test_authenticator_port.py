"""The contract of `core.ports.Authenticator`, run over every implementation.

A case gives an authenticator, what a known caller sends and whence, and what somebody unknown does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from seamount.core.errors import UnauthenticatedError
from seamount.core.identity import Principal
from seamount.core.ports import Authenticator
from seamount.core.state import open_state
from seamount.security.authenticators import KeyAuthenticator, OpenOnLoopback
from seamount.security.keys import ApiKeys

HOSTILE = ["", " ", "sm-", "sm-aaaaaaaaaa-" + "b" * 43, "' OR 1=1 --", "\x00", "é" * 9000, "\ud800", "Basic eDp5", "一"]


@dataclass
class Case:
    authenticator: Authenticator
    known: tuple[str | None, str | None]
    unknown_peer: str | None
    close: Callable[[], None] = lambda: None


def _keys(folder: Path) -> Case:
    database = open_state(str(folder / "state.db"))
    keys = ApiKeys(database)
    keys.add_first_administrator(tenant="admin", label="")
    credential, _ = keys.add(Principal(key_id=None, tenant="lab"))
    return Case(KeyAuthenticator(keys), (credential, "203.0.113.9"), "127.0.0.1", database.close)


def _open(folder: Path) -> Case:
    return Case(OpenOnLoopback(), (None, "127.0.0.1"), "203.0.113.9")


@pytest.fixture(params=[_keys, _open], ids=["keys", "open"])
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Case]:
    made = request.param(tmp_path)
    yield made
    made.close()


async def test_a_known_caller_is_named_and_the_same_each_time(case):
    who = await case.authenticator.authenticate(*case.known)
    assert who.tenant
    assert await case.authenticator.authenticate(*case.known) == who


async def test_a_key_that_is_good_has_not_ended(case):
    who = await case.authenticator.authenticate(*case.known)
    assert await case.authenticator.ended([] if who.key_id is None else [who.key_id]) == {}
    assert await case.authenticator.ended([]) == {}


@pytest.mark.parametrize("credential", [None, *HOSTILE], ids=lambda text: repr(text)[:20])
async def test_nobody_unknown_is_let_in_whatever_they_send(case, credential):
    with pytest.raises(UnauthenticatedError) as caught:
        await case.authenticator.authenticate(credential, case.unknown_peer)
    assert caught.value.hint
    if credential and credential.strip():
        assert credential not in str(caught.value)


async def test_no_address_is_no_loopback():
    with pytest.raises(UnauthenticatedError):
        await OpenOnLoopback().authenticate(None, None)
    assert (await OpenOnLoopback().authenticate("any", "::ffff:127.0.0.1")).is_admin
