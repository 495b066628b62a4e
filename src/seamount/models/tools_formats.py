"""How each model family writes a tool call: `CallSyntax`, one per family.

Called by `models.tools`. Sources: the chat templates that the families publish, and DeepSeek-V3.1's model card. V3.2's
own markup is not here: its checkpoints have no chat template to put tools into.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .tools_syntax import BRACE, NAME, OBJECT, SPACE, Alternatives, Atom, Syntax

Place = Literal["start", "text", "after"]
"""Where in an answer: nothing but space yet; behind text; behind a call and nothing but space."""

_ANYWHERE: frozenset[Place] = frozenset(("start", "text", "after"))

CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL_BEGIN, CALL_SEPARATOR, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
HERMES_BEGIN, HERMES_END = "<tool_call>", "</tool_call>"
PYTHON_TAG = "<|python_tag|>"


@dataclass(frozen=True)
class Opening:
    """One way in which a call begins.

    Attributes:
        trigger: the text that it begins with.
        syntax: from the trigger to where the arguments begin; its group is the function's name.
        wrapper: from the trigger to the brace of an object that holds name and arguments; None where the format has no
            such object. It is tried where `syntax` does not fit: another order, no arguments.
        places: where in an answer it counts.
        known_only: it is a call only with the name of a tool that was offered: the trigger alone says too little.
    """

    trigger: str
    syntax: Syntax
    wrapper: Syntax | None = None
    places: frozenset[Place] = _ANYWHERE
    known_only: bool = False


@dataclass(frozen=True)
class CallSyntax:
    """How a family writes calls.

    Attributes:
        openings: the ways in which a call begins.
        closing: what stands behind the arguments.
        wrapper_closing: what stands behind the object that holds name and arguments.
        section_end: closes a run of calls, once there was one.
        end: the mark that ends arguments which are no JSON; without one they go on to the answer's end.
    """

    openings: tuple[Opening, ...]
    closing: Syntax
    wrapper_closing: Syntax
    section_end: str | None = None
    end: str | None = None


# V3, R1 and R1-0528: type, separator, name, and the arguments in a fence. V3.1 and seamount-tiny: name, separator,
# arguments. Both are read whatever the checkpoint, for the first models were trained to write more than one form.
_DEEPSEEK_HEADER: Alternatives = [
    ["function", CALL_SEPARATOR, NAME, SPACE, "```json", SPACE, OBJECT],
    ["function", CALL_SEPARATOR, NAME, SPACE, OBJECT],
    [NAME, SPACE, CALL_SEPARATOR, SPACE, OBJECT],
]

DEEPSEEK = CallSyntax(
    openings=(
        Opening(CALLS_BEGIN, Syntax(CALLS_BEGIN, SPACE, CALL_BEGIN, SPACE, _DEEPSEEK_HEADER)),
        Opening(CALL_BEGIN, Syntax(CALL_BEGIN, SPACE, _DEEPSEEK_HEADER)),
    ),
    closing=Syntax(SPACE, [["```", SPACE], []], CALL_END),
    wrapper_closing=Syntax(),
    section_end=CALLS_END,
    end=CALL_END,
)


# A call that is a JSON object: its name first, then its arguments, which go by two names.
_ARGUMENTS: Alternatives = [['"arguments"'], ['"parameters"']]
_JSON_CALL: tuple[Atom | Alternatives, ...] = (
    "{",
    SPACE,
    [['"type"', SPACE, ":", SPACE, '"function"', SPACE, ",", SPACE], []],
    *('"name"', SPACE, ":", SPACE, '"', NAME, '"', SPACE, ",", SPACE),
    _ARGUMENTS,
    *(SPACE, ":", SPACE, OBJECT),
)

HERMES = CallSyntax(
    openings=(Opening(HERMES_BEGIN, Syntax(HERMES_BEGIN, SPACE, *_JSON_CALL), Syntax(HERMES_BEGIN, SPACE, BRACE)),),
    closing=Syntax(SPACE, "}", SPACE, HERMES_END),
    wrapper_closing=Syntax(SPACE, HERMES_END),
    end=HERMES_END,
)

# The tag is a special token, which text without special tokens does not show; a bare object at the answer's start is a
# call then, if it names an offered tool. Further calls follow behind a semicolon or at once.
LLAMA = CallSyntax(
    openings=(
        Opening(PYTHON_TAG, Syntax(PYTHON_TAG, SPACE, *_JSON_CALL), Syntax(PYTHON_TAG, SPACE, BRACE)),
        Opening("{", Syntax(*_JSON_CALL), Syntax(BRACE), frozenset(("start", "after")), known_only=True),
        Opening(
            ";", Syntax(";", SPACE, *_JSON_CALL), Syntax(";", SPACE, BRACE), frozenset(("after",)), known_only=True
        ),
    ),
    closing=Syntax(SPACE, "}"),
    wrapper_closing=Syntax(),
)
