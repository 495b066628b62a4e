"""The official client asks a real worker with random weights for shapes: valid answers, errors that name the place."""

from __future__ import annotations

import json
import re
from pathlib import Path

import openai
import pytest

from seamount.core.settings import EngineConfig
from seamount.engine.client import WorkerEngine
from seamount.models.prompt import PromptEncoder

POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 9}, "on": {"type": "boolean"}},
    "required": ["x", "on"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "point", "schema": POINT, "strict": True}}


@pytest.fixture
async def api(serve, small_checkpoint: Path):
    """A client of a server whose model says nonsense."""
    engine = WorkerEngine(EngineConfig(model=str(small_checkpoint), num_threads=1, max_model_len=512))
    running = await serve(engine, PromptEncoder.from_folder(small_checkpoint), served_model_name="small")
    await running.service.started
    async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
        yield client


async def ask(api: openai.AsyncOpenAI, **more):
    asked = {"model": "small", "prompt": "A point: ", "max_tokens": 400, "temperature": 1.0, "seed": 5} | more
    return await api.completions.create(**asked)


async def test_a_schema_whole_and_streamed(api):
    whole = await ask(api, n=3, extra_body={"response_format": FORMAT})
    for choice in whole.choices:
        assert choice.finish_reason == "stop"
        value = json.loads(choice.text)
        assert set(value) == {"x", "on"} and value["x"] in range(10) and isinstance(value["on"], bool)
    texts = ["", "", ""]
    stream = await ask(api, n=3, stream=True, extra_body={"response_format": FORMAT})
    async for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in whole.choices]


@pytest.mark.parametrize(
    ("shape", "pattern"),
    [
        ({"regex": "[ab]{3}-[0-9]"}, "[ab]{3}-[0-9]"),
        ({"choice": ["yes", "no", "maybe so"]}, "yes|no|maybe so"),
        ({"grammar": 'start: "(" start ")" | "x"'}, r"\(*x\)*"),
        ({"json": {"enum": [1, "two"]}}, '1|"two"'),
    ],
)
async def test_other_shapes(api, shape, pattern):
    answer = await ask(api, extra_body={"structured_outputs": shape})
    assert re.fullmatch(pattern, answer.choices[0].text)
    assert answer.choices[0].finish_reason == "stop"


async def test_json_object(api):
    answer = await ask(api, max_tokens=490, extra_body={"response_format": {"type": "json_object"}})
    assert answer.choices[0].text.startswith("{")
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(answer.choices[0].text), dict)


async def test_an_answer_that_the_caller_begins_goes_on_within_its_shape(api):
    async def chat(beginning: str, **more) -> str:
        messages = [{"role": "user", "content": "A point: "}, {"role": "assistant", "content": beginning}]
        asked = {"model": "small", "messages": messages, "max_tokens": 400, "seed": 5, "response_format": FORMAT} | more
        answer = await api.chat.completions.create(**asked)
        assert answer.choices[0].finish_reason == "stop"
        return answer.choices[0].message.content

    begun = '{"x": 7, "'
    value = json.loads(begun + await chat(begun))
    assert value["x"] == 7 and set(value) == {"x", "on"}
    for wrong in ("Here you are: {", '{"x": 77', '{"x": 7, "on": true}'):
        with pytest.raises(openai.BadRequestError, match="beginning") as caught:
            await chat(wrong)
        assert caught.value.param == "messages"
        # A part of the conversation, it begins nothing.
        assert set(json.loads(await chat(wrong, extra_body={"continue_final_message": False}))) == {"x", "on"}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("more", "param", "words"),
    [
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a", "schema": {"items": {"not": {}}}},
                }
            },
            "response_format.json_schema.schema",
            "#/items: the keyword 'not'",
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a", "schema": {"oneOf": [{"type": "integer"}, {"type": "number"}]}},
                }
            },
            "response_format",
            "Write 'anyOf' instead",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"$ref": "#"}}}},
            "response_format",
            "leads back to itself",
        ),
        ({"response_format": {"type": "yaml"}}, "response_format.type", "json_schema"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "one of"),
        ({"structured_outputs": {"regex": "(" * 60_000}}, None, "grammar"),
        ({"structured_outputs": {"grammar": "start: missing"}}, None, "missing"),
        ({"guided_regex": "a"}, "guided_regex", "Unknown parameter"),
    ],
)
async def test_a_shape_that_cannot_be_is_refused(api, stream, more, param, words):
    with pytest.raises(openai.BadRequestError) as caught:
        await ask(api, stream=stream, extra_body=more)
    assert caught.value.param == param
    assert words in str(caught.value)
    # Nothing else has come to harm.
    answer = await ask(api, extra_body={"structured_outputs": {"choice": ["ok"]}})
    assert answer.choices[0].text == "ok"
