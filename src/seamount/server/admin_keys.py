"""/v1/admin/keys: administrators list, make and revoke API keys over HTTP, as `seamount keys` does on the machine.

Added by `app`; the page of `console/keys.js` uses it. Who comes here was let in as an administrator by `door.access`.
That is not enough while nobody has a key yet: then everyone on this machine would be one, and any program on it could
make itself the first. So these routes also ask that a key proved it.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Annotated, Any

from fastapi import FastAPI, Path, Response

from seamount.core.database import Database
from seamount.core.errors import ForbiddenError, NotFoundError
from seamount.security.keys import ApiKey, ApiKeys
from seamount.security.usage import Tokens, usage_by_day

from .door.access import check_named, current_principal
from .wire.keys import KeyCard, KeyList, KeyOrder, NewKey, key_card

KeyId = Annotated[str, Path(pattern=r"^[A-Za-z0-9]+$", max_length=64)]
_NO_STORE = {"cache-control": "no-store"}


def add_admin_keys(app: FastAPI, state: Database | None, errors: dict[int | str, dict[str, Any]]) -> None:
    """Add the routes.

    Args:
        state: where keys are kept; None: nowhere, and the routes say so.
        errors: the answers to wrong requests, for the OpenAPI document.
    """

    @app.get("/v1/admin/keys", tags=["administration"], responses=errors, response_model=KeyList)
    async def list_keys() -> Response:
        """List every key that was ever made, and the tokens that it used."""
        keys = _keys(state)

        def work() -> KeyList:
            used = usage_by_day(keys.database)
            return KeyList(data=[_card(key, used) for key in keys.all()])

        return _answer(await keys.database.call(work))

    @app.post("/v1/admin/keys", tags=["administration"], responses=errors, response_model=NewKey)
    async def make_key(body: KeyOrder) -> Response:
        """Make a key. The answer holds it, this once: only its hash is kept."""
        keys = _keys(state)
        check_named(body.routes or ())
        work = partial(keys.add, body.principal(), label=body.label, lifetime_s=body.expires_in_s)
        credential, key = await keys.database.call(work)
        return _answer(NewKey(**_card(key, {}).model_dump(), key=credential))

    @app.post("/v1/admin/keys/{key_id}/revoke", tags=["administration"], responses=errors, response_model=KeyCard)
    async def revoke_key(key_id: KeyId) -> Response:
        """Make a key worthless from the next request on. What it used stays known."""
        keys = _keys(state)

        def work() -> KeyCard:
            return _card(keys.revoke(key_id), usage_by_day(keys.database))

        return _answer(await keys.database.call(work))


def _keys(state: Database | None) -> ApiKeys:
    who = current_principal()
    if who is None or who.key_id is None:
        raise ForbiddenError(
            "This server has no administrator yet, so nobody can manage keys over the network.",
            hint="Run `seamount init` on its machine, and start it again.",
            code="no_administrator",
        )
    if state is None:
        raise NotFoundError("This server keeps no keys.")
    return ApiKeys(state)


def _card(key: ApiKey, used: dict[str, dict[str, Tokens]]) -> KeyCard:
    return key_card(key, sum(used.get(key.id, {}).values(), Tokens()), time.time())


def _answer(card: KeyCard | KeyList) -> Response:
    return Response(card.model_dump_json(), media_type="application/json", headers=_NO_STORE)
