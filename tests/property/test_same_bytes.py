"""A request's tokens and log-probabilities are the same to the bit in every company, in every precision.

Each request runs once by itself: whole, no prefix cache, one thread. Then all of them run as traffic through a fresh
engine: arriving at random steps, sharing prefixes, cut into chunks, preempted, on one thread or two.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from seamount import SamplingParams, kernels
from seamount.core.requests import Request
from seamount.core.settings import EngineConfig
from seamount.engine.build import build_engine
from seamount.engine.engine import EngineCore
from seamount.kernels.library import ISA_NAMES
from seamount.models.config import ModelConfig
from seamount.models.keymap import placements

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="only compiled kernels give every row its own bits")

VOCAB = 307
MAX_MODEL_LEN = 640
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 72,
    "intermediate_size": 100,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "torch_dtype": "float32",
}
LATENT = COMMON | {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 40,
    "kv_lora_rank": 32,
    "q_lora_rank": 40,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
}
# `wide` has more inputs than one chunk of a sum, and biases before its gates.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": COMMON | {"model_type": "qwen2"},
    "qwen3": COMMON | {"model_type": "qwen3", "head_dim": 24},
    "wide": COMMON
    | {"model_type": "llama", "hidden_size": 2112, "num_hidden_layers": 1, "mlp_bias": True, "head_dim": 16},
    "v2-lite": LATENT | {"model_type": "deepseek_v2", "q_lora_rank": None, "n_shared_experts": 2},
    "v3-groups": LATENT | {"model_type": "deepseek_v3", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5},
}
PRECISIONS: dict[str, dict[str, str]] = {
    "float32": {"dtype": "float32"},
    "float16": {"dtype": "float16"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "bfloat16", "quantization": "int8"},
    "int4": {"dtype": "bfloat16", "quantization": "int4"},
}

Outcome = list[tuple[tuple[int, ...], tuple[Any, ...]]]


def write_checkpoint(folder: Path, raw: dict[str, Any]) -> None:
    """Random weights with the spread of trained ones, a few of them far above the rest."""
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for place in placements(ModelConfig.from_dict(raw)):
        value = torch.randn(place.shape, generator=generator)
        if value.dim() == 2:
            value *= value.shape[1] ** -0.5
            value[3 % len(value)] *= 4
        elif place.key.endswith("norm.weight"):
            value = 1 + 0.2 * value
        tensors[place.key] = value
    tensors["model.embed_tokens.weight"] *= 4
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(raw))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + [f"filler{i}" for i in range(VOCAB - len(alphabet))]
    tokenizer = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {name: tmp_path_factory.mktemp(name) for name in FAMILIES}
    for name, folder in found.items():
        write_checkpoint(folder, FAMILIES[name])
    return found


@pytest.fixture(autouse=True, scope="module")
def _threads_as_they_were() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    kernels.set_threads(before)


def engine_of(folder: Path, precision: str, **options: Any) -> EngineCore:
    given = {"num_threads": 1, "max_model_len": MAX_MODEL_LEN, **options}
    return build_engine(EngineConfig(model=str(folder), **PRECISIONS[precision], **given))[0]


def random_requests(chance: random.Random, count: int, outputs: tuple[int, ...] = (1, 3, 6, 14)) -> list[Request]:
    """Prompts of 1 to 580 tokens, many with a beginning in common, and one of `outputs` tokens wanted."""

    def tokens(most: int) -> tuple[int, ...]:
        return tuple(chance.randrange(VOCAB) for _ in range(chance.randint(1, most)))

    beginnings = [(), tokens(20), tokens(80), tokens(540 if chance.random() < 0.3 else 120)]
    made = []
    for number in range(count):
        sampling = {
            "temperature": chance.choice([0.0, 0.0, 0.7, 1.3]),
            "top_p": chance.choice([1.0, 0.9]),
            "top_k": chance.choice([0, 20]),
            "max_tokens": chance.choice(outputs),
            "repetition_penalty": chance.choice([1.0, 1.0, 1.2]),
            "n": chance.choice([1, 1, 1, 2]),
        }
        params = SamplingParams(seed=chance.randrange(99), logprobs=5, ignore_eos=True, **sampling)
        prompt = chance.choice(beginnings) + tokens(40)
        made.append(Request(id=f"{number}", prompt_token_ids=prompt, sampling=params))
    return made


def run(engine: EngineCore, requests: list[Request], arrivals: list[int]) -> dict[str, Outcome]:
    """Add each request before the step that its arrival names, and step until all have ended."""
    found = {request.id: [((), ())] * request.sampling.n for request in requests}
    waiting = sorted(zip(arrivals, requests, strict=True), key=lambda pair: pair[0])
    step = 0
    while waiting or not engine.idle:
        while waiting and waiting[0][0] <= step:
            engine.add(waiting.pop(0)[1])
        for chunk in engine.step():
            tokens, logprobs = found[chunk.request_id][chunk.index]
            found[chunk.request_id][chunk.index] = (tokens + chunk.token_ids, logprobs + chunk.logprobs)
        step += 1
    return found


def alone(engine: EngineCore, requests: list[Request]) -> dict[str, Outcome]:
    found: dict[str, Outcome] = {}
    for request in requests:
        found |= run(engine, [request], [0])
    return found


def assert_same(found: dict[str, Outcome], expected: dict[str, Outcome], requests: list[Request]) -> None:
    """As `==`, and says where they part."""
    for request in requests:
        for index, (ours, theirs) in enumerate(zip(found[request.id], expected[request.id], strict=True)):
            place = f"request {request.id}.{index} with {len(request.prompt_token_ids)} tokens"
            for position, pair in enumerate(zip(ours[1], theirs[1], strict=False)):
                assert pair[0] == pair[1], f"{place} differs at output {position}"
            assert ours == theirs, place


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=3, phases=[Phase.explicit, Phase.generate])
@given(data=st.data())
def test_traffic_changes_no_bit(family: str, precision: str, folders: dict[str, Path], data: st.DataObject) -> None:
    chance = random.Random(data.draw(st.integers(0, 2**32), label="traffic"))
    requests = random_requests(chance, data.draw(st.integers(8, 32), label="requests"))
    by_itself = engine_of(folders[family], precision, enable_prefix_cache=False)
    expected = alone(by_itself, requests)
    options: dict[str, Any] = {
        "max_step_tokens": data.draw(st.sampled_from([16, 33, 64, 200, 2048]), label="step"),
        "block_size": data.draw(st.sampled_from([1, 4, 16, 64]), label="block"),
        "enable_prefix_cache": data.draw(st.booleans(), label="prefix cache"),
        "num_threads": data.draw(st.sampled_from([1, 2]), label="threads"),
        "max_num_seqs": data.draw(st.sampled_from([3, 32]), label="side by side"),
    }
    if data.draw(st.booleans(), label="tight"):
        options["cache_memory_bytes"] = (MAX_MODEL_LEN + 64) * by_itself.facts.cache_bytes_per_token
    crowd = engine_of(folders[family], precision, **options)
    arrivals = [chance.randrange(25) for _ in requests]
    assert_same(run(crowd, requests, arrivals), expected, requests)
    # Once more in another order: now every prompt finds its beginning in the cache.
    chance.shuffle(arrivals)
    assert_same(run(crowd, requests, arrivals), expected, requests)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_preemption_and_prefix_hits_change_no_bit(precision: str, folders: dict[str, Path]) -> None:
    """What the test above leaves to chance."""
    requests = random_requests(random.Random(1), 16, outputs=(30, 50))
    by_itself = engine_of(folders["v3-groups"], precision, enable_prefix_cache=False)
    tight = (MAX_MODEL_LEN + 64) * by_itself.facts.cache_bytes_per_token
    crowd = engine_of(folders["v3-groups"], precision, block_size=4, max_step_tokens=48, cache_memory_bytes=tight)
    assert_same(run(crowd, requests, [0] * len(requests)), alone(by_itself, requests), requests)
    assert crowd.stats().num_preemptions > 0
    assert crowd.stats().num_prefix_hit_tokens > 0


@pytest.mark.parametrize("isa", ["plain", "avx2", "avx512"])
@pytest.mark.parametrize("family", ["wide", "v3-groups"])
def test_lesser_instruction_sets_change_no_bit_either(family: str, isa: str, folders: dict[str, Path]) -> None:
    lib, wanted = kernels.library(), ISA_NAMES.index(isa)
    assert lib is not None
    try:
        if lib.seamount_choose_isa(wanted) != wanted:
            pytest.skip(f"this chip has no {isa}")
        requests = random_requests(random.Random(2), 8)
        expected = alone(engine_of(folders[family], "int8", enable_prefix_cache=False), requests)
        crowd = engine_of(folders[family], "int8", max_step_tokens=64, num_threads=2)
        assert_same(run(crowd, requests, [0, 0, 0, 1, 2, 3, 5, 8]), expected, requests)
    finally:
        lib.seamount_choose_isa(len(ISA_NAMES) - 1)


IN_ANOTHER_PROCESS = """
import sys
from seamount import LLM, SamplingParams
llm = LLM(sys.argv[1], dtype="bfloat16", quantization="int8", num_threads=2, max_model_len=640)
sampling = SamplingParams(temperature=0.8, seed=5, max_tokens=12, logprobs=5, ignore_eos=True)
for answer in llm.generate(["The same bytes.", "The same bytes every time, in whatever company"], sampling):
    print(answer.token_ids, [(p.chosen.logprob.hex(), [t.logprob.hex() for t in p.top]) for p in answer.logprobs])
"""


def test_a_restart_changes_no_bit(folders: dict[str, Path]) -> None:
    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", IN_ANOTHER_PROCESS, str(folders["v3-groups"])]
        return subprocess.Popen(command, text=True, stdout=subprocess.PIPE)

    first, second = (process.communicate(timeout=300)[0] for process in [start(), start()])
    assert first.count("(") > 2 * 12
    assert first == second
