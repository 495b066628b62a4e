"""Keys over HTTP: who may manage them, what comes back, and that a secret is told once."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from seamount.cli import keys as keys_command
from seamount.cli.wire import make_access
from seamount.core.database import Database
from seamount.core.identity import Principal
from seamount.core.settings import ServerConfig
from seamount.core.state import open_state
from seamount.engine.fake import FakeEngine, say
from seamount.engine.fake_encoder import ByteEncoder
from seamount.security.keys import ApiKeys
from seamount.server.app import create_app
from seamount.server.door.access import Access
from seamount.server.wire.keys import KeyOrder

ROUTE = "/v1/admin/keys"


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Database]:
    database = open_state(str(tmp_path / "state.db"))
    yield database
    database.close()


@pytest.fixture
def keys(state: Database) -> ApiKeys:
    return ApiKeys(state)


@pytest.fixture
def admin(keys: ApiKeys) -> dict[str, str]:
    return bearer(keys.add_first_administrator(tenant="admin", label="")[0])


@pytest.fixture
def access(state: Database, admin: dict[str, str]) -> Access:
    return make_access(state)


@pytest.fixture
async def client(state, access, open_app):
    return await open_app(FakeEngine(say("ok")), access=access, state=state)


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


async def test_a_key_is_made_told_once_used_and_revoked(client, admin, keys):
    made = await client.post(ROUTE, json={"tenant": "bank", "label": "desk"}, headers=admin)
    assert made.status_code == 200, made.text
    assert made.headers["cache-control"] == "no-store"
    order = made.json()
    credential = order.pop("key")
    assert credential.startswith(f"sm-{order['id']}-")
    assert (await client.get("/v1/models", headers=bearer(credential))).status_code == 200
    listed = await client.get(ROUTE, headers=admin)
    assert listed.headers["cache-control"] == "no-store"
    assert order in listed.json()["data"]
    assert credential not in listed.text
    assert keys.find(order["id"])[1] not in listed.text, "nor its hash"
    revoked = await client.post(f"{ROUTE}/{order['id']}/revoke", headers=admin)
    assert revoked.json()["state"] == "revoked"
    assert (await client.get("/v1/models", headers=bearer(credential))).json()["error"]["code"] == "revoked_api_key"
    again = await client.post(f"{ROUTE}/{order['id']}/revoke", headers=admin)
    assert again.json() == revoked.json()


async def test_every_field_arrives(client, admin, keys):
    order = {
        "tenant": "lab",
        "label": "nightly",
        "models": ["fake"],
        "routes": ["/v1/completions", "/metrics"],
        "expires_in_s": 3600,
        "requests_per_minute": 5,
        "tokens_per_minute": 6,
        "max_concurrent": 7,
        "priority": -1,
    }
    made = (await client.post(ROUTE, json=order, headers=admin)).json()
    key, _ = keys.find(made["id"])
    assert key.expires_s == key.created_s + 3600
    del order["expires_in_s"]
    assert {name: made[name] for name in order} == order
    assert key.principal.limits.max_concurrent == 7
    assert made["created"] < made["expires"]


def test_the_fields_are_those_of_the_command():
    parser = argparse.ArgumentParser()
    keys_command.add_arguments(parser)
    given = vars(parser.parse_args(["add"]))
    renamed = {"admin": "is_admin", "expires_in": "expires_in_s"}
    flags = {renamed.get(name, name) for name in given} - {"action", "json", "database"}
    assert flags == set(KeyOrder.model_fields)


async def test_tokens_used_are_summed(client, admin, access):
    made = (await client.post(ROUTE, json={"tenant": "bank"}, headers=admin)).json()
    body = {"model": "fake", "prompt": "abc"}
    usage = (await client.post("/v1/completions", json=body, headers=bearer(made["key"]))).json()["usage"]
    await access.ledger.flush()
    cards = (await client.get(ROUTE, headers=admin)).json()["data"]
    card = next(card for card in cards if card["id"] == made["id"])
    assert card["usage"] == {"prompt_tokens": usage["prompt_tokens"], "generated_tokens": usage["completion_tokens"]}


async def test_only_administrators_may_whatever_routes_a_key_names(client, admin, keys):
    clerk, _ = keys.add(Principal(key_id=None, tenant="bank"))
    climber, _ = keys.add(Principal(key_id=None, tenant="bank", routes=(ROUTE, f"{ROUTE}/{{key_id}}/revoke")))
    before = len(keys.all())
    for key in (clerk, climber):
        for method, path in (("GET", ROUTE), ("POST", ROUTE), ("POST", f"{ROUTE}/aaaaaaaaaa/revoke")):
            answer = await client.request(method, path, json={"is_admin": True}, headers=bearer(key))
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "route_not_permitted")
    assert len(keys.all()) == before
    named = await client.post(ROUTE, json={"routes": [ROUTE]}, headers=admin)
    assert (named.status_code, named.json()["error"]["param"]) == (400, "routes")


async def test_where_no_key_is_asked_for_nobody_makes_one(state, keys, open_app):
    """Else any program of the machine could make itself the administrator."""
    client = await open_app(FakeEngine(), access=make_access(state), state=state)
    for method, path in (("GET", ROUTE), ("POST", ROUTE), ("POST", f"{ROUTE}/aaaaaaaaaa/revoke")):
        answer = await client.request(method, path, json={"is_admin": True})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "no_administrator")
        assert "seamount init" in answer.json()["error"]["message"]
    assert keys.all() == []


@pytest.mark.parametrize(
    ("order", "param"),
    [
        ({"tenant": "a b"}, "tenant"),
        ({"tenant": ""}, "tenant"),
        ({"label": "two\nlines"}, "label"),
        ({"is_admin": True, "models": ["m"]}, "is_admin"),
        ({"models": []}, "models"),
        ({"models": [""]}, "models"),
        ({"routes": ["/healthz"]}, "routes"),
        ({"routes": ["/v1/nowhere"]}, "routes"),
        ({"expires_in_s": 0}, "expires_in_s"),
        ({"expires_in_s": 2**63}, "expires_in_s"),
        ({"requests_per_minute": -1}, "requests_per_minute"),
        ({"tokens_per_minute": 2**63}, "tokens_per_minute"),
        ({"max_concurrent": True}, "max_concurrent"),
        ({"priority": 2}, "priority"),
        ({"key": "sm-mine"}, "key"),
    ],
)
async def test_a_wrong_order_makes_no_key_and_names_its_fault(client, admin, keys, order, param):
    answer = await client.post(ROUTE, json=order, headers=admin)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].partition("[")[0] == param
    assert len(keys.all()) == 1


@pytest.mark.parametrize("key_id", ["aaaaaaaaaa", "..%2f..", "x" * 65, "%00", "'%20OR%201=1"])
async def test_a_key_that_is_not_there_cannot_be_revoked(client, admin, keys, key_id):
    answer = await client.post(f"{ROUTE}/{key_id}/revoke", headers=admin)
    assert answer.status_code in (400, 404)
    assert keys.all()[0].revoked_s is None


def test_the_document_describes_the_routes():
    document = create_app(FakeEngine(), ByteEncoder(), ServerConfig()).openapi()
    made = document["paths"][ROUTE]["post"]["responses"]["200"]["content"]["application/json"]["schema"]
    assert json.dumps(made).endswith('NewKey"}')
