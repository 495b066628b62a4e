"""Twelve lessons that other inference servers had to learn from CVEs, each a test that is named after it.

Those that touch the server are below. Elsewhere stand, with the rest of what they test:

1.  Pickle over sockets (CVE-2025-32444, 2024-50050, 2025-30165, 2026-3059): here for the source; the messages between
    processes in `unit/core/test_codec.py`.
2.  `weights_only` bypassed (CVE-2025-32434, 2026-24747): `unit/models/test_checkpoint.py`, pickle is never opened.
3.  `trust_remote_code` bypassed (CVE-2025-66448, 2026-22807, 2026-27893): here for the source and for a folder with
    code; `unit/ops/test_inspection.py` says what is ignored.
4.  Template code in metadata (CVE-2026-5760, 2024-34359, 2025-61620): here for clients; the sandbox in
    `unit/models/test_template.py` and `fuzz/test_template.py`.
5.  URL fetching (CVE-2026-24779): here.
6.  Image decoders (CVE-2026-22778): here; there is none.
7.  Unbounded `n` and `best_of` (CVE-2026-34756): here, for every integer of every route.
8.  Unbounded log-probabilities: here.
9.  Key comparison timing (CVE-2025-59425): `unit/security/test_authenticators.py`; here over HTTP.
10. Routes that skip authentication (vllm 58144, 42591): `unit/server/test_access.py`, every route; here at a real
    socket.
11. Tool-schema crash (CVE-2025-48944), client tensors (2025-62164): here; bombs in `unit/engine/test_grammar.py`. The
    cache's side channel (2025-46570): `integration/test_tenant_isolation.py`.
12. Path traversal by digest or name (CVE-2024-37032): here; file names of checkpoints in
    `unit/models/test_checkpoint.py`, GGUF out of bounds (2026-7482) in `unit/models/test_gguf.py` and
    `fuzz/test_gguf_files.py`.
"""

from __future__ import annotations

import ast
import asyncio
import hmac
import json
import re
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import seamount
from seamount.cli.wire import make_access
from seamount.core.database import Database
from seamount.core.settings import ServerConfig
from seamount.core.state import open_state
from seamount.engine.fake import FakeEngine, say
from seamount.engine.fake_encoder import ByteEncoder
from seamount.models.prompt import PromptEncoder
from seamount.security import authenticators
from seamount.security.keys import ApiKeys
from seamount.server.app import create_app
from seamount.server.door.access import RULES, Rule

SOURCE = Path(seamount.__file__).parent
ODD_INTEGERS = (-(2**63) - 1, -(2**31), -1, 2**31, 2**32, 2**63, 2**64, 10**30)
CHAT = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}
CHAT_PATH = "/v1/chat/completions"
DOCUMENT = create_app(FakeEngine(), ByteEncoder(), ServerConfig()).openapi()


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Database]:
    database = open_state(str(tmp_path / "state.db"))
    yield database
    database.close()


@pytest.fixture
async def http(state, serve) -> AsyncIterator[httpx.AsyncClient]:
    """An administrator's client of a real server."""
    key, _ = ApiKeys(state).add_first_administrator(tenant="admin", label="")
    running = await serve(FakeEngine(say("ok")), access=make_access(state), state=state)
    headers = {"authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(base_url=running.url, headers=headers, timeout=60) as client:
        yield client


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module} | {f"{node.module}.{name.name}" for name in node.names}
    return found


def calls(path: Path) -> set[str]:
    return {
        ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)
    }


def test_1_and_2_no_module_can_unpickle():
    banned = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
    found = {
        str(path.relative_to(SOURCE)): wrong
        for path in SOURCE.rglob("*.py")
        if (
            wrong := {name for name in imports(path) if name.partition(".")[0] in banned}
            | (calls(path) & {"torch.load"})
        )
    }
    assert found == {}
    # numpy reads no pickles unless it is told to.
    assert [
        path for path in SOURCE.rglob("*.py") if re.search(r"allow_pickle\s*=\s*True", path.read_text("utf-8"))
    ] == []


def test_3_nothing_of_a_model_folder_is_executed(small_checkpoint: Path, tmp_path: Path):
    folder = tmp_path / "with-code"
    folder.mkdir()
    for file in small_checkpoint.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    mark = tmp_path / "executed"
    code = f"open({str(mark)!r}, 'w').close()\n"
    for name in ("modeling_x.py", "configuration_x.py", "tokenization_x.py", "torch.py", "__init__.py"):
        (folder / name).write_text(code)
    for name in ("config.json", "tokenizer_config.json"):
        config = json.loads((folder / name).read_text())
        config["auto_map"] = {"AutoModelForCausalLM": "modeling_x.X", "AutoTokenizer": ["tokenization_x.X", None]}
        (folder / name).write_text(json.dumps(config))
    encoder = PromptEncoder.from_folder(folder)
    assert encoder.encode_chat([{"role": "user", "content": "hi"}]).token_ids
    encoder.close()
    assert not mark.exists()
    assert not {name for path in SOURCE.rglob("*.py") for name in calls(path)} & {"eval", "exec", "__import__"}


@pytest.mark.parametrize(
    "given",
    [
        {"chat_template": "{{ ''.__class__ }}"},
        {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
        {"chat_template_kwargs": {"messages": []}},
        {"chat_template_kwargs": {"tools": []}},
        {"template": "{{ 1 }}"},
        {"documents": [{"text": "{{ 1 }}"}]},
    ],
)
async def test_4_clients_bring_no_template(serve, small_checkpoint, given):
    running = await serve(FakeEngine(say("ok")), PromptEncoder.from_folder(small_checkpoint), served_model_name="fake")
    async with httpx.AsyncClient(base_url=running.url) as client:
        answer = await client.post(CHAT_PATH, json={**CHAT, **given})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"].partition(".")[0] == next(iter(given))
        # And a template within a message is text.
        messages = [{"role": "user", "content": "{{ 7 * 7 }}{% for x in range(10**9) %}{% endfor %}"}]
        assert (await client.post(CHAT_PATH, json={**CHAT, "messages": messages})).status_code == 200


async def test_5_no_url_is_fetched_and_6_no_image_decoded(http):
    """A listener stands by for whoever would fetch."""
    with socket.socket() as trap:
        trap.bind(("127.0.0.1", 0))
        trap.listen()
        trap.setblocking(False)
        url = f"http://127.0.0.1:{trap.getsockname()[1]}/x.png"
        parts = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}},
            {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
            {"type": "video_url", "video_url": {"url": url}},
            {"type": "file", "file": {"file_data": url}},
            {"type": "file", "file": {"filename": "/etc/passwd"}},
        ]
        for part in parts:
            messages = [{"role": "user", "content": [part]}]
            answer = await http.post(CHAT_PATH, json={**CHAT, "messages": messages})
            assert answer.status_code == 400, part
            assert answer.json()["error"]["param"].startswith("messages[0].content")
            assert "root:" not in answer.text
        schema = {"$ref": url, "type": "object", "properties": {"x": {"$ref": f"{url}#/definitions/x"}}}
        tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        for more in ({"tools": [tool]}, {"response_format": form}, {"model": url}, {"model": "file:///etc/passwd"}):
            assert (await http.post(CHAT_PATH, json={**CHAT, **more})).status_code < 500
        with pytest.raises(BlockingIOError):
            trap.accept()


# --- 7: every integer of every route ---


def resolved(schema: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in schema:
        schema = DOCUMENT["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return schema


def integers(schema: dict[str, Any], path: tuple[str, ...] = (), seen: tuple[str, ...] = ()) -> Iterator[Any]:
    """Yield (path, schema) of each integer in a schema; "[]" and "{}" in a path are items and values."""
    if "$ref" in schema:
        if schema["$ref"] in seen:
            return
        seen = (*seen, schema["$ref"])
    schema = resolved(schema)
    if schema.get("type") == "integer" and "const" not in schema and "enum" not in schema:
        yield path, schema
    for arm in (*schema.get("anyOf", ()), *schema.get("oneOf", ()), *schema.get("allOf", ())):
        yield from integers(arm, path, seen)
    for name, inner in schema.get("properties", {}).items():
        yield from integers(inner, (*path, name), seen)
    if isinstance(schema.get("items"), dict):
        yield from integers(schema["items"], (*path, "[]"), seen)
    if isinstance(schema.get("additionalProperties"), dict):
        yield from integers(schema["additionalProperties"], (*path, "{}"), seen)


def operations() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, item in DOCUMENT["paths"].items():
        for method, operation in item.items():
            if method in ("get", "post", "put", "patch", "delete"):
                yield path, method, operation


def taken_integers() -> list[tuple[str, str, tuple[str, ...], dict[str, Any]]]:
    """Every integer that a client can send: in bodies, queries and paths."""
    found = []
    for path, method, operation in operations():
        for kind in operation.get("requestBody", {}).get("content", {}).values():
            found += [(path, method, where, schema) for where, schema in integers(kind.get("schema", {}))]
        for parameter in operation.get("parameters", ()):
            where = (parameter["in"], parameter["name"])
            found += [(path, method, where, schema) for _, schema in integers(parameter["schema"])]
    return found


def least(schema: dict[str, Any], depth: int = 0) -> Any:
    """Return a smallest value that fits a schema, as far as a schema tells."""
    schema = resolved(schema)
    if depth > 8:
        return None
    for arms in ("anyOf", "oneOf"):
        if arms in schema:
            return least(next(arm for arm in schema[arms] if resolved(arm).get("type") != "null"), depth + 1)
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return schema["enum"][0]
    kind = schema.get("type")
    if kind == "object":
        return {name: least(schema["properties"][name], depth + 1) for name in schema.get("required", ())}
    if kind == "array":
        return [least(schema.get("items", {}), depth + 1)]
    return {"integer": schema.get("minimum", 1), "number": 1.0, "boolean": True}.get(kind, "x")


def test_7_every_integer_that_clients_send_has_bounds():
    found = taken_integers()
    assert len(found) > 10
    lower, upper = {"minimum", "exclusiveMinimum"}, {"maximum", "exclusiveMaximum"}
    without = [(path, where) for path, _, where, schema in found if not (lower & set(schema) and upper & set(schema))]
    assert without == []
    beyond = [(path, where) for path, _, where, schema in found if schema.get("maximum", 0) > 2**63]
    assert beyond == [], "nothing behind the wire holds more than 64 bits"


@pytest.mark.parametrize("odd", ODD_INTEGERS)
async def test_7_integers_out_of_bounds_are_refused_and_named(http, odd):
    refused = 0
    for path, method, where, schema in taken_integers():
        if len(where) != 1 or method != "post":
            continue
        content = next(o for p, m, o in operations() if (p, m) == (path, method))["requestBody"]["content"]
        if "application/json" not in content:
            continue
        body = least(content["application/json"]["schema"])
        body.update({"model": "fake"} if "model" in body else {})
        answer = await http.post(path.replace("{", "").replace("}", ""), json={**body, where[0]: odd})
        assert answer.status_code < 500, (path, where, answer.text)
        if not schema.get("minimum", odd) <= odd <= schema.get("maximum", odd):
            assert answer.status_code == 400, (path, where, answer.text)
            refused += where[0] in (answer.json()["error"].get("param") or "")
    assert refused > 5


@pytest.mark.parametrize("path", [CHAT_PATH, "/v1/completions"])
@pytest.mark.parametrize("given", [{"n": 2**31}, {"n": 129}, {"best_of": 2**31}, {"n": 128, "best_of": 10**9}])
async def test_7_nobody_asks_for_more_answers_than_the_server_can_hold(http, path, given):
    body = CHAT if path == CHAT_PATH else {"model": "fake", "prompt": "x"}
    assert (await http.post(path, json={**body, **given})).status_code == 400


async def test_8_log_probabilities_are_bounded_whatever_the_word_for_all(http):
    text = {"model": "fake", "prompt": "x"}
    for count in (-1, 21, 1000, 2**31, 2**63, "all", 1e3):
        chat = await http.post(CHAT_PATH, json={**CHAT, "logprobs": True, "top_logprobs": count})
        plain = await http.post("/v1/completions", json={**text, "logprobs": count})
        of_prompt = await http.post("/v1/completions", json={**text, "prompt_logprobs": count})
        assert [one.status_code for one in (chat, plain, of_prompt)] == [400] * 3, count


async def test_9_a_key_is_compared_by_its_hash_and_in_constant_time(http, state, monkeypatch):
    compared: list[tuple[str, str]] = []
    compare_digest = hmac.compare_digest

    def compare(one: str, other: str) -> bool:
        compared.append((one, other))
        return compare_digest(one, other)

    monkeypatch.setattr(authenticators.hmac, "compare_digest", compare)
    key = http.headers["authorization"].removeprefix("Bearer ")
    tried = [key, key[:-1] + ("a" if key[-1] != "a" else "b"), "sm-aaaaaaaaaa-" + "b" * 43, "x", key + "x", "é"]
    for credential in tried:
        headers = {"authorization": b"Bearer " + credential.encode()}
        answer = await http.get("/v1/models", headers=headers)
        assert (answer.status_code == 200) is (credential == key)
    assert len(compared) == len(tried)
    for pair in compared:
        assert all(re.fullmatch(r"[0-9a-f]{64}", digest) for digest in pair)
        assert key not in pair


async def test_10_no_route_answers_without_a_key_but_those_on_the_list(http):
    public = {path for path, rule in RULES.items() if rule is Rule.PUBLIC}
    async with httpx.AsyncClient(base_url=http.base_url) as stranger:
        for path, method, _ in operations():
            asked = re.sub(r"\{[^}]*\}", "x", path)
            for given in ({}, {"authorization": "Bearer x"}, {"authorization": "Bearer"}, {"cookie": "key=x"}):
                status = (await stranger.request(method, asked, headers=given)).status_code
                assert (status == 401) is (path not in public), (method, path, given)
        for way in ("//v1/models", "/v1//models", "/V1/models", "/v1/models/", "/v1/models;x", "/./v1/models"):
            assert (await stranger.get(way)).status_code == 401, way
        for name in ("x-original-url", "x-rewrite-url", "x-forwarded-prefix", "x-http-method-override"):
            assert (await stranger.get("/v1/models", headers={name: "/healthz"})).status_code == 401


def deep(levels: int, inner: Any) -> Any:
    for _ in range(levels):
        inner = {"type": "object", "properties": {"x": inner}}
    return inner


SCHEMAS: dict[str, Any] = {
    "a type that is none": {"type": "nonsense"},
    "a pattern that is none": {"type": "string", "pattern": "("},
    "a pattern that explodes": {"type": "string", "pattern": "(a+)+$" * 200},
    "a pattern that repeats": {"type": "string", "pattern": "((((a{1,999}){1,999}){1,999}){1,999})"},
    "itself": {"$ref": "#"},
    "two that name each other": {
        "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
        "$ref": "#/$defs/a",
    },
    "depth": deep(300, {"type": "string"}),
    "width": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(5000)}},
    "numbers that are none": {"type": "object", "minProperties": -1, "maxProperties": 10**30},
    "lists for objects": {"type": ["object"], "properties": [1, 2]},
    "no object": [1, 2, 3],
    "null": None,
    "text": "string",
}


@pytest.mark.parametrize("name", SCHEMAS)
async def test_11_no_tool_schema_ends_the_server(http, name):
    schema = SCHEMAS[name]
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    for more in ({"tools": [tool]}, {"tools": [tool], "tool_choice": "required"}, {"response_format": form}):
        answer = await http.post(CHAT_PATH, json={**CHAT, **more})
        assert answer.status_code < 500, (more, answer.text)
    assert (await http.post(CHAT_PATH, json=CHAT)).status_code == 200


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, "[" * 5000 + "]" * 5000, '{"model":' + "9" * 5000 + "}"]
)
async def test_11_no_nesting_and_no_number_ends_the_server(http, text):
    answer = await http.post(CHAT_PATH, content=text, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert (await http.post(CHAT_PATH, json=CHAT)).status_code == 200


@pytest.mark.parametrize(
    "given",
    [
        {"prompt_embeds": "gASVAAAAAAAAAAA="},
        {"prompt": {"prompt_embeds": "gASV"}},
        {"prompt": [[0.5, 0.25]]},
        {"multi_modal_data": {"image": "gASV"}},
        {"mm_processor_kwargs": {}},
        {"kv_transfer_params": {"remote_host": "127.0.0.1"}},
        {"logits_processors": ["os.system"]},
        {"vllm_xargs": {}},
    ],
)
async def test_11_clients_bring_no_tensors_and_no_code(http, given):
    answer = await http.post("/v1/completions", json={"model": "fake", "prompt": "x", **given})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith(next(iter(given)))


# --- 12 ---

PATHS = (
    "/console/../../../../../../etc/passwd",
    "/console/..%2f..%2f..%2f..%2fetc%2fpasswd",
    "/console/%2e%2e/%2e%2e/app.py",
    "/console/..%5c..%5capp.py",
    "/console/....//....//app.py",
    "/console//etc/passwd",
    "/console/%00/etc/passwd",
    "/console/app.js%00.html",
    "/v1/models/../../etc/passwd",
    "/v1/models/..%2f..%2fetc%2fpasswd",
    "/v1/files/..%2f..%2fetc%2fpasswd",
    "/v1/files/..%2f..%2fetc%2fpasswd/content",
    "/v1/batches/..%2fstate.db",
    "/v1/responses/..%2fstate.db",
    "/v1/admin/keys/..%2f..%2fx/revoke",
    "/docs/static/..%2f..%2fapp.py",
    "http://127.0.0.1/../../etc/passwd",
)


@pytest.mark.parametrize("path", PATHS)
async def test_12_no_path_leaves_its_folder(http, path):
    """By a bare socket: clients tidy such paths up before they send them."""
    host, port = http.base_url.host, http.base_url.port
    for method in ("GET", "POST", "DELETE"):
        reader, writer = await asyncio.open_connection(host, port)
        head = f"{method} {path} HTTP/1.1\r\nhost: {host}:{port}\r\nauthorization: {http.headers['authorization']}\r\n"
        writer.write(f"{head}content-length: 0\r\nconnection: close\r\n\r\n".encode())
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()
        status = int(answer.split(b" ", 2)[1])
        assert 400 <= status < 500, (method, answer[:200])
        assert b"root:" not in answer and b"import " not in answer and b"SQLite" not in answer


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "sha256:../../x", "..", "a/../b", "fake/../fake", "\0"]
)
async def test_12_no_name_of_a_model_is_a_path(http, name):
    assert (await http.post(CHAT_PATH, json={**CHAT, "model": name})).status_code == 404
