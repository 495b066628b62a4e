"""Replayed decode steps have the same bits as steps that are run, for every family and precision, guesses included."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from seamount import SamplingParams, kernels
from seamount.core.requests import Request
from seamount.core.settings import EngineConfig
from seamount.engine.build import build_engine
from seamount.engine.engine import EngineCore
from seamount.engine.replay import DecodeReplay
from seamount.engine.runner import Pass, Runner
from seamount.engine.scheduler import Work
from seamount.models.config import ModelConfig
from seamount.models.keymap import placements

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="steps are recorded as calls of compiled kernels")

VOCAB = 300
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
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
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "mscale": 1.0, "mscale_all_dim": 1.0}
V3 = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "num_nextn_predict_layers": 1}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": COMMON | {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": COMMON | {"model_type": "qwen3", "head_dim": 24},
    "llama": COMMON | {"model_type": "llama", "mlp_bias": True, "attention_bias": True},
    "v2-lite": LATENT | {"model_type": "deepseek_v2", "q_lora_rank": None, "rope_scaling": YARN},
    "v3": LATENT | V3 | {"model_type": "deepseek_v3"},
}
PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "float16": {"dtype": "float16"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "bfloat16", "quantization": "int8"},
    "int4": {"dtype": "bfloat16", "quantization": "int4"},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: write_checkpoint(tmp_path_factory.mktemp(name), raw) for name, raw in FAMILIES.items()}


def write_checkpoint(folder: Path, raw: dict[str, Any]) -> Path:
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for place in placements(ModelConfig.from_dict(raw)):
        value = torch.randn(place.shape, generator=generator)
        if value.dim() == 2:
            value *= value.shape[1] ** -0.5
        elif place.key.endswith("norm.weight"):
            value = 1 + 0.2 * value
        tensors[place.key] = value
    tensors["model.embed_tokens.weight"] *= 4
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(raw))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: i for i, text in enumerate([*alphabet, *(f"filler{i}" for i in range(VOCAB - len(alphabet)))])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(autouse=True)
def _threads_as_they_were() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    kernels.set_threads(before)


class Watched:
    """An engine, and what every pass through its network gave: which rows of which tokens, logits, hidden states.

    Args:
        replays: whether decode steps are replayed.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, replays: bool, model: Path | str, **options: Any) -> None:
        given = {"num_threads": 1, "max_model_len": 200, "block_size": 4, "max_step_tokens": 40, **options}
        self.passes: list[tuple[Any, Tensor, Tensor]] = []
        self.replay: DecodeReplay | None = None
        self.num_replayed = 0
        self._monkeypatch, self._replays = monkeypatch, replays
        self._run, self._take = Runner.run, DecodeReplay.take
        self.core: EngineCore = build_engine(EngineConfig(model=str(model), **given))[0]

    def serve(self, requests: list[Request], arrivals: list[int]) -> None:
        """Add each request before the step that its arrival names, and step until all have ended."""
        with self._monkeypatch.context() as patch:
            patch.setattr(Runner, "run", self._watched_run)
            patch.setattr(DecodeReplay, "take", self._watched_take)
            waiting = sorted(zip(arrivals, requests, strict=True), key=lambda pair: pair[0])
            step = 0
            while waiting or not self.core.idle:
                while waiting and waiting[0][0] <= step:
                    self.core.add(waiting.pop(0)[1])
                self.core.step()
                step += 1

    @property
    def _watched_run(self) -> Any:
        def run(runner: Runner, work: list[Work]) -> Pass:
            self.replay = runner.replay
            ran = self._run(runner, work)
            what = [(item.sequence.request_id, item.num_new, list(item.sequence.draft_token_ids)) for item in work]
            self.passes.append(((what, ran.first_positions), ran.logits.clone(), ran.hidden.clone()))
            return ran

        return run

    @property
    def _watched_take(self) -> Any:
        def take(replay: DecodeReplay, *step: Any) -> bool:
            taken = self._replays and self._take(replay, *step)
            self.num_replayed += taken
            return taken

        return take


def traffic(seed: int, vocab_size: int, count: int = 9) -> tuple[list[Request], list[int]]:
    """Prompts from one token to three chunks that arrive while others are decoded, and outputs over several blocks."""
    chance = random.Random(seed)
    requests = []
    for number in range(count):
        prompt = tuple(chance.randrange(5, vocab_size) for _ in range(chance.choice([1, 3, 20, 90])))
        sampling = SamplingParams(temperature=0, max_tokens=chance.randint(2, 30), ignore_eos=True)
        requests.append(Request(id=f"{number}", prompt_token_ids=prompt, sampling=sampling))
    return requests, [chance.randrange(30) for _ in requests]


def assert_same(ours: Watched, theirs: Watched) -> None:
    assert len(ours.passes) == len(theirs.passes)
    for mine, other in zip(ours.passes, theirs.passes, strict=True):
        assert mine[0] == other[0]
        assert torch.equal(mine[1], other[1])
        assert torch.equal(mine[2], other[2])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_replayed_steps_have_the_bits_of_steps_that_are_run(
    family: str, precision: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = PRECISIONS[precision] | {"speculation": "mtp" if family == "v3" else "off"}
    ours, theirs = (Watched(monkeypatch, replays, folders[family], **options) for replays in (True, False))
    for seed in (1, 2):
        requests, arrivals = traffic(seed, VOCAB)
        ours.serve(requests, arrivals)
        theirs.serve(requests, arrivals)
    assert_same(ours, theirs)
    assert theirs.num_replayed == 0 and ours.num_replayed > 30
    assert ours.replay is not None and ours.replay.refused == set()
    # Fewer shapes than steps, or nothing was replayed at all.
    assert 3 < ours.replay.num_recordings < ours.num_replayed


@pytest.mark.parametrize("speculation", ["mtp", "off"])
def test_so_do_those_of_the_embedded_model(speculation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose guesses are often right, on two threads."""
    options = {"speculation": speculation, "num_threads": 2}
    ours, theirs = (Watched(monkeypatch, replays, "seamount-tiny", **options) for replays in (True, False))
    requests, arrivals = traffic(3, 1000, count=20)
    ours.serve(requests, arrivals)
    theirs.serve(requests, arrivals)
    assert_same(ours, theirs)
    stats = ours.core.stats()
    assert stats == theirs.core.stats()
    assert (stats.num_accepted_tokens > 10) == (speculation == "mtp")
    assert ours.replay is not None and ours.replay.refused == set()


def test_preempted_and_resumed_sequences_change_no_bit(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"dtype": "float32", "cache_memory_bytes": 210 * 2 * 2 * 2 * 16 * 4}
    ours, theirs = (Watched(monkeypatch, replays, folders["qwen2"], **options) for replays in (True, False))
    requests, _ = traffic(4, VOCAB, count=20)
    ours.serve(requests, [0] * 20)
    theirs.serve(requests, [0] * 20)
    assert ours.core.stats().num_preemptions > 0
    assert_same(ours, theirs)


def test_memory_stays_bounded_however_many_shapes_there_are(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("seamount.engine.replay._MOST_SHAPES", 3)
    ours, theirs = (Watched(monkeypatch, replays, folders["v3"], speculation="mtp") for replays in (True, False))
    requests, arrivals = traffic(5, VOCAB)
    ours.serve(requests, arrivals)
    theirs.serve(requests, arrivals)
    assert_same(ours, theirs)
    assert ours.replay is not None and ours.replay.num_recordings <= 3 * 3


def test_a_step_that_cannot_be_recorded_runs_as_ever(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    plain = kernels.rms_norm
    ours, theirs = (Watched(monkeypatch, replays, folders["qwen3"]) for replays in (True, False))
    requests, arrivals = traffic(6, VOCAB)
    theirs.serve(requests, arrivals)
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "rms_norm", lambda *given: plain(*given).clone())
        ours.serve(requests, arrivals)
    assert_same(ours, theirs)
    assert ours.num_replayed > 10
    assert ours.replay is not None and ours.replay.num_recordings == 0 and ours.replay.refused == {"step"}
