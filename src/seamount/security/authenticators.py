"""The two answers to "who is there?": whoever holds a key, or whoever sits at this machine.

Implementations of `core.ports.Authenticator`, chosen by the composition root: keys as soon as there has been an
administrator. Knows no protocol.
"""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable, Collection
from functools import partial

from seamount.core.errors import UnauthenticatedError
from seamount.core.identity import Principal, is_loopback

from .keys import ApiKeys, KeyState, digest_of, id_of

LOCAL = Principal(key_id=None, tenant="local", is_admin=True)

# An id that no key has, looked up for whatever has not the form of a key, and a digest that no key has.
_NO_ID = "-"
_NO_DIGEST = "0" * 64


class KeyAuthenticator:
    """Asks for an API key, and looks it up anew each time: what was revoked a moment ago opens nothing.

    Whatever is sent takes the same steps (one look-up, one hash, one comparison in constant time), so that neither
    time nor words tell a wrong key's bearer how wrong it is.
    """

    def __init__(self, keys: ApiKeys, clock: Callable[[], float] = time.time) -> None:
        self._keys = keys
        self._clock = clock

    async def authenticate(self, credential: str | None, peer: str | None) -> Principal:
        """Return the caller; see the port. Only who holds the right key is told that it expired or was revoked."""
        if credential is None:
            raise UnauthenticatedError(
                "This server asks for an API key.",
                hint="Send it as `Authorization: Bearer sm-...`.",
                code="missing_api_key",
            )
        key_id = id_of(credential) or _NO_ID
        found = await self._keys.database.look_up(partial(self._keys.find, key_id))
        is_right = hmac.compare_digest(digest_of(credential), found[1] if found else _NO_DIGEST)
        if found is None or not is_right:
            raise _refusal(None)
        state = found[0].state(self._clock())
        if state != "active":
            raise _refusal(state)
        return found[0].principal

    async def ended(self, key_ids: Collection[str]) -> dict[str, UnauthenticatedError]:
        """Return which keys open nothing any more; see the port."""
        found = await self._keys.database.look_up(partial(self._keys.find_several, key_ids))
        now_s = self._clock()
        states = {key.id: key.state(now_s) for key in found}
        return {key_id: _refusal(states.get(key_id)) for key_id in key_ids if states.get(key_id) != "active"}


class OpenOnLoopback:
    """Lets in everyone on this machine, whatever credential they send, and nobody else."""

    async def authenticate(self, credential: str | None, peer: str | None) -> Principal:
        """Return `LOCAL`; see the port."""
        if peer is None or not is_loopback(peer):
            raise UnauthenticatedError(
                "This server has no administrator yet and answers its own machine only.",
                hint="Run `seamount init` there, and start the server again.",
                code="loopback_only",
            )
        return LOCAL

    async def ended(self, key_ids: Collection[str]) -> dict[str, UnauthenticatedError]:
        """Return nothing: here nobody has a key."""
        return {}


def _refusal(state: KeyState | None) -> UnauthenticatedError:
    """Return what the bearer of a key that is not active is told; None: there is none."""
    if state is None:
        return UnauthenticatedError("The API key is not known here.", hint="Ask an administrator for one.")
    return UnauthenticatedError(
        f"The API key is {state}.", hint="Ask an administrator for a new one.", code=f"{state}_api_key"
    )
