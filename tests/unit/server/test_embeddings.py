"""/v1/embeddings over a scripted engine: every form of input and answer, every refusal, limits and counts."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import struct

import pytest

from seamount.core.embedding import EmbeddingFacts, floats_of
from seamount.core.errors import EngineError
from seamount.core.identity import Limits, Principal
from seamount.core.requests import Request
from seamount.engine.fake import FAKE_FACTS, FakeEngine
from seamount.engine.fake_encoder import ByteEncoder
from seamount.server.door.access import Access

HOW = EmbeddingFacts(pooling="last", normalize=True, num_dimensions=3, shorter_dimensions=(2,), max_tokens=64)
FACTS = dataclasses.replace(FAKE_FACTS, embedding=HOW, generates=False)
BOS = ByteEncoder.bos_token_id


def engine(**more) -> FakeEngine:
    return FakeEngine(facts=FACTS, **more)


async def ask(client, input, **more):
    body = json.dumps({"model": "fake", "input": input, **more})
    return await client.post("/v1/embeddings", content=body, headers={"content-type": "application/json"})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("abc", [[BOS, 99, 4]]),
        (["abc", "z"], [[BOS, 99, 4], [BOS, 122, 2]]),
        ([7, 8, 9, 10], [[7, 10, 4]]),
        ([[7, 8], [9]], [[7, 8, 2], [9, 9, 1]]),
    ],
)
async def test_every_form_of_input_in_order(open_app, given, expected):
    client = await open_app(engine())
    answer = await ask(client, given)
    assert answer.status_code == 200
    body = answer.json()
    assert [item["embedding"] for item in body["data"]] == expected
    assert [(item["index"], item["object"]) for item in body["data"]] == [
        (number, "embedding") for number in range(len(expected))
    ]
    num_tokens = sum(row[2] for row in expected)
    assert body["usage"] == {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    assert (body["object"], body["model"]) == ("list", "fake")


async def test_a_short_queue_refuses_no_long_list(open_app):
    client = await open_app(FakeEngine(facts=dataclasses.replace(FACTS, max_num_seqs=2)), max_waiting=1)
    assert len((await ask(client, ["x"] * 50)).json()["data"]) == 50


async def test_they_have_no_first_token(open_app):
    client = await open_app(engine())
    await ask(client, ["a", "b"])
    text = (await client.get("/metrics")).text
    labels = '{engine="0",model_name="fake"}'
    assert f"vllm:e2e_request_latency_seconds_count{labels} 2.0" in text
    for name in ("time_to_first_token_seconds", "request_decode_time_seconds", "request_generation_tokens"):
        assert f"vllm:{name}_count" not in text


async def test_more_inputs_than_run_side_by_side_come_in_order(open_app):
    client = await open_app(engine())
    texts = ["x" * (1 + number % 50) for number in range(2048)]
    answer = (await ask(client, texts)).json()
    assert [item["embedding"][2] for item in answer["data"]] == [len(text) + 1 for text in texts]
    assert answer["usage"]["total_tokens"] == sum(len(text) + 1 for text in texts)


async def test_a_name_like_a_part_of_the_answer_changes_nothing(open_app):
    name = 'x","data":[],"y'
    client = await open_app(engine(), served_model_name=name)
    answer = (await ask(client, ["abc", "z"], model=name)).json()
    assert (answer["model"], len(answer["data"])) == (name, 2)


async def test_base64_is_the_same_numbers_as_float32(open_app):
    client = await open_app(engine(embed=lambda request: [0.1, -2.5e-7, 3.0]))
    plain = (await ask(client, "a", encoding_format="float")).json()["data"][0]["embedding"]
    packed = (await ask(client, "a", encoding_format="base64")).json()["data"][0]["embedding"]
    assert floats_of(base64.b64decode(packed)) == plain
    assert base64.b64decode(packed) == struct.pack("<3f", 0.1, -2.5e-7, 3.0)


async def test_fewer_dimensions_where_the_model_offers_them(open_app):
    client = await open_app(engine())
    assert (await ask(client, "abc", dimensions=2)).json()["data"][0]["embedding"] == [BOS, 99]
    assert len((await ask(client, "abc", dimensions=3)).json()["data"][0]["embedding"]) == 3
    answer = await ask(client, "abc", dimensions=1)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "dimensions")
    assert "2 or 3" in answer.json()["error"]["message"]


async def test_dimensions_are_refused_where_nothing_promises_them(open_app):
    how = dataclasses.replace(HOW, shorter_dimensions=None)
    client = await open_app(FakeEngine(facts=dataclasses.replace(FACTS, embedding=how)))
    answer = await ask(client, "abc", dimensions=2)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "dimensions")
    assert (await ask(client, "abc", dimensions=3)).status_code == 200


@pytest.mark.parametrize(
    ("given", "param", "says"),
    [
        ("", "input", "empty"),
        ([], "input", "list"),
        (["a", ""], "input", "entry 1"),
        (["a", 5], "input", "entry 1"),
        ([1, "a"], "input", "integers"),
        ([[1], "a"], "input", "entry 1"),
        ([[1], []], "input", "entry 1"),
        ([1.5], "input", "entry 0"),
        ([True], "input", "entry 0"),
        ([1, True], "input", "integers"),
        ([-1], "input", "integers"),
        ([2**31], "input", "integers"),
        ({"a": 1}, "input", "string"),
        (None, "input", "string"),
        (["a"] * 2049, "input", "2048"),
        (["ok", "\ud800"], "input", "Unicode"),
        (["ok", "x" * 64], "input[1]", "at most 64"),
        (["ok", "x" * 5000], "input[1]", "64"),
        ([[1], [2] * 65], "input[1]", "at most 64"),
        ([[1], [262]], "input[1]", "vocabulary ends at 261"),
    ],
)
async def test_an_input_that_cannot_be_is_refused_and_named(open_app, given, param, says):
    scripted = engine()
    client = await open_app(scripted)
    answer = await ask(client, given)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param
    assert says in error["message"]
    assert (await scripted.stats()).num_prompt_tokens == 0


@pytest.mark.parametrize("field", ["encoding_format", "dimensions", "prompt"])
async def test_other_parameters_are_checked(open_app, field):
    client = await open_app(engine())
    answer = await ask(client, "a", **{field: "x"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)


async def test_user_is_ignored_and_said_to_be(open_app):
    client = await open_app(engine())
    assert (await ask(client, "a", user="me")).headers["x-seamount-ignored"] == "user"
    assert "x-seamount-ignored" not in (await ask(client, "a")).headers


async def test_a_model_for_text_is_refused_with_a_hint(open_app):
    client = await open_app(FakeEngine())
    answer = await ask(client, "a")
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "not_an_embedding_model", "model")
    assert "modules.json" in error["message"]


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/v1/completions", {"prompt": "hi"}),
    ],
)
async def test_a_model_without_a_head_refuses_text(open_app, route, body):
    client = await open_app(engine())
    answer = await client.post(route, json={"model": "fake", **body})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "not_a_generative_model")
    assert "/v1/embeddings" in error["message"]


async def test_another_models_name_is_not_found(open_app):
    client = await open_app(engine())
    answer = await client.post("/v1/embeddings", json={"model": "other", "input": "a"})
    assert answer.status_code == 404


async def test_a_failure_of_one_text_fails_the_request_and_ends_the_others(open_app):
    scripted = engine(fail_after_tokens=0, failure=EngineError("It broke."))
    client = await open_app(scripted)
    answer = await ask(client, ["a", "b", "c"])
    assert (answer.status_code, answer.json()["error"]["message"]) == (500, "It broke.")
    assert (await scripted.stats()).num_running == 0


async def test_prompts_are_counted_in_metrics(open_app):
    client = await open_app(engine(num_cached_tokens=1))
    await ask(client, ["abc", "de"])
    text = (await client.get("/metrics")).text
    assert 'vllm:prompt_tokens_total{engine="0",model_name="fake"} 7.0' in text
    assert 'vllm:request_success_total{engine="0",finished_reason="stop",model_name="fake"} 2.0' in text
    assert (
        'vllm:generation_tokens_total{engine="0",model_name="fake"} 0.0' in text
        or "generation_tokens_total{" not in text
    )


class Keyed:
    """Everybody is the holder of one key."""

    def __init__(self, **limits: int) -> None:
        self.who = Principal(key_id="k", tenant="t", limits=Limits(**limits))

    async def authenticate(self, credential, peer):
        return self.who

    async def ended(self, key_ids):
        return {}


async def test_a_keys_tokens_are_taken_for_all_texts_or_nothing_is_begun(open_app):
    scripted = engine()
    client = await open_app(scripted, access=Access(Keyed(tokens_per_minute=100)))
    answer = await ask(client, ["x" * 49, "x" * 29])
    assert answer.status_code == 200
    assert answer.headers["x-ratelimit-remaining-tokens"] == "20"
    before = (await scripted.stats()).num_prompt_tokens
    answer = await ask(client, ["x" * 9, "x" * 9, "x" * 9])
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "tokens_per_minute_exceeded")
    assert int(answer.headers["retry-after"]) >= 1
    assert (await scripted.stats()).num_prompt_tokens == before
    assert (await ask(client, ["x" * 9, "x" * 8])).status_code == 200


async def test_a_failed_requests_tokens_are_given_back(open_app):
    client = await open_app(engine(fail_after_tokens=0), access=Access(Keyed(tokens_per_minute=100)))
    answer = await ask(client, "x" * 49)
    assert answer.status_code == 500
    assert answer.headers["x-ratelimit-remaining-tokens"] == "100"


async def test_texts_share_prefixes_within_a_tenant_only(open_app):
    salts = []

    def embed(request: Request) -> list[float]:
        salts.append(request.cache_salt)
        return [1.0]

    who = Keyed()
    client = await open_app(engine(embed=embed), access=Access(who))
    await ask(client, ["a", "b"])
    who.who = Principal(key_id="l", tenant="u")
    await ask(client, "a")
    assert salts[0] == salts[1] != salts[2]
    assert all(salts)


async def test_a_client_that_leaves_stops_the_rest(open_app):
    held, begun = asyncio.Event(), 0

    async def pause() -> None:
        nonlocal begun
        begun += 1
        await held.wait()

    scripted = engine(pause=pause)
    client = await open_app(scripted)
    asking = asyncio.create_task(ask(client, ["a"] * 100))
    while not begun:
        await asyncio.sleep(0)
    running = (await scripted.stats()).num_running
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert 0 < running <= 32
    assert (await scripted.stats()).num_running == 0
    assert begun <= 32
