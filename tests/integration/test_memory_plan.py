"""A process takes the memory that was planned before its model was loaded: at most 15 % more, and not much less.

Each case is a process of its own. It runs the largest step that the plan allows for: as many sequences as may run, and
a prompt that fills a step by itself. What it holds before it begins (interpreter, torch) is no part of the plan, which
is made of the memory that is free at that moment.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from seamount import kernels
from seamount.engine.memory import MemoryPlan
from seamount.models.config import ModelConfig
from seamount.models.keymap import placements

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="the plan counts what the compiled kernels hold")

MOST, LEAST = 1.15, 0.75
# Where weights and cache are less, the plan is mostly workspace. That is counted for any traffic (guesses, replayed
# steps and long prompts at once), so a plan for a small model must suffice and may be too careful.
LARGE_BYTES = 300 * 10**6

DENSE = {
    "model_type": "qwen2",
    "vocab_size": 120_000,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 8,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
EXPERTS = {
    "model_type": "deepseek_v3",
    "vocab_size": 32_000,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "moe_intermediate_size": 384,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "max_position_embeddings": 8192,
    "kv_lora_rank": 256,
    "q_lora_rank": None,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "n_routed_experts": 48,
    "num_experts_per_tok": 6,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "torch_dtype": "bfloat16",
}

MEASURE = """
import dataclasses, json, sys
import psutil, torch
from seamount.core.requests import Request
from seamount.core.sampling import SamplingParams
from seamount.core.settings import EngineConfig
from seamount.engine import build
from seamount.ops.machine import peak_memory_bytes, reset_peak_memory

config = EngineConfig(**json.loads(sys.argv[1]))
plans, make = [], build.plan_memory
def planned(*arguments, **keywords):
    plans.append(make(*arguments, **keywords))
    return plans[-1]
build.plan_memory = planned

cpu = torch.device("cpu")
reset_peak_memory(cpu)
before = psutil.Process().memory_info().rss
engine, encoder = build.build_engine(config)
(plan,) = plans
capacity = plan.num_blocks * plan.block_size
chunk = min(config.max_step_tokens, plan.max_model_len - 8, capacity // 2)
short = min(config.max_step_tokens, capacity - chunk) // config.max_num_seqs - plan.block_size
for index in range(config.max_num_seqs):
    length = chunk if index == 0 else max(short, 1)
    tokens = tuple((7 * index + place) % 200 for place in range(length))
    sampling = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
    engine.add(Request(id=str(index), prompt_token_ids=tokens, sampling=sampling))
most_blocks = 0
while not engine.idle:
    engine.step()
    stats = engine.stats()
    most_blocks = max(most_blocks, stats.num_blocks - stats.num_free_blocks)
encoder.close()
assert "torch._dynamo" not in sys.modules, "torch's compiler was imported: a second and 140 MB for nothing"
taken = peak_memory_bytes(cpu) - before
print(json.dumps({"plan": dataclasses.asdict(plan), "num_blocks": most_blocks, "taken": taken}))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, small_checkpoint: Path) -> Iterator[dict[str, str]]:
    """The models by name; those made here are removed at once, because they are large."""
    root = tmp_path_factory.mktemp("planned")
    made = {"seamount-tiny": "seamount-tiny"}
    for name, raw in (("dense", DENSE), ("experts", EXPERTS)):
        made[name] = str(root / name)
        shutil.copytree(small_checkpoint, root / name, ignore=shutil.ignore_patterns("*.safetensors"))
        (root / name / "config.json").write_text(json.dumps(raw))
        save_file(_weights(raw), root / name / "model.safetensors")
    yield made
    shutil.rmtree(root)


def _weights(raw: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Small numbers; drawn once and repeated, since hundreds of millions would take seconds."""
    drawn = torch.randn(2**20, generator=torch.Generator().manual_seed(1)).mul(0.02).bfloat16()
    found = {}
    for place in placements(ModelConfig.from_dict(raw)):
        repeats = -(-place.num_values // drawn.numel())
        found[place.key] = drawn.repeat(repeats)[: place.num_values].view(place.shape)
    return found


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("seamount-tiny", {}),
        ("dense", {}),
        ("dense", {"quantization": "int4", "cache_memory_bytes": 150 * 10**6}),
        ("experts", {"quantization": "int8"}),
        ("experts", {"max_num_seqs": 8, "cache_memory_bytes": 60 * 10**6}),
    ],
    ids=["tiny", "dense", "dense-int4-given-cache", "experts-int8", "experts-given-cache"],
)
def test_the_plan_is_what_the_largest_step_takes(name: str, options: dict[str, Any], folders: dict[str, str]) -> None:
    config = {"model": folders[name], "device": "cpu", "num_threads": 2, **options}
    command = [sys.executable, "-W", "error", "-c", MEASURE, json.dumps(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    plan = MemoryPlan(**found["plan"])
    cache = plan.cache_bytes * found["num_blocks"] // plan.num_blocks
    planned = plan.weight_bytes + cache + plan.workspace_bytes
    told = f"took {found['taken']:,} of {planned:,}, cache {cache:,} used; {plan}"
    assert found["taken"] <= planned * MOST, told
    if plan.weight_bytes + cache >= LARGE_BYTES:
        assert found["taken"] >= planned * LEAST, told
