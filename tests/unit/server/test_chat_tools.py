"""What tools ask of an answer's grammar, and how one answer's text becomes deltas and a message."""

from __future__ import annotations

from typing import Any

import pytest

from seamount.core.errors import InvalidRequestError
from seamount.core.requests import Chunk
from seamount.core.sampling import MAX_GRAMMAR_CHARS, Grammar
from seamount.engine.fake_encoder import ByteEncoder
from seamount.models.builtin_templates import DEEPSEEK_V31, QWEN3
from seamount.models.reasoning import ReasoningParser
from seamount.models.tools import choose_format
from seamount.server.answers import to_json
from seamount.server.chat.choice import Choice
from seamount.server.chat.tools import plan_tools
from seamount.server.wire.chat import ChatRequest

TAGS = ("<tool_call>", "</tool_call>")
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'


class Encoder(ByteEncoder):
    """Bytes, and a way to call tools."""

    def __init__(self, template: str, markers: tuple[str, ...]) -> None:
        self.tool_format = choose_format(template, markers)


def use(**fields: Any):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    request = ChatRequest(**{"model": "m", "messages": [{"role": "user", "content": "x"}], "tools": tools, **fields})
    return request.tool_use()


def test_without_tools_the_shape_stays_as_it_was_asked_for():
    shape = Grammar("regex", "a+")
    plan = plan_tools(None, ByteEncoder(), shape)
    assert plan.grammar is shape
    assert plan.parser() is None


def test_tools_that_may_be_called_leave_the_answer_free():
    plan = plan_tools(use(), Encoder(QWEN3, ()), None)
    assert plan.grammar is None
    assert plan.parser() is not None


@pytest.mark.parametrize("shape", [None, Grammar("json_object"), Grammar("regex", "a+")])
def test_forced_calls_are_all_that_an_answer_holds(shape):
    plan = plan_tools(use(tool_choice="required"), Encoder(DEEPSEEK_V31, ()), shape)
    assert plan.grammar is not None
    assert plan.grammar.text.startswith("start: NEWLINES? calls\n")


@pytest.mark.parametrize("shape", [Grammar("json_object"), Grammar("json_schema", '{"type": "object"}')])
def test_calls_that_begin_with_a_marker_go_together_with_json(shape):
    plan = plan_tools(use(), Encoder(QWEN3, TAGS), shape)
    assert plan.grammar is not None
    assert plan.grammar.text.startswith("start: NEWLINES? (calls | answer)\n")
    assert 'answer: %json {"type": "object", ' in plan.grammar.text
    for encoder, other in ((Encoder(QWEN3, TAGS), Grammar("regex", "a+")), (Encoder(QWEN3, ()), shape)):
        with pytest.raises(InvalidRequestError, match="asked for together"):
            plan_tools(use(), encoder, other)


@pytest.mark.parametrize("encoder", [ByteEncoder(), Encoder("no calls", ())])
def test_a_model_that_cannot_call_gets_no_tools(encoder):
    with pytest.raises(InvalidRequestError, match="cannot be given tools") as caught:
        plan_tools(use(), encoder, None)
    assert caught.value.param == "tools"


def test_schemas_too_large_for_a_grammar_are_refused():
    long = {"type": "object", "properties": {"a": {"enum": ["x" * 40_000]}}}
    tools = [{"type": "function", "function": {"name": f"f{n}", "parameters": long}} for n in range(4)]
    assert MAX_GRAMMAR_CHARS < 4 * 40_000
    with pytest.raises(InvalidRequestError, match="too large together") as caught:
        plan_tools(use(tools=tools, tool_choice="required"), Encoder(QWEN3, ()), None)
    assert caught.value.param == "tools"


def choice(several: bool = True) -> Choice:
    found = choose_format(QWEN3, ())
    assert found is not None
    return Choice(ReasoningParser(starts_in_reasoning=False), found.parser({"f"}), several)


def last(text: str, reason: Any = "stop") -> Chunk:
    return Chunk(request_id="r", text=text, token_ids=(1,), finish_reason=reason)


def test_one_chunk_with_everything_becomes_deltas_in_order():
    answer = choice()
    sent = [to_json(delta) for delta in answer.take(last(f"<think>hm</think>Look.\n{CALL}\nDone."))]
    call_id = f'"id":"{answer.calls[0].id}"'
    assert sent == [
        '{"content":"Look.","reasoning_content":"hm","reasoning":"hm"}',
        f'{{"tool_calls":[{{"index":0,{call_id},"type":"function","function":{{"name":"f","arguments":""}}}}]}}',
        '{"tool_calls":[{"index":0,"function":{"arguments":"{\\"a\\": 1}"}}]}',
        '{"content":"\\nDone."}',
    ]
    message = answer.message()
    assert (message.reasoning, message.content, answer.finish_reason()) == ("hm", "Look.\nDone.", "tool_calls")


@pytest.mark.parametrize(("reason", "told"), [("stop", "tool_calls"), ("length", "length")])
def test_how_an_answer_with_a_call_ended(reason, told):
    answer = choice()
    answer.take(last(CALL, reason))
    assert answer.finish_reason() == told
    assert answer.message().content is None


def test_calls_behind_the_first_are_dropped_where_one_is_wanted():
    answer = choice(several=False)
    answer.take(last(CALL + CALL))
    assert len(answer.calls) == 1
    assert answer.calls[0].function.arguments == '{"a": 1}'


def test_an_answer_without_calls_is_a_message_as_ever():
    answer = choice()
    assert [to_json(delta) for delta in answer.take(last("Hi <b>"))] == ['{"content":"Hi <b>"}']
    assert to_json(answer.message()) == '{"role":"assistant","content":"Hi <b>","refusal":null}'
    assert answer.finish_reason() == "stop"
