"""Whatever a template holds, and whatever it is given, the answer is text or a typed error."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seamount.core.errors import SeamountError
from seamount.models.builtin_templates import DEEPSEEK_R1, LLAMA3, QWEN3
from seamount.models.messages import prepare_messages
from seamount.models.template import ChatTemplate

MARKS = """{{ }} {% %} {# #} - endfor if endif m .content | tojson [ ] ( ) ' " messages ~ * ** 999 ns.x endmacro f()
__class__ .format generation endgeneration \x00 你"""
WORDS = [" ", "\n", " for m in messages ", " set ns = namespace(x=1) ", " macro f() "]
PIECES = st.sampled_from([*MARKS.split(), *WORDS])
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
ROLES = st.sampled_from(["system", "user", "assistant", "tool", "developer", "", "x"])
MESSAGES = st.lists(
    st.dictionaries(
        st.sampled_from(["content", "tool_calls", "reasoning_content", "name"]), JSON | st.text(max_size=8), max_size=4
    ).flatmap(lambda message: ROLES.map(lambda role: {**message, "role": role})),
    max_size=4,
)


@given(pieces=st.lists(PIECES, max_size=16))
@settings(max_examples=40, deadline=None)
def test_random_templates(pieces: list[str]) -> None:
    template = ChatTemplate("".join(pieces), "fuzz", cpu_limit_s=0.5, memory_limit_bytes=256 << 20)
    try:
        assert isinstance(template.render({"messages": [{"role": "user", "content": "x"}]}), str)
    except SeamountError:
        pass
    finally:
        template.close()


@pytest.fixture(scope="module")
def templates() -> Iterator[list[ChatTemplate]]:
    made = [ChatTemplate(source, "built-in") for source in (DEEPSEEK_R1, QWEN3, LLAMA3)]
    yield made
    for template in made:
        template.close()


@given(messages=MESSAGES, tools=JSON, which=st.integers(0, 2))
@settings(max_examples=150, deadline=None)
def test_random_messages(templates: list[ChatTemplate], messages: Any, tools: Any, which: int) -> None:
    template = templates[which]
    variables = {"tools": tools, "bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True}
    try:
        prepared = prepare_messages(messages, template.source)
        assert isinstance(template.render({**variables, "messages": prepared}), str)
    except SeamountError:
        pass
