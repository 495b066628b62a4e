"""The door: every route has a rule, who passes which, and what those who do not are told."""

from __future__ import annotations

import logging
from collections.abc import Collection

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.routing import Mount, Route

from seamount.core.errors import BackendError, ConfigError, StateUnavailableError, UnauthenticatedError
from seamount.core.identity import Principal
from seamount.core.settings import ServerConfig
from seamount.engine.fake import FakeEngine, say
from seamount.engine.fake_encoder import ByteEncoder
from seamount.server.app import create_app
from seamount.server.door import access as access_module
from seamount.server.door.access import RULES, Access, Decision, Rule, check_rules, permitted

CHAT = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}
ADMIN = Principal(key_id="a", tenant="admin", is_admin=True)
CLERK = Principal(key_id="c", tenant="bank")
SCRAPER = Principal(key_id="s", tenant="ops", routes=("/metrics",))
WRITER = Principal(key_id="w", tenant="bank", routes=("/v1/completions",))
OTHER_MODEL = Principal(key_id="o", tenant="bank", models=("another", "yet-another"))
KNOWN = {"admin": ADMIN, "clerk": CLERK, "scraper": SCRAPER, "writer": WRITER, "other": OTHER_MODEL}


class Names:
    """Takes a caller's name as their proof."""

    def __init__(self) -> None:
        self.asked: list[str | None] = []

    async def authenticate(self, credential: str | None, peer: str | None) -> Principal:
        self.asked.append(credential)
        if credential not in KNOWN:
            raise UnauthenticatedError("Nobody knows you.", hint="Be somebody.")
        return KNOWN[credential]

    async def ended(self, key_ids: Collection[str]) -> dict[str, UnauthenticatedError]:
        return {}


def bearer(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer {name}"}


def every_route() -> list[tuple[str, str, str]]:
    """Return (method, a path that fits, rule's spelling) for every route, whatever is added later."""
    found = []
    for route in create_app(FakeEngine(), ByteEncoder(), ServerConfig()).routes:
        assert isinstance(route, Route | Mount)
        path = route.path if isinstance(route, Route) else f"{route.path}/app.js"
        methods = (route.methods or {"GET"}) - {"HEAD"} if isinstance(route, Route) else {"GET"}
        path = path.replace("{model:path}", "org/x")
        found += [(method, path.replace("{", "").replace("}", ""), route.path) for method in sorted(methods)]
    return found


@pytest.mark.parametrize(("method", "path", "spelling"), every_route())
async def test_nobody_unknown_gets_past_any_route_that_is_not_public(open_app, method, path, spelling):
    client = await open_app(FakeEngine(), access=Access(Names()))
    for asked in {method, "GET", "POST", "DELETE", "HEAD"}:
        answer = await client.request(asked, path)
        assert (answer.status_code == 401) is (RULES[spelling] is not Rule.PUBLIC), (asked, path)
    if RULES[spelling] is not Rule.PUBLIC:
        assert (await client.request(method, path, headers=bearer("admin"))).status_code not in (401, 403)


def test_what_is_public_is_this():
    """A route that becomes public does so on purpose, here too."""
    public = {path for path, rule in RULES.items() if rule is Rule.PUBLIC}
    health = {"/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"}
    reflection = {"/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"}
    pages = {"/", "/console", "/openapi.json", "/docs", "/docs/static"}
    assert public == {"/healthz", "/readyz"} | pages | health | reflection


def test_every_rule_has_its_route():
    routes = create_app(FakeEngine(), ByteEncoder(), ServerConfig()).routes
    over_http = {path for path in RULES if not path.startswith(("/seamount.", "/grpc."))}  # the others: see test_grpc
    assert {route.path for route in routes} == over_http


def test_a_route_without_a_rule_keeps_the_server_from_starting(monkeypatch):
    rules = {path: rule for path, rule in RULES.items() if path != "/v1/completions"}
    monkeypatch.setattr(access_module, "RULES", rules)
    with pytest.raises(ConfigError, match="no rule: /v1/completions"):
        create_app(FakeEngine(), ByteEncoder(), ServerConfig())
    app = FastAPI(docs_url=None, redoc_url=None)
    app.mount("/hidden", FastAPI())
    with pytest.raises(ConfigError, match="/hidden"):
        check_rules(app.routes)


async def test_a_route_that_was_added_behind_the_check_is_nobodys():
    assert not permitted(None, "/v1/new", ADMIN)


@pytest.mark.parametrize(
    ("who", "method", "path", "status"),
    [
        ("clerk", "POST", "/v1/chat/completions", 200),
        ("clerk", "GET", "/v1/models", 200),
        ("clerk", "GET", "/metrics", 403),
        ("clerk", "GET", "/nowhere", 404),
        ("clerk", "GET", "/v1/chat/completions", 405),
        ("admin", "GET", "/metrics", 200),
        ("scraper", "GET", "/metrics", 200),
        ("scraper", "HEAD", "/metrics", 200),
        ("scraper", "GET", "/v1/models", 403),
        ("scraper", "GET", "/healthz", 200),
        ("writer", "POST", "/v1/chat/completions", 403),
        ("writer", "GET", "/v1/completions", 405),
        ("stranger", "GET", "/nowhere", 401),
        ("stranger", "GET", "/healthz", 200),
        ("stranger", "OPTIONS", "/v1/models", 401),
        ("stranger", "GET", "/healthz/", 401),
        ("stranger", "GET", "/HEALTHZ", 401),
        ("stranger", "GET", "/console/../metrics", 401),
        ("stranger", "GET", "/console/%2e%2e/metrics", 404),
        ("stranger", "GET", "/%6detrics", 401),
    ],
)
async def test_who_may_go_where(open_app, who, method, path, status):
    client = await open_app(FakeEngine(say("ok")), access=Access(Names()))
    body = CHAT if method == "POST" else None
    answer = await client.request(method, path, json=body, headers=bearer(who))
    assert answer.status_code == status


async def test_refusals_have_openais_form(open_app):
    client = await open_app(FakeEngine(), access=Access(Names()))
    nothing = await client.get("/v1/models")
    assert nothing.json() == {
        "error": {
            "message": "Nobody knows you. Be somebody.",
            "type": "invalid_request_error",
            "param": None,
            "code": "invalid_api_key",
        }
    }
    assert nothing.headers["www-authenticate"] == 'Bearer realm="seamount"'
    assert nothing.headers["x-request-id"]
    wrong = await client.get("/v1/models", headers=bearer("nobody"))
    assert wrong.headers["www-authenticate"] == 'Bearer realm="seamount", error="invalid_token"'
    forbidden = await client.get("/v1/models", headers=bearer("scraper"))
    error = forbidden.json()["error"]
    assert (forbidden.status_code, error["type"], error["code"]) == (403, "permission_error", "route_not_permitted")
    assert "www-authenticate" not in forbidden.headers


@pytest.mark.parametrize(
    ("headers", "asked"),
    [
        ([], None),
        ([("authorization", "Bearer k")], "k"),
        ([("authorization", "bearer   k ")], "k"),
        ([("x-api-key", "k")], "k"),
        ([("authorization", "Bearer k"), ("x-api-key", "k")], "k"),
        ([("authorization", "Bearer k"), ("x-api-key", "other")], "k, other"),
        ([("authorization", "Bearer k"), ("authorization", "Bearer other")], "k, other"),
        ([("authorization", "Basic eDp5")], "Basic eDp5"),
        ([("authorization", "k")], "k"),
        ([("authorization", "Bearer "), ("x-api-key", "")], None),
    ],
)
async def test_proof_is_read_from_both_headers_and_two_that_differ_prove_nothing(open_app, headers, asked):
    names = Names()
    client = await open_app(FakeEngine(), access=Access(names))
    await client.get("/v1/models", headers=headers)
    assert names.asked == [asked]


async def test_a_key_for_other_models_sees_and_uses_none_here(open_app):
    client = await open_app(FakeEngine(say("ok")), access=Access(Names()))
    assert (await client.get("/v1/models", headers=bearer("other"))).json()["data"] == []
    assert len((await client.get("/v1/models", headers=bearer("clerk"))).json()["data"]) == 1
    refused = []
    for model in ("fake", "no-such-model"):
        refused.append(await client.get(f"/v1/models/{model}", headers=bearer("other")))
        refused.append(
            await client.post("/v1/chat/completions", json={**CHAT, "model": model}, headers=bearer("other"))
        )
    assert {answer.status_code for answer in refused} == {403}
    assert len({answer.text for answer in refused}) == 1
    assert refused[0].json()["error"]["code"] == "model_not_permitted"
    its_own = await client.post("/v1/completions", json={"model": "another", "prompt": "x"}, headers=bearer("other"))
    assert its_own.json()["error"]["code"] == "model_not_found"


def _takes_a_model(route: object) -> bool:
    fields = (
        [field.field_info.annotation for field in route.dependant.body_params] if isinstance(route, APIRoute) else []
    )
    return any("model" in getattr(kind, "model_fields", {}) for kind in fields)


async def test_every_route_that_takes_a_model_asks_whether_the_key_may_use_it(open_app):
    """A body that fits no schema is refused before; so each such route needs a body here."""
    bodies = {
        "/v1/chat/completions": CHAT,
        "/v1/completions": {"model": "fake", "prompt": "x"},
        "/v1/embeddings": {"model": "fake", "input": "x"},
        "/v1/responses": {"model": "fake", "input": "x"},
        "/v1/messages": {**CHAT, "max_tokens": 1},
        "/v1/messages/count_tokens": CHAT,
        "/v1/tokenize": {"model": "fake", "prompt": "x"},
        "/v1/detokenize": {"model": "fake", "tokens": [1]},
    }
    routes = create_app(FakeEngine(), ByteEncoder(), ServerConfig()).routes
    assert {route.path for route in routes if _takes_a_model(route)} == set(bodies)
    client = await open_app(FakeEngine(say("ok")), access=Access(Names()))
    for path, body in bodies.items():
        answer = await client.post(path, json=body, headers=bearer("other"))
        # Anthropic's form has no code.
        told = (answer.status_code, answer.json()["error"].get("code", "model_not_permitted"))
        assert told == (403, "model_not_permitted"), path


async def test_without_an_administrator_only_this_machine_is_answered(open_app):
    near = await open_app(FakeEngine(), host="0.0.0.0")
    assert (await near.get("/v1/models", headers=bearer("whatever"))).status_code == 200
    assert (await near.get("/metrics")).status_code == 200
    far = await open_app(FakeEngine(), host="0.0.0.0", peer="10.0.0.9")
    answer = await far.get("/v1/models")
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "loopback_only")
    assert (await far.get("/healthz")).status_code == 200


async def test_keys_that_cannot_be_read_now_are_no_ones_fault_and_open_nothing(open_app):
    class Locked:
        async def authenticate(self, credential: str | None, peer: str | None) -> Principal:
            raise StateUnavailableError("It is locked.", code="state_busy", retry_after=2)

    client = await open_app(FakeEngine(), access=Access(Locked()))
    answer = await client.get("/v1/models", headers=bearer("admin"))
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
    assert (await client.get("/readyz")).status_code == 200


async def test_the_auditor_hears_of_every_decision_and_of_no_credential(open_app):
    heard: list[Decision] = []
    client = await open_app(FakeEngine(say("ok")), access=Access(Names(), audit=heard.append))
    await client.get("/healthz", headers=bearer("clerk"))
    await client.post("/v1/chat/completions", json=CHAT, headers={**bearer("clerk"), "x-request-id": "r-1"})
    await client.get("/v1/models/a/b", headers=bearer("scraper"))
    await client.get("/nowhere", headers=bearer("secret-of-a-stranger"))
    told = [(d.visit.method, d.visit.route, d.principal and d.principal.key_id, d.code) for d in heard]
    assert told == [
        ("GET", "/healthz", None, "ok"),
        ("POST", "/v1/chat/completions", "c", "ok"),
        ("GET", "/v1/models/{model:path}", "s", "route_not_permitted"),
        ("GET", None, None, "invalid_api_key"),
    ]
    assert heard[1].visit.request_id == "r-1"
    assert heard[1].visit.peer == "127.0.0.1"
    assert "secret" not in repr(heard)


async def test_an_auditor_that_fails_lets_nobody_in(open_app):
    def full(decision: Decision) -> None:
        raise BackendError("The audit log is full.")

    client = await open_app(FakeEngine(), access=Access(Names(), audit=full))
    assert (await client.get("/v1/models", headers=bearer("admin"))).status_code == 502


async def test_refusals_are_logged_without_the_credential(open_app, caplog):
    caplog.set_level(logging.DEBUG)
    client = await open_app(FakeEngine(), access=Access(Names()))
    await client.get("/v1/models", headers=bearer("secret-of-a-stranger"))
    await client.get("/v1/models", headers=bearer("scraper"))
    assert "refused invalid_api_key: GET /v1/models from 127.0.0.1, key -" in caplog.text
    assert "refused route_not_permitted: GET /v1/models from 127.0.0.1, key s" in caplog.text
    assert "secret" not in caplog.text


def test_the_document_says_which_routes_take_a_key():
    document = create_app(FakeEngine(), ByteEncoder(), ServerConfig()).openapi()
    assert document["components"]["securitySchemes"]["api_key"]["scheme"] == "bearer"
    keyed = {path for path, item in document["paths"].items() if all("security" in op for op in item.values())}
    assert keyed == {"/metrics", "/v1/models", "/v1/models/{model}", "/v1/chat/completions", "/v1/completions"} | {
        "/v1/admin/keys",
        "/v1/admin/keys/{key_id}/revoke",
        "/v1/batches",
        "/v1/batches/{batch_id}",
        "/v1/batches/{batch_id}/cancel",
        "/v1/embeddings",
        "/v1/files",
        "/v1/files/{file_id}",
        "/v1/files/{file_id}/content",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/v1/tokenize",
        "/v1/detokenize",
        "/v1/responses",
        "/v1/responses/{response_id}",
        "/v1/responses/{response_id}/input_items",
        "/v1/responses/{response_id}/cancel",
    }
