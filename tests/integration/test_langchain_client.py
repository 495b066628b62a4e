"""LangChain's OpenAI classes against a real server, and nobody else is asked."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Literal

import pytest
import pytest_asyncio
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from openai import BadRequestError, DefaultAsyncHttpxClient
from pydantic import BaseModel

from seamount.core.requests import Request
from seamount.core.settings import EngineConfig
from seamount.engine.client import WorkerEngine
from seamount.engine.fake import FakeEngine, say
from seamount.engine.fake_encoder import ByteEncoder, FakePrompt
from seamount.models.builtin_templates import QWEN3
from seamount.models.locate import locate_model
from seamount.models.prompt import PromptEncoder
from seamount.models.tools import choose_format

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
ASK = [SystemMessage("Be kind."), HumanMessage("Weather?")]


class CallingEncoder(ByteEncoder):
    """Bytes, and Qwen's way to call tools; remembers the messages and tools that it was given."""

    tool_format = choose_format(QWEN3, ())

    def __init__(self) -> None:
        self.messages: list[Any] = []
        self.tools: Any = None

    def encode_chat(
        self, messages: Sequence[Any], *, tools: Any = None, continue_final: bool = False, **more: Any
    ) -> FakePrompt:
        self.messages, self.tools = list(messages), tools
        return super().encode_chat(messages, **more)


@tool
def weather(city: str) -> str:
    """Tell the weather."""
    return f"12 degrees in {city}"


class Weather(BaseModel):
    """The weather of a city."""

    city: str
    degrees: int


class Digit(BaseModel):
    """One of three."""

    digit: Literal[1, 2, 3]


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch, only_this_machine: None) -> None:
    """No traces to LangSmith, whatever the environment says; no request to anybody else."""
    for name in ("LANGSMITH_TRACING", "LANGCHAIN_TRACING_V2"):
        monkeypatch.setenv(name, "false")


@pytest_asyncio.fixture
async def lang(quiet: None) -> AsyncIterator[Callable[..., Any]]:
    """Return `lang(url, kind, **fields)`, a model; its connections end with the test, which LangChain's own do not."""
    async with DefaultAsyncHttpxClient() as http:

        def model(url: str, kind: Any = ChatOpenAI, **more: Any) -> Any:
            fields = {"base_url": f"{url}/v1", "api_key": "none", "model": "fake", "max_retries": 0, **more}
            return kind(**fields, http_async_client=http)

        yield model


async def test_a_chat_whole_and_streamed(serve, lang):
    running = await serve(FakeEngine(say("Vier. 四。")), CallingEncoder())
    model = lang(running.url, stream_usage=True)
    whole = await model.ainvoke(ASK)
    pieces = [piece async for piece in model.astream(ASK)]
    added: AIMessageChunk = pieces[0]
    for piece in pieces[1:]:
        added += piece
    assert whole.content == added.content == "Vier. 四。"
    assert whole.response_metadata["finish_reason"] == "stop"
    assert whole.usage_metadata is not None
    assert added.usage_metadata == whole.usage_metadata
    assert whole.usage_metadata["output_tokens"] == len("Vier. 四。".encode()) + 1
    assert len(pieces) > 5


async def test_parameters_reach_the_engine(serve, lang):
    seen: list[Request] = []

    def reply(request: Request, index: int) -> Sequence[int]:
        seen.append(request)
        return say("ok")(request, index)

    running = await serve(FakeEngine(reply))
    await lang(running.url, temperature=0.25, max_tokens=9, top_p=0.5, seed=7, stop_sequences=["x"]).ainvoke("hi")
    sampling = seen[0].sampling
    assert (sampling.temperature, sampling.max_tokens, sampling.top_p, sampling.seed) == (0.25, 9, 0.5, 7)
    assert sampling.stop == ("x",)


async def test_many_questions_at_once(serve, lang):
    running = await serve(FakeEngine(say("ok")))
    answers = await lang(running.url).abatch([f"question {number}" for number in range(8)])
    assert [answer.content for answer in answers] == ["ok"] * 8


async def test_a_loop_of_tools(serve, lang):
    encoder = CallingEncoder()
    running = await serve(FakeEngine(say(CALL)), encoder)
    model = lang(running.url).bind_tools([weather])
    first = await model.ainvoke(ASK)
    (call,) = first.tool_calls
    assert (call["name"], call["args"]) == ("weather", {"city": "Köln"})
    added: Any = None
    async for piece in model.astream(ASK):
        added = piece if added is None else added + piece
    assert [(each["name"], each["args"]) for each in added.tool_calls] == [("weather", {"city": "Köln"})]
    result = await weather.ainvoke(call)
    assert isinstance(result, ToolMessage)
    await model.ainvoke([*ASK, first, result])
    assert [message["role"] for message in encoder.messages] == ["system", "user", "assistant", "tool"]
    assert encoder.messages[-1]["tool_call_id"] == call["id"]
    assert encoder.messages[-1]["content"] == "12 degrees in Köln"
    assert encoder.tools[0]["function"]["name"] == "weather"


async def test_a_tool_that_must_be_called(serve, lang):
    seen: list[Request] = []

    def reply(request: Request, index: int) -> Sequence[int]:
        seen.append(request)
        return say(CALL)(request, index)

    running = await serve(FakeEngine(reply), CallingEncoder())
    for choice in ("any", "weather"):
        answer = await lang(running.url).bind_tools([weather], tool_choice=choice).ainvoke(ASK)
        assert isinstance(answer, AIMessage)
        assert answer.tool_calls[0]["name"] == "weather"
    assert all(request.sampling.grammar is not None for request in seen)


@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
async def test_structured_output_by_every_method(serve, lang, method):
    seen: list[Request] = []
    said = '{"city": "Köln", "degrees": 12}'
    if method == "function_calling":
        said = f'<tool_call>\n{{"name": "Weather", "arguments": {said}}}\n</tool_call>'

    def reply(request: Request, index: int) -> Sequence[int]:
        seen.append(request)
        return say(said)(request, index)

    running = await serve(FakeEngine(reply), CallingEncoder())
    structured = lang(running.url).with_structured_output(Weather, method=method)
    assert await structured.ainvoke(ASK) == Weather(city="Köln", degrees=12)
    grammar = seen[0].sampling.grammar
    assert grammar is not None
    assert (
        grammar.kind == {"json_schema": "json_schema", "function_calling": "ebnf", "json_mode": "json_object"}[method]
    )


async def test_refusals_are_the_clients_errors(serve, lang):
    running = await serve(FakeEngine(say("ok")))
    with pytest.raises(BadRequestError, match="cannot be given tools"):
        await lang(running.url).bind_tools([weather]).ainvoke(ASK)


async def test_text_completions(serve, lang):
    running = await serve(FakeEngine())  # echo
    model = lang(running.url, OpenAI, max_tokens=50)
    assert await model.ainvoke("Once upon") == "Once upon"
    assert "".join([piece async for piece in model.astream("a time")]) == "a time"
    assert await model.abatch(["one", "two"]) == ["one", "two"]


async def test_the_embedded_model_answers_in_shape_and_calls_tools(serve, lang):
    engine = WorkerEngine(EngineConfig(model="seamount-tiny", num_threads=1))
    running = await serve(engine, PromptEncoder.from_folder(locate_model("seamount-tiny")))
    await running.service.started

    @tool
    def get_pump_pressure(pump_id: str) -> str:
        """Read the pressure of a pump"""
        return '{"result":"83"}'

    model = lang(running.url, model="seamount-tiny", temperature=0, max_tokens=300)
    bound = model.bind_tools([get_pump_pressure])
    asked: list[Any] = [HumanMessage("What is the pressure of pump K-417?")]
    call = await bound.ainvoke(asked)
    assert [(each["name"], each["args"]) for each in call.tool_calls] == [("get_pump_pressure", {"pump_id": "K-417"})]
    told = await bound.ainvoke([*asked, call, await get_pump_pressure.ainvoke(call.tool_calls[0])])
    assert "83" in told.content
    assert isinstance(await model.with_structured_output(Digit).ainvoke("A digit?"), Digit)
