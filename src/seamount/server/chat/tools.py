"""What a request's tools and last message ask of the prompt, of the grammar and of the reading of answers.

Used by `chat`. Knows the wire's words and the encoder, nothing of events or the engine.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from seamount.core.errors import InvalidRequestError
from seamount.core.sampling import Grammar
from seamount.models.reasoning import THINK_CLOSE, THINK_OPEN
from seamount.models.tools import ToolCallParser, ToolFormat
from seamount.server.encoder import Encoder, Prompt, ToolEncoder
from seamount.server.wire.chat import AssistantMessage, ChatRequest
from seamount.server.wire.tools import ToolUse

from .thinking import template_kwargs


@dataclass(frozen=True)
class ToolPlan:
    """How one request's answers are made and read.

    Attributes:
        grammar: what the answer must look like; None leaves it free.
        use, format: what may be called and how the model writes it; None where nothing may be called.
    """

    grammar: Grammar | None
    use: ToolUse | None = None
    format: ToolFormat | None = None

    @property
    def several_calls(self) -> bool:
        """Whether an answer may make more than one call."""
        return self.use is None or self.use.several

    def parser(self) -> ToolCallParser | None:
        """Return a fresh parser for one answer; None where it is not looked through for calls."""
        if self.use is None or self.format is None:
            return None
        return self.format.parser(self.use.callable, must_call=self.use.forced)


def plan_tools(use: ToolUse | None, encoder: Encoder, grammar: Grammar | None) -> ToolPlan:
    """Join what a request says of tools and of its answer's shape.

    Raises:
        InvalidRequestError: this model's calls cannot be read, a strict schema cannot be enforced, or tools and shape
            cannot go together.
    """
    if use is None:
        return ToolPlan(grammar)
    known = encoder.tool_format if isinstance(encoder, ToolEncoder) else None
    if known is None:
        raise InvalidRequestError(
            "This model cannot be given tools: its chat template shows no known way to call them.", param="tools"
        )
    return ToolPlan(_grammar(use, known, grammar), use, known)


def encoding(body: ChatRequest, use: ToolUse | None, encoder: Encoder, *, limit: int) -> Callable[[], Prompt]:
    """Return what encodes the request's prompt.

    A last message of the assistant is continued unless the request says otherwise: nothing else could follow it.

    Raises:
        InvalidRequestError: it is to be continued, and cannot be; or its thinking cannot be switched off.
    """
    continues = body.continues
    messages, kwargs = body.template_messages(), template_kwargs(body, encoder)
    if isinstance(encoder, ToolEncoder):
        tools = use.tools if use is not None else None
        begins = continues is not False
        encode = encoder.encode_chat
        return partial(encode, messages, tools=tools, template_kwargs=kwargs, limit=limit, continue_final=begins)
    if continues:
        raise InvalidRequestError("This model's answers cannot be begun by the caller.", param="messages")
    return partial(encoder.encode_chat, messages, template_kwargs=kwargs, limit=limit)


def begun_grammar(body: ChatRequest, prompt: Prompt, grammar: Grammar | None) -> Grammar | None:
    """Return what the answer must look like, where it goes on from what the caller begins.

    Raises:
        InvalidRequestError: reasoning is begun: the engine could not tell it from the answer.
    """
    last = body.messages[-1]
    if grammar is None or not isinstance(last, AssistantMessage) or body.continues is False:
        return grammar
    begun = body.template_messages()[-1]["content"] or ""
    if prompt.starts_in_reasoning and (begun or last.reasoning_content or last.reasoning):
        raise InvalidRequestError(
            "An answer that is begun in its reasoning cannot be given a shape, nor be forced to call a tool.",
            hint="Begin the answer itself, or leave the last message out.",
            param="messages",
        )
    if begun.lstrip().startswith(THINK_OPEN):  # the whole reasoning stands before it
        begun = begun.partition(THINK_CLOSE)[2].lstrip()
    return replace(grammar, begun=begun)


def _grammar(use: ToolUse, known: ToolFormat, grammar: Grammar | None) -> Grammar | None:
    """Return the grammar of calls where they are forced, of calls or the given shape where they are not."""
    if use.forced:
        text = known.grammar(use.schemas(), several=use.several)
    elif grammar is None:
        return None
    elif grammar.kind in ("json_object", "json_schema") and known.begins_with_marker:
        answer = json.loads(grammar.text) if grammar.text else {"type": "object"}
        text = known.grammar(use.schemas(), several=use.several, answer=answer)
    else:
        raise InvalidRequestError(
            "The shape of an answer and tools that may be called cannot be asked for together here.",
            hint="Set tool_choice to none or required; or ask for json_object or json_schema, of a model whose calls "
            "begin with a marker.",
            param="response_format",
        )
    try:
        return Grammar("ebnf", text)
    except InvalidRequestError as error:
        raise InvalidRequestError(
            f"The tools' schemas are too large together: {error.message}", param="tools"
        ) from error
