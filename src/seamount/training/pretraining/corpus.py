"""Training samples for the embedded model: conversations rendered, tokenised and marked for the loss.

A sample is a pure function of (seed, index), so a run that was killed goes on where it was. `render` writes
the same string as the shipped chat template (a test compares them) at a fraction of its cost. Called by the
training loop, which may draw samples one by one or build shards ahead. It must not know the network.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path
from random import Random

import numpy as np
from tokenizers import Tokenizer

from seamount.core.errors import ConfigError
from seamount.training.pretraining.bpe import (
    ASSISTANT,
    BOS,
    CALL_BEGIN,
    CALL_END,
    CALL_SEPARATOR,
    CALLS_BEGIN,
    CALLS_END,
    EOS,
    OUTPUT_BEGIN,
    OUTPUT_END,
    THINK,
    THINK_END,
    USER,
    describe_tool,
)
from seamount.training.skills import LANGUAGES, PRACTICE, SKILLS, Item, draw, random_of
from seamount.training.skills.item import Message, Tool

MAX_SAMPLE_TOKENS = 384
# How often each skill is drawn: more for those that need more practice.
WEIGHTS = {
    "arithmetic": 0.22,
    "extraction": 0.18,
    "masking": 0.17,
    "commands": 0.14,
    "tools": 0.19,
    "unknown": 0.10,
}
_JOINED_SHARE = 0.25  # of the samples without tools
_DIRECT_SHARE = 0.2  # thinking switched off
_SYSTEM_SHARE = 0.15
_SYSTEMS = {
    "en": (
        "You are a helpful assistant.",
        "You are seamount-tiny.",
        "Be brief.",
        "Answer in English.",
        "You work for a hospital.",
        "You help the staff of a bank.",
        "You assist in a factory.",
        "Be polite and exact.",
    ),
    "zh": (
        "你是一个有用的助手。",
        "你是seamount-tiny。",
        "请简短回答。",
        "请用中文回答。",
        "你为医院工作。",
        "你协助银行员工。",
        "你在工厂里帮忙。",
        "请礼貌、准确。",
    ),
}
_BATCH = 512
_DIGEST_SAMPLES = 256

_Mixture = dict[str, "_Shares"]
_Shares = tuple[tuple[str, ...], tuple[float, ...]]


def render(
    messages: Sequence[Message],
    tools: Sequence[Tool] = (),
    *,
    thinking: bool = True,
    add_generation_prompt: bool = False,
) -> str:
    """The prompt string of the shipped chat template, for conversations of the form that the skills make."""
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    pieces = [BOS, system]
    if tools:
        pieces.append("\n\nTools:" if system else "Tools:")
        pieces.extend("\n" + describe_tool(tool["function"]) for tool in tools)
    last = None if add_generation_prompt else messages[-1]
    for message in messages:
        match message["role"]:
            case "user":
                pieces += (USER, message["content"])
            case "assistant":
                opening = ""
                if thinking and message is last:
                    opening = THINK + message.get("reasoning_content", "")
                pieces += (ASSISTANT, opening, THINK_END, message["content"] or "")
                if calls := message.get("tool_calls"):
                    pieces.append(CALLS_BEGIN)
                    for call in calls:
                        function = call["function"]
                        pieces += (
                            CALL_BEGIN,
                            function["name"],
                            CALL_SEPARATOR,
                            function["arguments"],
                            CALL_END,
                        )
                    pieces.append(CALLS_END)
                pieces.append(EOS)
            case "tool":
                pieces += (OUTPUT_BEGIN, message["content"], OUTPUT_END)
    if add_generation_prompt:
        pieces += (ASSISTANT, THINK if thinking else THINK_END)
    return "".join(pieces)


def direct(message: Message) -> Message:
    """An assistant message as it is written with thinking off: the steps, if any, are the content's first lines."""
    if not (reasoning := message.get("reasoning_content")):
        return message
    return {"role": "assistant", "content": f"{reasoning}\n{message['content']}"}


def training_sample(
    tokenizer: Tokenizer, seed: int, index: int, *, weights: Mapping[str, float] = WEIGHTS
) -> tuple[list[int], list[bool]]:
    """Token ids of one sample and, for each, whether the assistant writes it (so the loss counts it).

    At most `MAX_SAMPLE_TOKENS`; a conversation that is longer is drawn again, never cut.
    `weights` says how often each skill is drawn, in any unit; a key `skill/language` goes before `skill` in that
    language. Raises ConfigError for an unknown skill.
    """
    mixture = _mixture(weights)
    attempt = 0
    while True:
        text, turns = _draw_text(seed, index, attempt, mixture)
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        if len(ids) <= MAX_SAMPLE_TOKENS:
            return ids, _written(ids, turns, *_marks(tokenizer))
        attempt += 1


def build_shard(
    path: Path,
    tokenizer: Tokenizer,
    num_samples: int,
    seed: int,
    *,
    first_index: int = 0,
    weights: Mapping[str, float] = WEIGHTS,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write samples `first_index` .. `first_index + num_samples - 1` of `seed` into the folder `path`.

    tokens.npy: uint16 [tokens], all samples in order; trained.npy: bool [tokens]; offsets.npy: int64
    [samples + 1], sample i being tokens[offsets[i]:offsets[i + 1]]; meta.json, written last, says what is in
    it. A finished shard of the same content is left as it is. `progress(done, total)` is called after each
    batch. About 8 bytes of memory are used for each token while it is built.
    """
    mixture = _mixture(weights)
    meta = {
        "seed": seed,
        "first_index": first_index,
        "num_samples": num_samples,
        "content": _digest(tokenizer, seed, mixture),
    }
    meta_path = path / "meta.json"
    if meta_path.exists() and json.loads(meta_path.read_text(encoding="utf-8")) == meta:
        return
    path.mkdir(parents=True, exist_ok=True)
    meta_path.unlink(missing_ok=True)
    marks = _marks(tokenizer)
    tokens: list[np.ndarray] = []
    trained: list[np.ndarray] = []
    lengths: list[int] = []
    for start in range(first_index, first_index + num_samples, _BATCH):
        indices = range(start, min(start + _BATCH, first_index + num_samples))
        drawn = [_draw_text(seed, index, 0, mixture) for index in indices]
        encodings = tokenizer.encode_batch_fast([text for text, _ in drawn], add_special_tokens=False)
        batch_ids: list[int] = []
        batch_trained: list[bool] = []
        for index, (_, turns), encoding in zip(indices, drawn, encodings, strict=True):
            ids = encoding.ids
            if len(ids) > MAX_SAMPLE_TOKENS:
                ids, written = training_sample(tokenizer, seed, index, weights=weights)
            else:
                written = _written(ids, turns, *marks)
            batch_ids += ids
            batch_trained += written
            lengths.append(len(ids))
        tokens.append(np.array(batch_ids, dtype=np.uint16))
        trained.append(np.array(batch_trained, dtype=np.bool_))
        if progress is not None:
            progress(len(lengths), num_samples)
    offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths, dtype=np.int64)])
    np.save(path / "tokens.npy", np.concatenate(tokens))
    np.save(path / "trained.npy", np.concatenate(trained))
    np.save(path / "offsets.npy", offsets)
    meta_path.write_text(json.dumps(meta), encoding="utf-8")


def _mixture(weights: Mapping[str, float]) -> _Mixture:
    """For each language the skills, and for each skill the sum of all shares up to its own; the last sum is 1."""
    drawn = (*SKILLS, *PRACTICE)
    known = {*drawn, *(f"{skill}/{language}" for skill in drawn for language in LANGUAGES)}
    if unknown := [name for name in weights if name not in known]:
        raise ConfigError(f"There is no skill {unknown[0]!r} to train.", hint=f"Known: {', '.join(drawn)}.")
    mixture = {}
    for language in LANGUAGES:
        names = dict.fromkeys(name.partition("/")[0] for name in weights)
        skills = {name: weights.get(f"{name}/{language}", weights.get(name, 0.0)) for name in names}
        total = sum(skills.values())
        if total <= 0 or min(skills.values()) < 0:
            raise ConfigError("The skills' weights must not be negative, and not all 0.")
        mixture[language] = tuple(skills), tuple(accumulate(weight / total for weight in skills.values()))
    return mixture


def _draw_text(seed: int, index: int, attempt: int, mixture: _Mixture) -> tuple[str, list[bool]]:
    """The rendered conversation of a sample and, for each assistant turn in it, whether it is trained."""
    rng = random_of("sample", seed, index, attempt)
    language = LANGUAGES[rng.random() < 0.5]
    thinking = rng.random() >= _DIRECT_SHARE
    items = _draw_items(rng, language, mixture[language])
    messages: list[Message] = []
    turns: list[bool] = []
    if rng.random() < _SYSTEM_SHARE:
        systems = _SYSTEMS[language]
        messages.append({"role": "system", "content": systems[int(rng.random() * len(systems))]})
    for item in items:
        for message in item.messages:
            if message["role"] != "assistant":
                messages.append(message)
                continue
            messages.append(message if thinking else direct(message))
            # An earlier answer that came from reasoning stands in the history without it: not to be imitated.
            turns.append(not (thinking and "reasoning_content" in message))
    turns[-1] = True
    return render(messages, items[0].tools, thinking=thinking), turns


def _draw_items(rng: Random, language: str, mixture: _Shares) -> list[Item]:
    """One item, or two to five to be joined; an item with tools stands alone, since tools hold for the whole."""
    first = draw(rng, _skill(rng, mixture), language)
    if first.tools or rng.random() >= _JOINED_SHARE:
        return [first]
    items = [first]
    wanted = (2, 2, 2, 3, 3, 4, 5)[int(rng.random() * 7)]
    while len(items) < wanted:
        item = draw(rng, _skill(rng, mixture), language)
        if not item.tools:
            items.append(item)
    return items


def _skill(rng: Random, mixture: _Shares) -> str:
    skills, bounds = mixture
    return skills[min(bisect_right(bounds, rng.random()), len(skills) - 1)]


def _marks(tokenizer: Tokenizer) -> tuple[int, int]:
    assistant, end = tokenizer.token_to_id(ASSISTANT), tokenizer.token_to_id(EOS)
    if assistant is None or end is None:
        raise ConfigError("The tokenizer has no chat tokens.", hint="Make it with seamount.training.pretraining.bpe.")
    return assistant, end


def _written(ids: list[int], turns: list[bool], assistant: int, end: int) -> list[bool]:
    """True where the assistant writes: from behind the mark that the prompt prefills up to the end of sentence."""
    written = [False] * len(ids)
    position = 0
    for trained in turns:
        start = ids.index(assistant, position) + 2
        position = ids.index(end, start) + 1
        if trained:
            written[start:position] = [True] * (position - start)
    return written


def _digest(tokenizer: Tokenizer, seed: int, mixture: _Mixture) -> str:
    """Changes with the tokenizer and (as far as the first samples show) with the skills."""
    digest = blake2b(tokenizer.to_str().encode(), digest_size=8)
    for index in range(_DIGEST_SAMPLES):
        digest.update(_draw_text(seed, index, 0, mixture)[0].encode())
    return digest.hexdigest()
