"""The OpenAPI document is complete, and its page is served with everything that it loads."""

from __future__ import annotations

import hashlib
import re

import pytest

from seamount.core.settings import ServerConfig
from seamount.engine.fake import FakeEngine
from seamount.engine.fake_encoder import ByteEncoder
from seamount.server import reference
from seamount.server.app import create_app
from seamount.server.door.access import RULES, Rule
from seamount.server.pages import CONTENT_SECURITY_POLICY

METHODS = {"get", "post", "put", "patch", "delete"}


@pytest.fixture(scope="module")
def document():
    return create_app(FakeEngine(), ByteEncoder(), ServerConfig()).openapi()


def operations(document):
    for path, item in document["paths"].items():
        for method, operation in item.items():
            assert method in METHODS
            yield f"{method} {path}", path, operation


def resolve(document, schema):
    while "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return schema


def test_every_operation_is_described(document):
    tags = {tag["name"] for tag in document["tags"]}
    assert all(tag["description"] for tag in document["tags"])
    for name, _, operation in operations(document):
        assert operation["summary"], name
        assert len(operation.get("description", "")) > 10, name
        assert operation["tags"] and set(operation["tags"]) <= tags, name


def test_every_operation_has_schemas_for_body_answer_and_errors(document):
    for name, _, operation in operations(document):
        responses = operation["responses"]
        assert "422" not in responses, f"{name}: the framework's own error never leaves this server"
        for status, response in responses.items():
            assert response["description"], (name, status)
            for media, content in response.get("content", {}).items():
                assert resolve(document, content["schema"]), (name, status, media)
        good = [status for status in responses if status.startswith("2")]
        assert good and any("content" in responses[status] or status == "204" for status in good), name
        error = resolve(document, responses["default"]["content"]["application/json"]["schema"])
        assert "error" in error["properties"], name
        if "requestBody" in operation:
            for content in operation["requestBody"]["content"].values():
                assert resolve(document, content["schema"]), name


def test_every_route_that_asks_for_a_key_says_so(document):
    public = {re.sub(r":path}", "}", path) for path, rule in RULES.items() if rule is Rule.PUBLIC}
    for name, path, operation in operations(document):
        assert ("security" in operation) is (path not in public), name
        assert path in public or {"401", "403", "429", "503"} <= set(operation["responses"]), name


def test_every_reference_leads_somewhere_and_nothing_is_left_of_the_frameworks_errors(document):
    schemas = document["components"]["schemas"]
    named = set(re.findall(r"#/components/schemas/([\w.-]+)", str(document)))
    assert named <= set(schemas)
    assert "HTTPValidationError" not in schemas
    assert "ChatChunk" in schemas


def test_the_document_stays_the_same_however_often_it_is_asked_for():
    app = create_app(FakeEngine(), ByteEncoder(), ServerConfig())
    assert str(app.openapi()) == str(app.openapi())


async def test_the_page_and_its_files_are_served_under_the_policy(open_app):
    client = await open_app(FakeEngine())
    page = await client.get("/docs")
    assert page.status_code == 200 and "text/html" in page.headers["content-type"]
    named = re.findall(r'(?:src|href)="(/docs/static/[^"]+)"', page.text)
    assert len(named) == 4
    for path in ("/docs", *named):
        answer = await client.get(path)
        assert answer.status_code == 200, path
        assert answer.headers["content-security-policy"] == CONTENT_SECURITY_POLICY
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert not re.search(r"<(script|style)(?![^>]*src)[^>]*>[^<]", page.text), "nothing inline"
    assert (await client.get("/docs/static/../app.py")).status_code == 404


async def test_an_installation_without_the_page_says_so(open_app, monkeypatch, tmp_path):
    monkeypatch.setattr(reference, "PAGE_FOLDER", tmp_path)
    client = await open_app(FakeEngine())
    answer = await client.get("/docs")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


def test_the_vendored_files_are_those_that_were_released():
    lines = (reference.PAGE_FOLDER / "VENDORED.txt").read_text("utf-8").splitlines()
    digests = dict(reversed(line.split()) for line in lines if re.match(r"[0-9a-f]{64}  ", line))
    assert {"swagger-ui-bundle.js", "swagger-ui.css", "LICENSE", "NOTICE"} <= set(digests)
    for name, digest in digests.items():
        assert hashlib.sha256((reference.PAGE_FOLDER / name).read_bytes()).hexdigest() == digest, name
