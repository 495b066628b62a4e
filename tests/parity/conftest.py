"""Small random checkpoints written by transformers, and a driver that feeds a network as the engine does.

The driver is the paged, batched path itself: chunks of several sequences in one flat batch, shuffled blocks,
a cache that holds rubbish where nothing was written.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    LlamaConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from seamount import LLM, SamplingParams
from seamount.models.batch import Batch
from seamount.models.config import ModelConfig
from seamount.models.loading import load_model
from seamount.models.network import CausalLM

VOCAB = 307
BLOCK_SIZE = 4

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
DENSE = COMMON | {"num_key_value_heads": 2}
LATENT = COMMON | {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 48,
    "kv_lora_rank": 32,
    "q_lora_rank": 40,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "tie_word_embeddings": False,
}
V3 = LATENT | {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "num_nextn_predict_layers": 0}
V2 = LATENT | {"topk_method": "greedy", "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0}


def yarn(**more: float) -> dict[str, Any]:
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 32}
    return {"rope_parameters": rope | {"beta_fast": 32.0, "beta_slow": 1.0} | more}


LLAMA3 = {
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
}
LINEAR = {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}

CASES: dict[str, tuple[type, dict[str, Any]]] = {
    "v3": (DeepseekV3Config, V3),
    "v3-yarn": (DeepseekV3Config, V3 | yarn(mscale=1.0, mscale_all_dim=1.0)),
    "v3-no-q-lora": (DeepseekV3Config, V3 | {"q_lora_rank": None}),
    "v3-no-groups": (DeepseekV3Config, V3 | {"n_group": 1, "topk_group": 1}),
    "v3-all-dense": (DeepseekV3Config, V3 | {"first_k_dense_replace": 3}),
    "v3-no-dense": (DeepseekV3Config, V3 | {"first_k_dense_replace": 0, "n_shared_experts": 2}),
    "v3-no-shared": (DeepseekV3Config, V3 | {"n_shared_experts": 0}),
    "v2-no-shared": (DeepseekV2Config, V2 | {"n_shared_experts": 0}),
    "v3-attention-bias": (DeepseekV3Config, V3 | {"attention_bias": True}),
    "v3-tied": (DeepseekV3Config, V3 | {"tie_word_embeddings": True}),
    "v3-not-normalised": (DeepseekV3Config, V3 | {"norm_topk_prob": False}),
    "v3-not-interleaved": (DeepseekV3Config, V3 | {"rope_interleave": False}),
    "v2": (DeepseekV2Config, V2 | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}),
    "v2-scaled": (DeepseekV2Config, V2 | {"routed_scaling_factor": 16.0}),
    "v2-lite": (DeepseekV2Config, V2 | {"q_lora_rank": None, "n_shared_experts": 2}),
    "v2-lite-yarn": (DeepseekV2Config, V2 | {"q_lora_rank": None} | yarn(mscale=0.707, mscale_all_dim=0.707)),
    "v2-attention-bias": (DeepseekV2Config, V2 | {"attention_bias": True}),
    "v2-mlp-bias": (DeepseekV2Config, V2 | {"mlp_bias": True}),
    "qwen2": (Qwen2Config, DENSE | {"tie_word_embeddings": False}),
    "qwen2-tied": (Qwen2Config, DENSE | {"tie_word_embeddings": True}),
    "qwen2-yarn": (Qwen2Config, DENSE | yarn()),
    "qwen3": (Qwen3Config, DENSE | {"head_dim": 24}),
    "qwen3-yarn-bias": (Qwen3Config, DENSE | {"head_dim": 16, "attention_bias": True} | yarn()),
    "llama": (LlamaConfig, DENSE),
    "llama3-rope": (LlamaConfig, DENSE | LLAMA3),
    "llama-linear": (LlamaConfig, DENSE | LINEAR),
    "llama-biases": (LlamaConfig, DENSE | {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
}


@pytest.fixture(params=CASES)
def family_case(request: pytest.FixtureRequest) -> tuple[type, dict[str, Any]]:
    """Each family and variation: transformers' config class and its arguments."""
    return CASES[request.param]


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def randomise(model: torch.nn.Module, seed: int, *, outliers: bool = False) -> None:
    """Give every weight the spread of a trained one: logits of unit size, norms near one, biases that matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if value.dim() >= 2 and value.numel():
                value.normal_(0, value.shape[-1] ** -0.5, generator=generator)
                if outliers:  # trained matrices have a few rows and columns far above the rest
                    value[..., 3, :] *= 5
                    value[..., 5] *= 5
            elif name.endswith("norm.weight"):
                value.normal_(1, 0.2, generator=generator)
                if outliers:
                    value[7 % len(value)] *= 8
            elif name.endswith("bias"):
                value.normal_(0, 0.3, generator=generator)
        if isinstance(model, PreTrainedModel):
            model.get_input_embeddings().weight.mul_(4)


def write_tokenizer(folder: Path, vocab_size: int = VOCAB) -> None:
    """A byte-level tokenizer of `vocab_size` tokens: the bytes, then fillers."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {text: i for i, text in enumerate(alphabet + [f"filler{i}" for i in range(vocab_size - len(alphabet))])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture
def write_checkpoint(tmp_path: Path) -> Callable[..., tuple[Path, PreTrainedModel]]:
    """Returns a function: transformers config class and its arguments to (folder, the reference model)."""

    def write(config: Any, *, seed: int = 0, outliers: bool = False, **save: Any) -> tuple[Path, PreTrainedModel]:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
        randomise(model, seed, outliers=outliers)
        model.generation_config.eos_token_id = None
        model.save_pretrained(tmp_path, **save)
        write_tokenizer(tmp_path)
        return tmp_path, model

    return write


@pytest.fixture
def load() -> Callable[..., CausalLM]:
    """Returns the project's loader at fp32: for the compiled kernels, or with `packed=False` for plain torch."""

    def load(folder: Path, *, packed: bool = True) -> CausalLM:
        config = ModelConfig.from_folder(folder)
        return load_model(folder, config, dtype=torch.float32, device=torch.device("cpu"), packed=packed)

    return load


def edit_config(folder: Path, **fields: Any) -> dict[str, Any]:
    """Change config.json; a value of None removes the field. Returns the new content."""
    path = folder / "config.json"
    raw = {**json.loads(path.read_text()), **fields}
    raw = {name: value for name, value in raw.items() if value is not None}
    path.write_text(json.dumps(raw))
    return raw


class PagedDriver:
    """Runs sequences through a network in chunks, several at once, over a paged cache."""

    def __init__(
        self, model: CausalLM, *, num_blocks: int = 128, seed: int = 0, dtype: torch.dtype = torch.float32
    ) -> None:
        self.model, self.random = model, random.Random(seed)
        self.cache = model.cache_spec.allocate(num_blocks * BLOCK_SIZE, dtype, torch.device("cpu"))
        for layer in self.cache:
            for part in layer:
                part.fill_(777.0)
        self.free = list(range(num_blocks))
        self.random.shuffle(self.free)
        self.tables: list[list[int]] = []
        self.lengths: list[int] = []

    def step(self, work: Sequence[tuple[int, Sequence[int]]]) -> list[torch.Tensor]:
        """Process `(sequence, its next tokens)` pairs as one batch; logits `[n, vocab]` per pair."""
        pieces = []
        for sequence, new in work:
            while len(self.tables) <= sequence:
                self.tables.append([])
                self.lengths.append(0)
            table, begin = self.tables[sequence], self.lengths[sequence]
            end = begin + len(new)
            while len(table) * BLOCK_SIZE < end:
                table.append(self.free.pop())
            pieces.append((new, begin, table))
            self.lengths[sequence] = end
        batch = Batch.over_cache(pieces, BLOCK_SIZE)
        with torch.inference_mode():
            logits = self.model.logits(self.model(batch, self.cache))
        return list(logits.split([len(new) for _, new in work]))

    def all_logits(self, sequences: Sequence[Sequence[int]], *, most_tokens: int = 9) -> list[torch.Tensor]:
        """Logits of every position, the sequences cut into random chunks that mix prefill and decode."""
        done = [0] * len(sequences)
        parts: list[list[torch.Tensor]] = [[] for _ in sequences]
        while any(d < len(s) for d, s in zip(done, sequences, strict=True)):
            work = []
            for i in self.random.sample(range(len(sequences)), len(sequences)):
                count = min(self.random.choice([0, 1, 1, 2, most_tokens]), len(sequences[i]) - done[i])
                if count:
                    work.append((i, sequences[i][done[i] : done[i] + count]))
                    done[i] += count
            if work:
                for (i, _), logits in zip(work, self.step(work), strict=True):
                    parts[i].append(logits)
        return [torch.cat(part) for part in parts]


@pytest.fixture
def paged_driver() -> type[PagedDriver]:
    return PagedDriver


@pytest.fixture
def randomiser() -> Callable[..., None]:
    return randomise


@pytest.fixture
def config_editor() -> Callable[..., dict[str, Any]]:
    return edit_config


@pytest.fixture
def prompts() -> list[list[int]]:
    """Three prompts of different lengths."""
    rng = random.Random(5)
    return [[rng.randrange(VOCAB) for _ in range(n)] for n in (3, 21, 38)]


@pytest.fixture
def reference_logits() -> Callable[[PreTrainedModel, Sequence[Sequence[int]]], list[torch.Tensor]]:
    """Returns a function: logits of every position by transformers, one sequence at a time."""

    def logits(model: PreTrainedModel, sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        with torch.inference_mode():
            return [model(torch.tensor([s]), use_cache=False).logits[0] for s in sequences]

    return logits


@pytest.fixture
def reference_greedy() -> Callable[[PreTrainedModel, Sequence[Sequence[int]], int], list[list[int]]]:
    """Returns a function: the greedy continuation by transformers, one prompt at a time."""

    def greedy(model: PreTrainedModel, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        return [
            model.generate(
                torch.tensor([p]),
                attention_mask=torch.ones(1, len(p), dtype=torch.long),
                do_sample=False,
                max_new_tokens=count,
                pad_token_id=0,
            )[0, len(p) :].tolist()
            for p in prompts
        ]

    return greedy


@pytest.fixture
def engine_greedy() -> Callable[[Path, Sequence[Sequence[int]], int], list[list[int]]]:
    """Returns a function: greedy continuations by the project's engine, side by side, in small chunks and blocks."""

    def greedy(folder: Path, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        llm = LLM(
            str(folder),
            dtype="float32",
            device="cpu",
            num_threads=1,
            cache_memory_bytes=2**21,
            block_size=4,
            max_num_seqs=8,
            max_step_tokens=16,
        )
        sampling = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
        return [list(completion.token_ids) for completion in llm.generate(prompts, sampling)]

    return greedy
