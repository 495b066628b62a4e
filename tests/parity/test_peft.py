"""LoRA against `peft` on transformers' models of the same checkpoints: files both ways, logits, one training step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from seamount import LLM, SamplingParams
from seamount.models.adapter import WEIGHTS_NAME, Adapter
from seamount.models.adapter_config import CONFIG_NAME
from seamount.models.batch import Batch
from seamount.models.config import ModelConfig
from seamount.models.load_plan import plan_load
from seamount.models.loading import load_planned
from seamount.models.network import CausalLM
from seamount.models.precision import Precision
from seamount.training.adapters.files import load_adapter, save_adapter
from seamount.training.adapters.lora import adapter_parameters, add_adapters
from seamount.training.adapters.merge import merge

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # Said of patterns that match parameters, and not modules.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
]

FAMILIES = ["qwen2", "llama", "v2-lite", "v3-attention-bias"]
EVERY = ("attention", "dense", "shared", "experts")
TOKENS = torch.randint(0, 300, (1, 24), generator=torch.Generator().manual_seed(3))


def section(**changes: Any) -> Any:
    given = {"method": "lora", "rank": 4, "alpha": 12.0, "dropout": 0.0, "targets": EVERY, "use_rslora": False}
    return SimpleNamespace(**(given | changes))


def targets_of(model: CausalLM) -> tuple[str, ...]:
    return EVERY if model.config.experts else EVERY[:2]


def disturb(parameters: Any, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in parameters:
            value.copy_(torch.randn(value.shape, generator=generator) * 0.1)


@torch.no_grad()
def our_logits(model: CausalLM) -> torch.Tensor:
    return model.logits(model(Batch.without_cache(TOKENS), None))


def peft_config(reference: Any, **changes: Any) -> LoraConfig:
    """Attention and feed-forward by PEFT's own means: modules, and parameters where those are no modules there."""
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"]
    parameters = None
    if hasattr(reference.config, "n_routed_experts"):
        parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.up_proj.weight", "up_proj.weight"]
    else:
        names += ["gate_proj", "down_proj"]
    given = {"r": 4, "lora_alpha": 12, "target_modules": names, "target_parameters": parameters}
    return LoraConfig(**(given | {"task_type": "CAUSAL_LM"} | changes))


def name_base(adapter: Path, name: str) -> None:
    """PEFT notes the path that transformers was given; a model that was made in memory has none."""
    path = adapter / CONFIG_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": name}))


def load_served(folder: Path, adapter: Path, *, packed: bool) -> CausalLM:
    plan = plan_load(folder, ModelConfig.from_folder(folder)).with_adapter(Adapter.from_folder(adapter))
    return load_planned(plan, Precision(torch.float32, is_packed=packed), device=torch.device("cpu"))


@pytest.fixture
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder beside the checkpoint, for what tests make."""
    return tmp_path_factory.mktemp("made")


@pytest.fixture
def family(request: pytest.FixtureRequest, write_checkpoint: Any) -> tuple[Path, Any]:
    from .conftest import CASES

    kind, arguments = CASES[request.param]
    return write_checkpoint(kind(**arguments), seed=7)


every_family = pytest.mark.parametrize("family", FAMILIES, indirect=True)


@pytest.mark.parametrize(
    ("family", "use_rslora"),
    [*((name, False) for name in FAMILIES), ("qwen3", True), ("v3", True)],
    indirect=["family"],
)
def test_what_is_saved_here_loads_in_peft(family: Any, use_rslora: bool, load: Any, made: Path) -> None:
    folder, reference = family
    model = load(folder, packed=False)
    given = section(targets=targets_of(model), use_rslora=use_rslora)
    before = our_logits(model)
    add_adapters(model, given, seed=0)
    assert torch.equal(our_logits(model), before)
    disturb(adapter_parameters(model).values())
    ours = our_logits(model)
    assert (ours - before).abs().max() > 0.1
    save_adapter(model, made / "adapter", given, folder.name)
    theirs = PeftModel.from_pretrained(reference, made / "adapter")(TOKENS).logits[0]
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


@every_family
def test_what_peft_saves_loads_here_and_is_served(
    family: Any, load: Any, paged_driver: Any, engine_greedy: Any, reference_greedy: Any, made: Path
) -> None:
    folder, reference = family
    config = peft_config(reference)
    tuned = get_peft_model(reference, config)
    disturb(value for value in tuned.parameters() if value.requires_grad)
    with torch.no_grad():
        theirs = tuned(TOKENS).logits[0]
    tuned.save_pretrained(made / "adapter")
    name_base(made / "adapter", folder.name)

    model = load(folder, packed=False)
    load_adapter(model, made / "adapter")
    bound = 1e-5 * theirs.abs().max()
    assert (our_logits(model) - theirs).abs().max() < bound
    # Through the paged cache the network that trains gives the same: latent attention is absorbed there.
    assert (paged_driver(model).all_logits([TOKENS[0].tolist()])[0] - theirs).abs().max() < 1e-4

    for packed in (True, False):
        served = load_served(folder, made / "adapter", packed=packed)
        assert (paged_driver(served).all_logits([TOKENS[0].tolist()])[0] - theirs).abs().max() < 1e-4

    prompts = [[5, 9, 2], TOKENS[0].tolist()]
    expected = reference_greedy(tuned, prompts, 12)
    llm = LLM(str(folder), adapter=made / "adapter", dtype="float32", device="cpu", cache_memory_bytes=2**21)
    sampling = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    assert [list(answer.token_ids) for answer in llm.generate(prompts, sampling)] == expected

    merge(folder, made / "adapter", made / "merged")
    assert engine_greedy(made / "merged", prompts, 12) == expected


@every_family
def test_a_training_step_is_that_of_peft(family: Any, load: Any, made: Path) -> None:
    folder, reference = family
    model = load(folder, packed=False).train()
    given = section(targets=targets_of(model))
    add_adapters(model, given, seed=0)
    disturb(adapter_parameters(model).values())
    save_adapter(model, made / "before", given, folder.name)
    tuned = PeftModel.from_pretrained(reference, made / "before", is_trainable=True).train()
    assert sum(p.numel() for p in tuned.parameters() if p.requires_grad) == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )

    def step(parameters: Any, logits: Callable[[], torch.Tensor]) -> float:
        optimizer = torch.optim.SGD([value for value in parameters if value.requires_grad], lr=0.5)
        loss = F.cross_entropy(logits()[:-1], TOKENS[0, 1:])
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    ours = step(model.parameters(), lambda: model.logits(model(Batch.without_cache(TOKENS), None)))
    theirs = step(tuned.parameters(), lambda: tuned(TOKENS).logits[0])
    assert abs(ours - theirs) < 1e-5
    save_adapter(model, made / "ours", given, folder.name)
    tuned.save_pretrained(made / "theirs", save_embedding_layers=False)
    before, mine, its = (load_file(made / name / WEIGHTS_NAME) for name in ("before", "ours", "theirs"))
    assert mine.keys() == its.keys()
    for name in mine:
        assert (mine[name] - its[name]).abs().max() < 1e-5 * max(1, its[name].abs().max()), name
        assert not torch.equal(mine[name], before[name]) or "experts" in name


@pytest.mark.parametrize("family", ["v2-lite", "v3"], indirect=True)
def test_an_adapter_of_single_experts_as_older_versions_save_it(
    family: Any, load: Any, paged_driver: Any, made: Path
) -> None:
    folder, reference = family
    generator = torch.Generator().manual_seed(4)
    tensors = {}
    for layer in (1, 2):
        for expert in range(8):
            for leaf, rows, columns in (("gate_proj", 48, 64), ("up_proj", 48, 64), ("down_proj", 64, 48)):
                key = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{leaf}"
                tensors[f"{key}.lora_A.weight"] = torch.randn(4, columns, generator=generator) * 0.1
                tensors[f"{key}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) * 0.1
    adapter = made / "adapter"
    adapter.mkdir()
    save_file(tensors, adapter / WEIGHTS_NAME, metadata={"format": "pt"})
    # Names of experts alone: peft takes `gate_proj` of these models for the experts', and for nothing else.
    described = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 12}
    pattern = r".*\.experts\.\d+\.(gate_proj|up_proj|down_proj)"
    (adapter / CONFIG_NAME).write_text(json.dumps(described | {"target_modules": pattern}))
    ours = load(folder, packed=False)
    load_adapter(ours, adapter)
    served = load_served(folder, adapter, packed=True)
    (adapter / CONFIG_NAME).write_text(
        json.dumps(described | {"target_modules": ["gate_proj", "up_proj", "down_proj"]})
    )
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(reference, adapter)(TOKENS).logits[0]
    assert (our_logits(ours) - theirs).abs().max() < 1e-5 * theirs.abs().max()
    assert (paged_driver(served).all_logits([TOKENS[0].tolist()])[0] - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("family", ["v3"], indirect=True)
@pytest.mark.parametrize("leaf", ["gate_up_proj", "down_proj"])
def test_one_of_the_experts_two_stacks(family: Any, leaf: str, load: Any, made: Path) -> None:
    folder, reference = family
    model = load(folder, packed=False)
    given = section(targets=(f"experts.{leaf}", "kv_b_proj"))
    add_adapters(model, given, seed=0)
    disturb(adapter_parameters(model).values())
    save_adapter(model, made / "adapter", given, folder.name)
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(reference, made / "adapter")(TOKENS).logits[0]
    assert (our_logits(model) - theirs).abs().max() < 1e-5 * theirs.abs().max()
    again = load(folder, packed=False)
    load_adapter(again, made / "adapter")
    assert torch.equal(our_logits(again), our_logits(model))


@pytest.mark.parametrize("family", ["qwen2", "v3"], indirect=True)
def test_ranks_and_scales_by_pattern(family: Any, load: Any, made: Path) -> None:
    folder, reference = family
    config = peft_config(
        reference,
        rank_pattern={"layers.1.self_attn.o_proj": 2, r"^model\.layers\.2\..*_proj": 6},
        alpha_pattern={"o_proj": 3, r".*\.layers\.[01]\..*q_b?_?proj": 24},
    )
    tuned = get_peft_model(reference, config)
    disturb(value for value in tuned.parameters() if value.requires_grad)
    with torch.no_grad():
        theirs = tuned(TOKENS).logits[0]
    tuned.save_pretrained(made / "adapter")
    name_base(made / "adapter", folder.name)
    model = load(folder, packed=False)
    load_adapter(model, made / "adapter")
    assert (our_logits(model) - theirs).abs().max() < 1e-5 * theirs.abs().max()
    # And written again from the network's layers, with patterns of its own.
    save_adapter(model, made / "again", section(), folder.name)
    with torch.no_grad():
        again = PeftModel.from_pretrained(tuned.unload(), made / "again")(TOKENS).logits[0]
    assert (again - theirs).abs().max() < 1e-5 * theirs.abs().max()
