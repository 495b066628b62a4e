"""Training samples: the same strings as the chat template, the right tokens in the loss, reproducible shards."""

import json
from pathlib import Path

import numpy as np
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer

import seamount.models
from seamount.core.errors import ConfigError
from seamount.models.prompt import PromptEncoder
from seamount.training.pretraining.bpe import BOS, EOS, THINK, THINK_END
from seamount.training.pretraining.corpus import MAX_SAMPLE_TOKENS, build_shard, direct, render, training_sample
from seamount.training.skills import LANGUAGES, SKILLS, generate

FOLDER = Path(seamount.models.__file__).parent / "embedded" / "seamount-tiny"
TOKENIZER = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
SYSTEM = {"role": "system", "content": "Be brief."}
ITEMS = [generate(skill, language, 3, index) for skill in SKILLS for language in LANGUAGES for index in range(12)]


def decode(ids):
    return TOKENIZER.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("prompt_only", [True, False])
def test_render_writes_what_jinja_and_transformers_write(thinking, prompt_only):
    source = json.loads((FOLDER / "tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"]
    plain = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(source)
    theirs = AutoTokenizer.from_pretrained(FOLDER)
    for number, item in enumerate(ITEMS):
        messages = [SYSTEM] * (number % 2) + list(item.prompt if prompt_only else item.messages)
        tools = list(item.tools) or None
        variables = {"thinking": thinking, "add_generation_prompt": prompt_only}
        expected = plain.render(messages=messages, tools=tools, bos_token=BOS, eos_token=EOS, **variables)
        assert render(messages, item.tools, **variables) == expected
        assert theirs.apply_chat_template(messages, tools=tools, tokenize=False, **variables) == expected


def test_the_server_encodes_a_prompt_to_the_tokens_that_training_saw():
    encoder = PromptEncoder.from_folder(FOLDER)
    for item in ITEMS[::6]:
        encoded = encoder.encode_chat(item.prompt, tools=list(item.tools) or None)
        expected = TOKENIZER.encode(render(item.messages, item.tools)).ids
        assert list(encoded.token_ids) == expected[: len(encoded.token_ids)]
        assert encoded.starts_in_reasoning
    encoder.close()


def test_thinking_is_on_unless_switched_off_and_history_shows_no_reasoning():
    theirs = AutoTokenizer.from_pretrained(FOLDER)
    messages = [
        {"role": "user", "content": "1 + 1"},
        {"role": "assistant", "content": "The answer is 2.", "reasoning_content": "1 + 1 = 2"},
        {"role": "user", "content": "Thanks"},
    ]

    def prompt(**variables):
        return theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **variables)

    assert prompt().endswith("<｜Assistant｜><think>")
    assert prompt(thinking=False).endswith("<｜Assistant｜></think>")
    assert "1 + 1 = 2" not in prompt()
    assert f"<｜Assistant｜></think>The answer is 2.{EOS}" in prompt()


def test_with_thinking_off_the_steps_come_before_the_same_last_line():
    answer = generate("arithmetic", "en", 1, 1).answer
    assert direct(answer)["content"] == f"{answer['reasoning_content']}\n{answer['content']}"
    assert "reasoning_content" not in direct(answer)


def test_a_sample_is_pure_short_enough_and_trains_only_what_the_assistant_writes():
    seen_joined = seen_direct = seen_tools = 0
    for index in range(400):
        ids, trained = training_sample(TOKENIZER, 7, index)
        assert (ids, trained) == training_sample(TOKENIZER, 7, index)
        assert len(ids) == len(trained) <= MAX_SAMPLE_TOKENS
        text = decode(ids)
        assert TOKENIZER.encode(text).ids == ids
        final_prompt, final = text.rsplit("<｜Assistant｜>", 1)
        # The last answer is trained to its end of sentence, all but the mark that the prompt prefills.
        prefix = THINK if final.startswith(THINK) else THINK_END
        wanted = TOKENIZER.encode(final.removeprefix(prefix)).ids
        assert final.endswith(EOS)
        assert ids[-len(wanted) :] == wanted
        assert all(trained[-len(wanted) :])
        assert not trained[len(ids) - len(wanted) - 1]
        assert not trained[0]
        seen_joined += final_prompt.count("<｜User｜>") > 1
        seen_direct += prefix == THINK_END
        seen_tools += "Tools:" in final_prompt
        if "<｜Assistant｜>" not in final_prompt:
            assert sum(trained) == len(wanted)
    assert 40 < seen_joined < 140
    assert 40 < seen_direct < 140
    assert seen_tools > 40


def test_an_earlier_answer_is_trained_unless_its_reasoning_was_left_out():
    seen = {True: 0, False: 0}
    for index in range(600):
        ids, trained = training_sample(TOKENIZER, 8, index)
        text = decode(ids)
        if text.count("<｜User｜>") < 2:
            continue
        first_end = ids.index(TOKENIZER.token_to_id(EOS))
        answer = decode(ids[: first_end + 1]).split("<｜Assistant｜>")[1]
        bare_result = text.rsplit("<｜Assistant｜>", 1)[1].startswith(THINK) and "answer is" in answer
        if bare_result:
            assert not trained[first_end], text
        seen[trained[first_end]] += 1
    assert min(seen.values()) > 5


def test_a_shard_holds_the_samples_and_is_not_built_twice(tmp_path):
    calls = []
    build_shard(tmp_path / "a", TOKENIZER, 700, 7, first_index=30, progress=lambda done, total: calls.append(done))
    assert calls == [512, 700]
    tokens, trained = np.load(tmp_path / "a" / "tokens.npy"), np.load(tmp_path / "a" / "trained.npy")
    offsets = np.load(tmp_path / "a" / "offsets.npy")
    assert (tokens.dtype, trained.dtype, offsets.dtype) == (np.uint16, np.bool_, np.int64)
    assert len(tokens) == len(trained) == offsets[-1]
    for place in (0, 1, 511, 512, 699):
        ids, written = training_sample(TOKENIZER, 7, 30 + place)
        assert tokens[offsets[place] : offsets[place + 1]].tolist() == ids
        assert trained[offsets[place] : offsets[place + 1]].tolist() == written
    build_shard(tmp_path / "a", TOKENIZER, 700, 7, first_index=30, progress=lambda done, total: calls.append(done))
    assert calls == [512, 700]
    build_shard(tmp_path / "a", TOKENIZER, 10, 7, first_index=30, progress=lambda done, total: calls.append(done))
    assert calls == [512, 700, 10]


def test_weights_choose_the_skills_and_wrong_ones_are_refused(tmp_path):
    only = {"tools": 2.0, "masking": 0.0}
    assert all("Tools:" in decode(training_sample(TOKENIZER, 1, index, weights=only)[0]) for index in range(30))
    build_shard(tmp_path, TOKENIZER, 5, 1, weights=only)
    first = np.load(tmp_path / "tokens.npy")[: np.load(tmp_path / "offsets.npy")[1]].tolist()
    assert first == training_sample(TOKENIZER, 1, 0, weights=only)[0]
    with pytest.raises(ConfigError, match="poetry"):
        training_sample(TOKENIZER, 1, 1, weights={"poetry": 1.0})
    with pytest.raises(ConfigError, match="weights"):
        training_sample(TOKENIZER, 1, 1, weights={"tools": 0.0})


def test_a_tokenizer_without_chat_tokens_is_refused():
    with pytest.raises(ConfigError, match="chat tokens"):
        training_sample(Tokenizer(models.BPE()), 1, 1)
