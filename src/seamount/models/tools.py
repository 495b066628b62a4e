"""Which way a checkpoint writes tool calls, and what follows from it: parser, prompt text, grammar. `ToolFormat`.

Called by `models.prompt`, which chooses the format, and by the server. Knows nothing of tokens' ids or wire formats.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .tools_formats import (
    CALL_BEGIN,
    CALL_END,
    CALL_SEPARATOR,
    CALLS_BEGIN,
    CALLS_END,
    DEEPSEEK,
    HERMES,
    HERMES_BEGIN,
    HERMES_END,
    LLAMA,
    PYTHON_TAG,
    CallSyntax,
)
from .tools_parser import ArgumentDelta, CallEnded, CallStarted, ContentDelta, ToolCallParser, ToolEvent
from .tools_syntax import JSON_SPACE

__all__ = [
    "ArgumentDelta",
    "CallEnded",
    "CallStarted",
    "ContentDelta",
    "ToolCallParser",
    "ToolEvent",
    "ToolFormat",
    "choose_format",
]


@dataclass(frozen=True)
class ToolFormat:
    """How one checkpoint writes tool calls.

    Attributes:
        name: of the format.
        syntax: what the parser reads; wider than what is written below.
        before_name, after_name, after_arguments: the pieces of a call, in the order in which they are written. A marker
            is a piece of its own.
        first, between, last: what stands before, between and behind calls.
        several: whether an answer may make more than one call.
        markers: those of the pieces that are tokens of their own in this checkpoint.
    """

    name: str
    syntax: CallSyntax
    before_name: tuple[str, ...]
    after_name: tuple[str, ...]
    after_arguments: tuple[str, ...]
    first: tuple[str, ...] = ()
    between: str = ""
    last: tuple[str, ...] = ()
    several: bool = True
    markers: frozenset[str] = frozenset()

    @property
    def begins_with_marker(self) -> bool:
        """Whether calls begin with a token of their own, so that they cannot be taken for an answer."""
        return (*self.first, *self.before_name)[0] in self.markers

    def parser(self, names: Collection[str], *, must_call: bool = False) -> ToolCallParser:
        """Return a parser for one answer to a prompt that offered tools of these names, and may have forced a call."""
        return ToolCallParser(self.syntax, names, must_call=must_call)

    def system_text(self, tools: Sequence[Mapping[str, Any]]) -> str:
        """Return what to tell a model whose template takes no tools (the text of DeepSeek-V3.1's model card)."""
        lines = ["## Tools", "You have access to the following tools:"]
        for tool in tools:
            function = tool.get("function") or {}
            schema = json.dumps(function.get("parameters") or {"type": "object", "properties": {}}, ensure_ascii=False)
            lines.append(f"\n### {function.get('name')}\nDescription: {function.get('description') or ''}")
            lines.append(f"\nParameters: {schema}")
        example = "".join(
            (
                *(*self.first, *self.before_name, "tool_call_name", *self.after_name, "tool_call_arguments"),
                *(*self.after_arguments, "{additional_tool_calls}" if self.several else "", *self.last),
            )
        )
        separated = "with one newline between them" if self.between else "without separators or spaces"
        lines += [
            f"\nIMPORTANT: ALWAYS adhere to this exact format for tool use:\n{example}",
            "\nWhere:",
            "- `tool_call_name` must be an exact match to one of the available tools",
            "- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema",
        ]
        if self.several:
            lines.append(f"- For multiple tool calls, chain them directly {separated}")
        return "\n".join(lines)

    def grammar(
        self,
        schemas: Mapping[str, Mapping[str, Any]],
        *,
        several: bool = True,
        answer: Mapping[str, Any] | None = None,
    ) -> str:
        """Return a grammar, in Lark's form, of answers that call these tools and do nothing else.

        Args:
            schemas: of the tools' arguments, by the tools' names.
            several: more than one call may be made, if the format can.
            answer: the JSON schema of an answer that calls nothing, where that may be one; only for formats whose calls
                begin with a marker.
        """
        more = f"({self._terms(self.between)} call)*" if several and self.several else ""
        rules = [
            "start: NEWLINES? calls" if answer is None else "start: NEWLINES? (calls | answer)",
            r"NEWLINES: /\n{1,2}/",  # models that reason write them behind it
            f"calls: {self._terms(*self.first)} call {more} {self._terms(*self.last)}",
            "call: " + " | ".join(f"call_{number}" for number in range(len(schemas))),
        ]
        for number, (name, schema) in enumerate(schemas.items()):
            before = self._terms(*self.before_name, name, *self.after_name)
            rules.append(f"call_{number}: {before} arguments_{number} {self._terms(*self.after_arguments)}")
            rules.append(f"arguments_{number}: %json {_spaced(schema)}")
        if answer is not None:
            rules.append(f"answer: %json {_spaced(answer)}")
        return "\n".join(rules)

    def _terms(self, *pieces: str) -> str:
        """Spell pieces as a grammar does: markers as tokens where they are, the letters between them as one string."""
        terms: list[str] = []
        letters = ""
        for piece in pieces:
            if piece in self.markers:
                terms += [_quoted(letters), piece] if letters else [piece]
                letters = ""
            else:
                letters += piece
        return " ".join([*terms, _quoted(letters)] if letters else terms)


def _spaced(schema: Mapping[str, Any]) -> str:
    """Spell a schema as a grammar does, with a bound on space."""
    return json.dumps({**schema, "x-guidance": {"whitespace_pattern": JSON_SPACE}}, ensure_ascii=False)


def _quoted(letters: str) -> str:
    return json.dumps(letters, ensure_ascii=False)  # Lark spells strings as JSON does


DEEPSEEK_V3 = ToolFormat(
    name="deepseek_v3",
    syntax=DEEPSEEK,
    first=(CALLS_BEGIN,),
    before_name=(CALL_BEGIN, "function", CALL_SEPARATOR),
    after_name=("\n```json\n",),
    after_arguments=("\n```", CALL_END),
    between="\n",
    last=(CALLS_END,),
)
DEEPSEEK_V31 = ToolFormat(
    name="deepseek_v31",
    syntax=DEEPSEEK,
    first=(CALLS_BEGIN,),
    before_name=(CALL_BEGIN,),
    after_name=(CALL_SEPARATOR,),
    after_arguments=(CALL_END,),
    last=(CALLS_END,),
)
HERMES_FORMAT = ToolFormat(
    name="hermes",
    syntax=HERMES,
    before_name=(HERMES_BEGIN, '\n{"name": "'),
    after_name=('", "arguments": ',),
    after_arguments=("}\n", HERMES_END),
    between="\n",
)
LLAMA3 = ToolFormat(
    name="llama3",
    syntax=LLAMA,
    before_name=('{"name": "',),
    after_name=('", "parameters": ',),
    after_arguments=("}",),
    several=False,
)


def choose_format(template: str, markers: Collection[str]) -> ToolFormat | None:
    """Return the format that a chat template shows, else the tokenizer; None when neither shows a known one.

    The template decides first: R1's distills have the tokenizers of other families, and speak as their template does.

    Args:
        template: its source.
        markers: texts of the tokens that mark something.
    """
    found: ToolFormat | None = None
    for shown in (template, "\n".join(markers)):
        if CALLS_BEGIN in shown:
            # The tokenizer alone does not tell V3 from V3.1; a template that shows no calls is an early one.
            is_v31 = shown is template and "```json" not in template
            found = DEEPSEEK_V31 if is_v31 else DEEPSEEK_V3
        elif HERMES_BEGIN in shown:
            # Qwen3-Coder's calls stand between the same tags, and are no JSON.
            found = None if "<function=" in template else HERMES_FORMAT
        elif PYTHON_TAG in shown or ("<|start_header_id|>" in shown and '"parameters": ' in shown):
            found = LLAMA3
        if found is not None:
            pieces = (*found.first, *found.before_name, *found.after_name, *found.after_arguments, *found.last)
            return replace(found, markers=frozenset(pieces) & frozenset(markers))
    return None
