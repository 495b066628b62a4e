"""The guard against foreign pages, by the address that the server is bound to."""

from __future__ import annotations

import socket

import pytest

from seamount.engine.fake import FakeEngine


async def status(client, **headers) -> int:
    return (await client.get("/healthz", headers=headers)).status_code


@pytest.mark.parametrize("bound", ["127.0.0.1", "::1", "localhost"])
async def test_on_loopback_only_this_machines_names_are_answered(open_app, bound):
    client = await open_app(FakeEngine(), host=bound)
    for host in ("localhost", "127.0.0.1:80", "127.9.9.9", "[::1]:8000", f"{socket.gethostname()}:1", "LOCALHOST"):
        assert await status(client, host=host) == 200, host
    for host in ("evil.example", "10.0.0.1", "0.0.0.0", "localhost.evil.example", "[::2]", "", "a:b:c"):
        assert await status(client, host=host) == 403, host


async def test_bound_to_the_network_any_name_is_answered_but_no_foreign_page(open_app):
    client = await open_app(FakeEngine(), host="0.0.0.0")
    assert await status(client, host="models.example:8000") == 200
    assert await status(client, host="models.example", origin="https://models.example") == 200
    assert await status(client, host="models.example", origin="https://evil.example") == 403
    assert await status(client, host="models.example", origin="file://models.example") == 403


async def test_the_refusal_says_what_to_do(open_app):
    client = await open_app(FakeEngine())
    answer = await client.get("/", headers={"host": "evil.example"})
    assert answer.json()["error"]["type"] == "permission_error"
    assert "--host" in answer.json()["error"]["message"]
    assert "evil" not in answer.text


async def test_no_cross_origin_permission_is_ever_given(open_app):
    client = await open_app(FakeEngine())
    answer = await client.options(
        "/v1/chat/completions",
        headers={"origin": "https://evil.example", "access-control-request-method": "POST"},
    )
    assert answer.status_code == 403
    assert not [name for name in answer.headers if name.startswith("access-control")]
