"""LiteLLM against a real server, through OpenAI's form and through Anthropic's, and nobody else is asked."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio

from seamount.core.errors import QueueFullError
from seamount.core.requests import Request
from seamount.engine.fake import FakeEngine, say
from seamount.engine.fake_encoder import ByteEncoder, FakePrompt
from seamount.models.builtin_templates import QWEN3
from seamount.models.tools import choose_format

ASK = [{"role": "user", "content": "Weather?"}]
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Tells it.", "parameters": CITY}}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
LOCAL = {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}


class CallingEncoder(ByteEncoder):
    """Bytes, and Qwen's way to call tools; remembers the messages that it was given."""

    tool_format = choose_format(QWEN3, ())

    def __init__(self) -> None:
        self.messages: list[Any] = []

    def encode_chat(
        self, messages: Sequence[Any], *, tools: Any = None, continue_final: bool = False, **more: Any
    ) -> FakePrompt:
        self.messages = list(messages)
        return super().encode_chat(messages, **more)


@pytest_asyncio.fixture
async def litellm(monkeypatch: pytest.MonkeyPatch, only_this_machine: None) -> AsyncIterator[Any]:
    """The package, imported where nobody can be asked for prices; its connections end with the test."""
    for name, value in LOCAL.items():
        monkeypatch.setenv(name, value)
    import litellm
    from litellm.llms.custom_httpx.http_handler import AsyncHTTPHandler

    async with httpx.AsyncClient() as http:
        handler = AsyncHTTPHandler()
        monkeypatch.setattr(litellm, "aclient_session", http)
        monkeypatch.setattr(litellm, "module_level_aclient", handler)
        yield litellm
        await handler.close()
    cache = litellm.in_memory_llm_clients_cache
    for kept in cache.cache_dict.values():
        if isinstance(kept, openai.OpenAI):
            kept.close()
    cache.flush_cache()


def asked(provider: str, url: str, **more: Any) -> dict[str, Any]:
    base = url if provider == "anthropic" else f"{url}/v1"
    return {"model": f"{provider}/fake", "messages": ASK, "api_base": base, "api_key": "none", "num_retries": 0, **more}


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm", "anthropic"])
async def test_a_chat_whole_and_streamed(serve, litellm, provider):
    running = await serve(FakeEngine(say("<think>\nhm\n</think>\n\nVier. 四。")), CallingEncoder())
    fields = asked(provider, running.url, max_tokens=100)
    whole = await litellm.acompletion(**fields)
    message = whole.choices[0].message
    assert (message.content, message.reasoning_content) == ("Vier. 四。", "hm")
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage.prompt_tokens == len("user: Weather?\n") + 2
    pieces = [piece async for piece in await litellm.acompletion(**fields, stream=True)]
    added = litellm.stream_chunk_builder(pieces, messages=ASK)
    assert (added.choices[0].message.content, added.choices[0].message.reasoning_content) == ("Vier. 四。", "hm")


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
async def test_a_loop_of_tools(serve, litellm, provider):
    encoder = CallingEncoder()
    running = await serve(FakeEngine(say(CALL)), encoder)
    fields = asked(provider, running.url, max_tokens=100, tools=TOOLS)
    first = (await litellm.acompletion(**fields)).choices[0]
    assert first.finish_reason == "tool_calls"
    (call,) = first.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Köln"})
    pieces = [piece async for piece in await litellm.acompletion(**fields, stream=True)]
    (streamed,) = litellm.stream_chunk_builder(pieces, messages=ASK).choices[0].message.tool_calls
    assert (streamed.function.name, json.loads(streamed.function.arguments)) == ("weather", {"city": "Köln"})
    result = {"role": "tool", "tool_call_id": call.id, "name": "weather", "content": "12 degrees"}
    await litellm.acompletion(**{**fields, "messages": [*ASK, first.message.model_dump(), result]})
    assert [message["role"] for message in encoder.messages] == ["user", "assistant", "tool"]
    assert encoder.messages[-1]["content"] == "12 degrees"
    await litellm.acompletion(**fields, tool_choice="required")


async def test_parameters_reach_the_engine(serve, litellm):
    seen: list[Request] = []

    def reply(request: Request, index: int) -> Sequence[int]:
        seen.append(request)
        return say('{"city": "Rom"}')(request, index)

    running = await serve(FakeEngine(reply))
    shape = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}}
    await litellm.acompletion(
        **asked("openai", running.url),
        temperature=0.25,
        top_p=0.5,
        max_tokens=90,
        seed=7,
        stop=["x"],
        response_format=shape,
    )
    sampling = seen[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens, sampling.seed) == (0.25, 0.5, 90, 7)
    assert sampling.stop == ("x",)
    assert sampling.grammar is not None
    assert sampling.grammar.kind == "json_schema"


async def test_the_sync_calls(serve, litellm):
    running = await serve(FakeEngine(say("ok")))

    def use() -> tuple[str, str]:
        fields = asked("openai", running.url)
        whole = litellm.completion(**fields)
        streamed = "".join(piece.choices[0].delta.content or "" for piece in litellm.completion(**fields, stream=True))
        return whole.choices[0].message.content, streamed

    assert await asyncio.to_thread(use) == ("ok", "ok")


async def test_text_completions(serve, litellm):
    running = await serve(FakeEngine())  # echo
    fields = {
        "model": "text-completion-openai/fake",
        "prompt": "Once upon",
        "api_base": f"{running.url}/v1",
        "api_key": "none",
        "max_tokens": 50,
    }
    whole = await litellm.atext_completion(**fields)
    assert whole.choices[0].text == "Once upon"
    pieces = [piece async for piece in await litellm.atext_completion(**fields, stream=True)]
    assert "".join(piece.choices[0].text or "" for piece in pieces) == "Once upon"


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
async def test_errors_become_the_clients_own(serve, litellm, provider):
    full = await serve(FakeEngine(fail_after_tokens=0, failure=QueueFullError("The queue is full.", retry_after=2)))
    running = await serve(FakeEngine(say("ok")))
    with pytest.raises(litellm.BadRequestError, match="cannot be given tools"):
        await litellm.acompletion(**asked(provider, running.url, tools=TOOLS))
    with pytest.raises(litellm.NotFoundError, match="no model of that name"):
        await litellm.acompletion(**{**asked(provider, running.url), "model": f"{provider}/other"})
    with pytest.raises((litellm.ServiceUnavailableError, litellm.InternalServerError), match="The queue is full"):
        await litellm.acompletion(**asked(provider, full.url))


def test_importing_it_asks_nobody_once_it_is_told_so():
    program = (
        "import os, sys\n"
        "def hook(event, args):\n"
        "    if event in ('socket.connect', 'socket.getaddrinfo'):\n"
        "        os.write(2, repr((event, args[-4:])).encode()); os._exit(7)\n"
        "sys.addaudithook(hook)\n"
        "import litellm\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], env={"PATH": "/usr/bin:/bin", **LOCAL}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
