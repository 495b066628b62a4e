"""From a conversation to token ids and from token ids to text, for one checkpoint: `PromptEncoder`.

Called by the server, the engine's `LLM` and the CLI, which see only this of tokenizers and templates. Loads
no weights and must not import torch: the server's process encodes prompts, and has no use for it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

from seamount.core.errors import CheckpointError, ConfigError, ContextTooLongError, InvalidRequestError
from seamount.core.sampling import SamplingParams

from .builtin_templates import choose_template
from .conversation import Conversation
from .guard import MarkerGuard
from .locate import is_gguf
from .messages import begin_answer, check_beginning, prepare_messages, with_system_text
from .reasoning import THINK_OPEN, Delta, ReasoningParser
from .template import MAX_TEMPLATE_CHARS, ChatTemplate
from .tokenizer import Detokenizer, TextTokenizer, read_json_object, read_text
from .tools import ToolFormat, choose_format

__all__ = ["Delta", "Detokenizer", "EncodedPrompt", "PromptEncoder", "ReasoningParser"]

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "repetition_penalty")
_RENDER_CHARS_PER_TOKEN = 8  # beyond this many times the limit, messages are counted before they are rendered
_THINKING_SWITCHES = ("thinking", "enable_thinking")  # each is a family's name for it
_RESERVED_KWARGS = ("messages", "tools", "continue_final_message", *_NAMED_TOKENS)


@dataclass(frozen=True)
class EncodedPrompt:
    """A rendered conversation.

    Attributes:
        token_ids: what the model reads; never empty.
        text: the same as text, markers included.
        starts_in_reasoning: the prompt ends in an open `<think>`, so the answer begins inside the reasoning.
    """

    token_ids: tuple[int, ...]
    text: str
    starts_in_reasoning: bool


class PromptEncoder:
    """Tokenizer, chat template and reasoning parser of one checkpoint. Safe to use from any thread.

    Attributes:
        vocab_size: highest token id of the tokenizer plus one (the model's output may be padded beyond it).
        bos_token_id: the beginning-of-sequence token, None where the tokenizer names none.
        eos_token_ids: every token that ends an answer, by generation_config.json, config.json and the
            tokenizer.
        has_chat_template: whether `encode_chat` can be used.
        template_source: "checkpoint", "built-in NAME", or "none".
        template_takes_tools: whether the chat template reads `tools`.
        tool_format: how the model writes tool calls; None where that is not known. With it a template that does
            not read tools can be offered some: they are told in the system message.
        default_sampling: the checkpoint's recommended temperature, top_p, top_k and repetition_penalty, those
            it gives; temperature 0 alone where it recommends greedy decoding.
    """

    def __init__(
        self,
        *,
        folder: Path,
        tokenizer: TextTokenizer,
        named_tokens: Mapping[str, str],
        adds_bos: bool,
        config: Mapping[str, Any],
        generation_config: Mapping[str, Any],
        templates: Mapping[str, str],
    ) -> None:
        self._folder = folder
        self._tokenizer = tokenizer
        self.vocab_size = tokenizer.vocab_size
        _check_vocab(config, tokenizer, folder)
        self._named_tokens = named_tokens
        self.bos_token_id = self._named_id("bos_token")
        self._adds_bos = adds_bos and self.bos_token_id is not None
        self.eos_token_ids = self._collect_eos(generation_config, config)
        self.default_sampling = _default_sampling(generation_config, folder)
        special = [text for token_id, text in tokenizer.added_tokens.items() if token_id in tokenizer.special_ids]
        self._guard = MarkerGuard(tokenizer.added_tokens.values(), special)
        self.template_source = "checkpoint"
        if not templates:
            chosen = choose_template(
                str(config.get("model_type", "")), lambda text: tokenizer.token_id(text) is not None
            )
            templates = {} if chosen is None else {"default": chosen[1]}
            self.template_source = "none" if chosen is None else f"built-in {chosen[0]}"
        self._templates = {
            name: ChatTemplate(source, f"{folder} ({self.template_source}, {name})")
            for name, source in templates.items()
        }
        self.has_chat_template = bool(self._templates)
        self.template_takes_tools = any(_mentions(t.source, "tools") for t in self._templates.values())
        self.tool_format = self._choose_tool_format()

    @classmethod
    def from_folder(cls, folder: Path) -> PromptEncoder:
        """Read the tokenizer, template and defaults of a checkpoint folder or of a .gguf file.

        Raises:
            CheckpointError: a file is missing, broken, too large, or contradicts another; names the file.
            UnsupportedModelError: the tokenizer is of a kind that is not supported.
        """
        if is_gguf(folder):
            return cls._from_gguf(folder)
        tokenizer_config = read_json_object(folder / "tokenizer_config.json") or {}
        special_tokens_map = read_json_object(folder / "special_tokens_map.json") or {}
        named_tokens = _named_tokens({**special_tokens_map, **tokenizer_config}, folder)
        return cls(
            folder=folder,
            tokenizer=TextTokenizer(folder, named_tokens.values()),
            named_tokens=named_tokens,
            adds_bos=tokenizer_config.get("add_bos_token") is True,
            config=read_json_object(folder / "config.json") or {},
            generation_config=read_json_object(folder / "generation_config.json") or {},
            templates=_read_templates(folder, tokenizer_config),
        )

    @classmethod
    def _from_gguf(cls, path: Path) -> PromptEncoder:
        # Here, because they load numpy, for which a server of other checkpoints has no use.
        from .gguf import Gguf
        from .gguf_config import generation_config, hf_config
        from .gguf_tokenizer import tokenizer_files

        file = Gguf.from_file(path)
        files = tokenizer_files(file)
        named_tokens = _named_tokens(files.tokenizer_config, file.path)
        return cls(
            folder=file.path,
            tokenizer=TextTokenizer(file.path, named_tokens.values(), text=json.dumps(files.tokenizer)),
            named_tokens=named_tokens,
            adds_bos=files.tokenizer_config["add_bos_token"],
            config=hf_config(file),
            generation_config=generation_config(file),
            templates=_named_templates(files.tokenizer_config.get("chat_template"), file.path),
        )

    def check_template(self) -> None:
        """Compile the chat template, for a preflight; without one there is nothing to check.

        Raises:
            CheckpointError: it is not valid Jinja.
        """
        for template in self._templates.values():
            template.check()

    def close(self) -> None:
        """End the template's child process. Idempotent; collecting the encoder does it too."""
        for template in self._templates.values():
            template.close()

    def encode_text(self, text: str, *, add_special_tokens: bool = True, limit: int | None = None) -> tuple[int, ...]:
        """Return the ids of a raw prompt, in which the texts of special tokens stand for the tokens.

        Args:
            add_special_tokens: put the beginning-of-sequence token in front where the tokenizer does.
            limit: tokens of context; a prompt far beyond them is refused without encoding all of it.

        Raises:
            InvalidRequestError: it is no text, or not Unicode.
            ContextTooLongError: it is certainly longer than `limit`.
        """
        if not isinstance(text, str):
            raise InvalidRequestError("A prompt must be text or token ids.", param="prompt")
        self._check_length(text, limit, param="prompt")
        ids = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        if add_special_tokens and self._adds_bos and self.bos_token_id is not None and ids[:1] != (self.bos_token_id,):
            return (self.bos_token_id, *ids)
        return ids

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        limit: int | None = None,
        continue_final: bool = False,
    ) -> EncodedPrompt:
        """Render a conversation through the chat template and encode it, ready for the answer.

        Markers inside messages, tools and arguments stay letters and never become control tokens; without
        such the ids equal those of `transformers`' `apply_chat_template(add_generation_prompt=True)`.

        Args:
            messages: role, content, and where they apply reasoning_content or reasoning, tool_calls,
                tool_call_id, name.
            tools: OpenAI's tool schemas.
            template_kwargs: variables for the template, such as `thinking` or `enable_thinking`.
            limit: as for `encode_text`.
            continue_final: the last message, the assistant's, is the beginning of the answer.

        Raises:
            InvalidRequestError: messages, tools or arguments are malformed, the template refuses or
                ignores them, or the last message cannot be continued.
            CheckpointError: the template itself is broken or breaks its limits.
            ConfigError: the checkpoint has no chat template.
            ContextTooLongError: the prompt is certainly longer than `limit`.
            CapacityError: other renders take too long to end.
        """
        template = self._template_for(tools)
        extra = self._checked_kwargs(template_kwargs, template)
        prepared = prepare_messages(messages, template.source)
        # Other roles' text may be dropped by the template (old reasoning, say); a user's never is.
        said = "".join((message.get("content") or "").strip() for message in prepared if message["role"] == "user")
        if limit is not None and len(said) > _RENDER_CHARS_PER_TOKEN * limit:
            self._check_length(said, limit, param="messages")
        if continue_final:
            check_beginning(prepared)
        (prepared, schemas, extra), literals = self._guard.guard(prepared, list(tools) if tools else None, extra)
        beginning = prepared.pop() if continue_final else None
        variables = self._variables(prepared, schemas, extra)
        text = template.render(variables)
        self._check_length(text, limit, param="messages", literals=literals)
        self._check_tools_are_kept(template, variables, text)
        starts_in_reasoning = text.rstrip().endswith(THINK_OPEN)
        if beginning is not None:
            text, starts_in_reasoning = begin_answer(text, beginning)
            self._check_length(text, limit, param="messages", literals=literals)
        if literals:
            token_ids = self._tokenizer.encode_guarded(text, literals)
            text = text.translate({ord(placeholder): first for placeholder, first in literals.items()})
        else:
            token_ids = self._tokenizer.encode(text, add_special_tokens=False)
        if not token_ids:
            raise InvalidRequestError("The chat template makes an empty prompt of these messages.", param="messages")
        return EncodedPrompt(token_ids, text, starts_in_reasoning=starts_in_reasoning)

    def open_chat(
        self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> Conversation:
        """Check a conversation that ends with an answer and make it ready to be rendered in parts, for training.

        Raises:
            InvalidRequestError, ConfigError: as for `encode_chat`.
        """
        template = self._template_for(tools)
        prepared = prepare_messages(messages, template.source)
        (prepared, schemas), literals = self._guard.guard(prepared, list(tools) if tools else None)
        fill = partial(self._variables, schemas=schemas)
        chat = Conversation(template, prepared, literals, fill)
        if any("tool_calls" in message or message["role"] == "tool" for message in prepared[:-1]):
            self._check_tools_are_kept(template, chat.view(len(prepared) - 1, prompted=True))
        return chat

    def disarm(self, text: str) -> tuple[str, dict[str, str]]:
        """Return plain text, ready for `TextTokenizer.encode_many`: markers in it are letters, as in messages."""
        (disarmed,), literals = self._guard.guard(text)
        return disarmed, literals

    def _variables(
        self, prepared: Sequence[dict[str, Any]], schemas: Sequence[Mapping[str, Any]] | None, extra: Mapping[str, Any]
    ) -> dict[str, Any]:
        if schemas and self.tool_format is not None and not self.template_takes_tools:
            prepared = with_system_text(prepared, self.tool_format.system_text(schemas))
        return {
            **self._named_tokens,
            "documents": None,
            "add_generation_prompt": True,
            **extra,
            "messages": prepared,
            "tools": schemas,
        }

    def digest(self) -> str:
        """Return 16 hexadecimal digits that change when the same conversation may become other tokens."""
        said = [self._tokenizer.digest(), self._named_tokens, self._adds_bos, self.eos_token_ids]
        said.append({name: template.source for name, template in self._templates.items()})
        return blake2b(json.dumps(said, sort_keys=True).encode(), digest_size=8).hexdigest()

    def thinking_switches(self, *, on: bool) -> dict[str, bool] | None:
        """Return the template's arguments with which the model reasons before it answers, or does not.

        Empty where it does so anyway; None where it cannot be had. A model whose template has no switch reasons always,
        if its vocabulary has the tag at all.
        """
        source = self._templates["default"].source if self._templates else ""
        name = next((name for name in _THINKING_SWITCHES if _mentions(source, name)), None)
        if name is not None:
            return {name: on}
        return {} if on == (self._tokenizer.token_id(THINK_OPEN) is not None) else None

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of token ids; `<think>` and `</think>` are kept in any case."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    @property
    def tokenizer(self) -> TextTokenizer:
        """The checkpoint's tokenizer, for who must see the whole vocabulary."""
        return self._tokenizer

    def token_text(self, token_id: int) -> str:
        """Return one token's text; U+FFFD where it holds part of a character."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Return one token's bytes; empty for an id that the tokenizer does not know."""
        return self._tokenizer.token_bytes(token_id)

    def detokenizer(self, *, skip_special_tokens: bool = True) -> Detokenizer:
        """Return an incremental detokenizer for one sequence."""
        return self._tokenizer.detokenizer(skip_special_tokens=skip_special_tokens)

    def reasoning_parser(self, *, starts_in_reasoning: bool) -> ReasoningParser:
        """Return an incremental splitter of reasoning and answer for one sequence."""
        return ReasoningParser(starts_in_reasoning=starts_in_reasoning)

    def _check_length(
        self, text: str, limit: int | None, *, param: str, literals: Mapping[str, str] | None = None
    ) -> None:
        count = None if limit is None else self._tokenizer.count_beyond(text, limit, literals)
        if count is not None:
            raise ContextTooLongError(
                f"The prompt has at least {count} tokens; the context holds {limit}.",
                hint="Shorten the prompt.",
                param=param,
            )

    def _template_for(self, tools: Sequence[Mapping[str, Any]] | None) -> ChatTemplate:
        if not self._templates:
            raise ConfigError(
                f"{self._folder} has no chat template, and its tokenizer shows no known chat format.",
                hint="Use /v1/completions, or put a chat_template.jinja into the folder.",
            )
        if tools is not None and not (
            isinstance(tools, Sequence)
            and not isinstance(tools, str | bytes)
            and all(isinstance(tool, Mapping) for tool in tools)
        ):
            raise InvalidRequestError("tools must be a list of objects.", param="tools")
        if tools and not self.template_takes_tools and self.tool_format is None:
            raise InvalidRequestError("This model's chat template takes no tools.", param="tools")
        if tools and "tool_use" in self._templates:
            return self._templates["tool_use"]
        return self._templates["default"]

    def _choose_tool_format(self) -> ToolFormat | None:
        if not self._templates:
            return None
        markers = {self._tokenizer.added_tokens[token_id] for token_id in self._tokenizer.marker_ids}
        return choose_format(self._templates.get("tool_use", self._templates["default"]).source, markers)

    def _check_tools_are_kept(
        self, template: ChatTemplate, variables: Mapping[str, Any], text: str | None = None
    ) -> None:
        """Refuse a history with tool calls or results of which nothing arrives in the rendered text.

        Raises:
            InvalidRequestError: the template drops them.
        """
        messages: list[dict[str, Any]] = variables["messages"]
        has_calls = any("tool_calls" in message for message in messages)
        has_results = any(message["role"] == "tool" for message in messages)
        knows_calls = "tool_calls" in template.source
        knows_results = re.search(r"['\"]tool['\"]", template.source) is not None
        if (knows_calls or not has_calls) and (knows_results or not has_results):
            return
        bare = [{k: v for k, v in m.items() if k != "tool_calls"} for m in messages if m["role"] != "tool"]
        text = template.render(variables) if text is None else text
        if template.render({**variables, "messages": bare}) == text:
            raise InvalidRequestError(
                "This model's chat template drops tool calls and tool results.",
                hint="Write them into user and assistant messages as text.",
                param="messages",
            )

    def _checked_kwargs(self, template_kwargs: Mapping[str, Any] | None, template: ChatTemplate) -> dict[str, Any]:
        if template_kwargs is not None and not isinstance(template_kwargs, Mapping):
            raise InvalidRequestError("Template arguments must be an object.", param="chat_template_kwargs")
        extra = dict(template_kwargs or {})
        for name in extra:
            if not isinstance(name, str) or not name.isidentifier() or name in _RESERVED_KWARGS:
                raise InvalidRequestError(
                    f"The template argument {name!r} cannot be set.", param="chat_template_kwargs"
                )
            if name != "add_generation_prompt" and not _mentions(template.source, name):
                raise InvalidRequestError(
                    f"This model's chat template has no argument {name!r}.",
                    hint="It would be ignored; leave it out.",
                    param="chat_template_kwargs",
                )
        return extra

    def _named_id(self, name: str) -> int | None:
        text = self._named_tokens.get(name)
        return None if text is None else self._tokenizer.token_id(text)

    def _collect_eos(self, *configs: Mapping[str, Any]) -> tuple[int, ...]:
        found: list[int] = []
        for config in configs:
            value = config.get("eos_token_id")
            found.extend(value if isinstance(value, list) else [] if value is None else [value])
        named = self._named_id("eos_token")
        if named is not None:
            found.append(named)
        for token_id in found:
            if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < 2**31:
                raise CheckpointError(f"{self._folder}: eos_token_id holds {token_id!r}, which is no token id.")
        return tuple(dict.fromkeys(found))


def _read_templates(folder: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """Return the checkpoint's templates by name, a lone one as "default"; files win over the config."""
    found: dict[str, str] = {}
    limit_bytes = 4 * MAX_TEMPLATE_CHARS
    single = read_text(folder / "chat_template.jinja", limit_bytes)
    if single is not None:
        found["default"] = single
        tool_use = read_text(folder / "chat_templates" / "tool_use.jinja", limit_bytes)
        if tool_use is not None:
            found["tool_use"] = tool_use
        return found
    where = folder / "tokenizer_config.json"
    value = tokenizer_config.get("chat_template")
    if value is None:
        where = folder / "chat_template.json"
        value = (read_json_object(where, 2 * limit_bytes) or {}).get("chat_template")
    return _named_templates(value, where)


def _named_templates(value: Any, where: Path) -> dict[str, str]:
    """Templates by name, from one text, a list of names and texts, or nothing."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    pairs: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        pairs = list(value.items())
    elif isinstance(value, list):
        pairs = [(entry.get("name"), entry.get("template")) for entry in value if isinstance(entry, dict)]
    if not pairs or not all(isinstance(part, str) for pair in pairs for part in pair):
        raise CheckpointError(f"{where}: chat_template is neither text nor a list of named templates.")
    found = dict(pairs)
    if "default" not in found:
        raise CheckpointError(f"{where}: chat_template has no default among {sorted(found)}.")
    return found


def _named_tokens(tokenizer_config: Mapping[str, Any], folder: Path) -> dict[str, str]:
    named = {}
    for name in _NAMED_TOKENS:
        value = tokenizer_config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if value is None:
            continue
        if not isinstance(value, str):
            raise CheckpointError(f"{folder / 'tokenizer_config.json'}: {name} must be text, not {value!r:.80}.")
        named[name] = value
    return named


def _check_vocab(config: Mapping[str, Any], tokenizer: TextTokenizer, folder: Path) -> None:
    size = config.get("vocab_size")
    if isinstance(size, int) and not isinstance(size, bool) and tokenizer.vocab_size > size:
        raise CheckpointError(
            f"{folder / 'tokenizer.json'} makes token ids up to {tokenizer.vocab_size - 1}, but vocab_size in "
            f"config.json is {size}.",
            hint="Tokenizer and weights come from different models.",
        )


def _default_sampling(generation_config: Mapping[str, Any], folder: Path) -> dict[str, float]:
    if generation_config.get("do_sample") is False:
        return {"temperature": 0.0}
    found: dict[str, float] = {}
    for name in _SAMPLING_FIELDS:
        value = generation_config.get(name)
        if value is None:
            continue
        try:
            SamplingParams(**{name: value})
        except InvalidRequestError as cause:
            raise CheckpointError(f"{folder / 'generation_config.json'}: {cause.message:.200}") from cause
        found[name] = value
    return found


def _mentions(source: str, name: str) -> bool:
    return re.search(rf"\b{re.escape(name)}\b", source) is not None
