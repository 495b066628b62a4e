"""Checkpoint folders of each chat family without weights, and what tests of training data look at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from seamount.models import builtin_templates
from seamount.models.prompt import PromptEncoder
from seamount.training.examples.example import Example
from seamount.training.examples.formats import recognise
from seamount.training.examples.record import Record
from seamount.training.examples.sample import Sample

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
_CHATML = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
_LLAMA = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
_TOOL_PARTS = ("calls", "call", "outputs", "output")
_DEEPSEEK = ["<｜User｜>", "<｜Assistant｜>", "<｜tool▁sep｜>"] + [
    f"<｜tool▁{part}▁{edge}｜>" for part in _TOOL_PARTS for edge in ("begin", "end")
]
_THINK = ["<think>", "</think>"]
_CORPUS = ["The quick brown fox. 1 + 2 = 3; 你好,世界!\n\n", "weather in Paris\n", '{"name": "get_weather"}'] * 4

# As DeepSeek published it with R1 and its distills: a lone tool call is never ended, words beside a call lose the call,
# and reasoning is cut off.
STOCK_R1 = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
    "{% set ns = namespace(is_first=false, is_tool=false, is_output_first=true, system_prompt='') %}"
    "{%- for message in messages %}{%- if message['role'] == 'system' %}"
    "{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}{{bos_token}}{{ns.system_prompt}}"
    "{%- for message in messages %}{%- if message['role'] == 'user' %}{%- set ns.is_tool = false -%}"
    "{{'<｜User｜>' + message['content']}}{%- endif %}"
    "{%- if message['role'] == 'assistant' and message['content'] is none %}{%- set ns.is_tool = false -%}"
    "{%- for tool in message['tool_calls']%}{%- if not ns.is_first %}"
    "{{'<｜Assistant｜><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + "
    "tool['function']['name'] + '\\n' + '```json' + '\\n' + tool['function']['arguments'] + '\\n' + '```' + "
    "'<｜tool▁call▁end｜>'}}{%- set ns.is_first = true -%}{%- else %}"
    "{{'\\n' + '<｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + tool['function']['name'] + '\\n' + "
    "'```json' + '\\n' + tool['function']['arguments'] + '\\n' + '```' + '<｜tool▁call▁end｜>'}}"
    "{{'<｜tool▁calls▁end｜><｜end▁of▁sentence｜>'}}{%- endif %}{%- endfor %}{%- endif %}"
    "{%- if message['role'] == 'assistant' and message['content'] is not none %}{%- if ns.is_tool %}"
    "{{'<｜tool▁outputs▁end｜>' + message['content'] + '<｜end▁of▁sentence｜>'}}{%- set ns.is_tool = false -%}"
    "{%- else %}{% set content = message['content'] %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}{%- endif %}{%- endif %}"
    "{%- if message['role'] == 'tool' %}{%- set ns.is_tool = true -%}{%- if ns.is_output_first %}"
    "{{'<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>'}}"
    "{%- set ns.is_output_first = false %}{%- else %}"
    "{{'\\n<｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>'}}{%- endif %}{%- endif %}"
    "{%- endfor -%}{% if ns.is_tool %}{{'<｜tool▁outputs▁end｜>'}}{% endif %}"
    "{% if add_generation_prompt and not ns.is_tool %}{{'<｜Assistant｜>@OPENING@'}}{% endif %}"
)
# Template, tokens that it writes, the one that ends an answer.
FAMILIES: dict[str, tuple[str, list[str], str]] = {
    "v2": (builtin_templates.DEEPSEEK_V2, [], EOS),
    "v3": (builtin_templates.DEEPSEEK_V3, _DEEPSEEK, EOS),
    "r1": (builtin_templates.DEEPSEEK_R1, _DEEPSEEK + _THINK, EOS),
    "v31": (builtin_templates.DEEPSEEK_V31, _DEEPSEEK + _THINK, EOS),
    "r1-stock": (STOCK_R1.replace("@OPENING@", "<think>\\n"), _DEEPSEEK + _THINK, EOS),
    "r1-first": (STOCK_R1.replace("@OPENING@", ""), _DEEPSEEK + _THINK, EOS),
    "qwen2": (builtin_templates.QWEN2, [*_CHATML, "<tool_call>", "</tool_call>"], "<|im_end|>"),
    "qwen3": (builtin_templates.QWEN3, [*_CHATML, "<tool_call>", "</tool_call>", *_THINK], "<|im_end|>"),
    "llama3": (builtin_templates.LLAMA3, _LLAMA, "<|eot_id|>"),
}


# How Llama 3 and DeepSeek cut text: line breaks are pieces of their own, whatever follows.
_PIECES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def write_family(folder: Path, template: str, added: list[str], end: str, *, breaks_apart: bool = True) -> Path:
    """A checkpoint folder without weights.

    Args:
        breaks_apart: line breaks are tokens by themselves; else, as GPT-2 has it, they are cut by what follows.
    """
    tokenizer = Tokenizer(models.BPE())
    cuts = [pre_tokenizers.Split(Regex(_PIECES), "isolated")] if breaks_apart else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not breaks_apart)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.add_special_tokens([BOS, EOS, *(text for text in added if text in _CHATML + _LLAMA)])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in added if text not in _CHATML + _LLAMA])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": BOS, "eos_token": end}))
    if template:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


def sample_of(value: dict[str, Any]) -> Sample:
    """What a lone record says."""
    record = Record("item 1", 1, value)
    return recognise([record]).sample(record)


def learned(example: Example, encoder: PromptEncoder) -> list[str]:
    """The texts of the example's trained stretches."""
    stretches: list[list[int]] = []
    before = False
    for token_id, is_trained in zip(example.token_ids.tolist(), example.trained.tolist(), strict=True):
        if is_trained and not before:
            stretches.append([])
        if is_trained:
            stretches[-1].append(token_id)
        before = is_trained
    return [encoder.decode(ids, skip_special_tokens=False) for ids in stretches]
