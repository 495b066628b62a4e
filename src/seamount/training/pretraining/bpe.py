"""Make the byte-level BPE tokenizer of the embedded model from the text of the skills.

Run once when the skills change (`python -m seamount.training.pretraining.bpe FOLDER`); the result is shipped. The
pieces that the words are cut into are chosen for copying: a digit, a Chinese character, a capitalised word or a run
of punctuation is the same token wherever it stands, so the network copies names and numbers token by token. It must
not know the network or the training loop.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from seamount.training.skills import LANGUAGES, SKILLS, generate

VOCABULARY_SIZE = 4096
BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK, THINK_END = "<think>", "</think>"
CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL_BEGIN, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
CALL_SEPARATOR = "<｜tool▁sep｜>"
OUTPUT_BEGIN, OUTPUT_END = "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"

# Only these are hidden when text is decoded for people; as in DeepSeek's own tokenizers the chat marks are
# not, for the reasoning and tool parsers read them.
_HIDDEN = (BOS, EOS, PAD)
SPECIAL_TOKENS = (
    *_HIDDEN,
    USER,
    ASSISTANT,
    THINK,
    THINK_END,
    CALLS_BEGIN,
    CALLS_END,
    CALL_BEGIN,
    CALL_END,
    CALL_SEPARATOR,
    "<｜tool▁outputs▁begin｜>",
    "<｜tool▁outputs▁end｜>",
    OUTPUT_BEGIN,
    OUTPUT_END,
)
_SPLIT = r"\p{N}|\p{Han}|[ _]?\p{Ll}+|\p{Lu}+\p{Ll}*|(?:(?!\p{Han})\p{L})+| ?[^\s\p{L}\p{N}]+|\s+"
_CORPUS_SEED = 0
_ITEMS_PER_SKILL = 6000
CONTEXT_TOKENS = 2048


def train(items_per_skill: int = _ITEMS_PER_SKILL) -> Tokenizer:
    """A tokenizer of exactly 4096 entries over the training side of the skills; the same on every run.

    Raises ValueError where the corpus is too poor to fill the vocabulary.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(items_per_skill), trainer)
    if tokenizer.get_vocab_size() != VOCABULARY_SIZE:
        raise ValueError(f"the corpus gives {tokenizer.get_vocab_size()} tokens, not {VOCABULARY_SIZE}")
    described = json.loads(tokenizer.to_str())
    for entry in described["added_tokens"]:
        entry["special"] = entry["content"] in _HIDDEN
    return Tokenizer.from_str(json.dumps(described, ensure_ascii=False))


def _texts(items_per_skill: int) -> Iterator[str]:
    """Every text that the items of the training split hold, tool schemas in the form of the chat template."""
    for skill in SKILLS:
        for language in LANGUAGES:
            for index in range(items_per_skill):
                item = generate(skill, language, _CORPUS_SEED, index)
                for message in item.messages:
                    for text in (message.get("reasoning_content"), message.get("content")):
                        if text:
                            yield text
                    for call in message.get("tool_calls", ()):
                        yield call["function"]["name"]
                        yield call["function"]["arguments"]
                if item.tools:
                    yield "Tools:"
                for tool in item.tools:
                    yield "\n" + describe_tool(tool["function"])


def describe_tool(function: dict[str, Any]) -> str:
    """A function's schema in one line, as the chat template writes it: `name(a: string, b: integer): text`."""
    properties = function["parameters"]["properties"]
    parameters = ", ".join(f"{name}: {spec['type']}" for name, spec in properties.items())
    return f"{function['name']}({parameters}): {function['description']}"


def write(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and generation_config.json into `folder`.

    The folder's `chat_template.jinja` is the source of the `chat_template` entry. Raises FileNotFoundError
    without it.
    """
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT_TOKENS,
        "chat_template": template,
    }
    generation = {
        "bos_token_id": tokenizer.token_to_id(BOS),
        "eos_token_id": tokenizer.token_to_id(EOS),
        "pad_token_id": tokenizer.token_to_id(PAD),
        "do_sample": False,
    }
    for name, content in (("tokenizer_config.json", config), ("generation_config.json", generation)):
        text = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(train(), Path(sys.argv[1]))
