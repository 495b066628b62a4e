"""LoRA: which projections targets mean, what stays frozen, that nothing changes at first, and what learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from seamount.core.errors import ConfigError
from seamount.models.batch import Batch
from seamount.models.keymap import placements
from seamount.models.layers import LatentAttention
from seamount.training.adapters.layers import AdaptedExperts
from seamount.training.adapters.lora import adapter_parameters, adapter_parts, add_adapters

EVERY = ("attention", "dense", "shared", "experts")


@pytest.mark.parametrize(
    ("targets", "groups"),
    [
        (EVERY, {"attention", "dense", "experts", "shared"}),
        (("q_a_proj",), {"attention"}),
        (("gate_proj",), {"dense", "shared"}),
        (("down_proj",), {"dense", "shared"}),
        (("experts.down_proj",), {"experts"}),
        (("shared_experts.up_proj", "layers.1.self_attn.o_proj"), {"attention", "shared"}),
        (("lm_head",), {"lm_head"}),
    ],
)
def test_targets_are_groups_or_ends_of_names(targets: Any, groups: set[str], network: Any, section: Any) -> None:
    model = network()
    counts = add_adapters(model, section(targets=targets), seed=0)
    assert set(counts) == groups
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert trained == adapter_parameters(model).keys()
    assert sum(counts.values()) == sum(value.numel() for value in adapter_parameters(model).values())
    assert not any("mtp" in name or ".mlp.gate." in name for name in trained)
    for part, _, _ in adapter_parts(model):
        assert any(target in part.name for target in targets) or targets == EVERY


@pytest.mark.parametrize(
    "target", ["nonsense", "gate", "embed_tokens", "layers.7.self_attn.o_proj", "experts.gate_proj"]
)
def test_a_target_that_matches_nothing_is_told_with_what_there_is(target: str, network: Any, section: Any) -> None:
    with pytest.raises(ConfigError) as error:
        add_adapters(network(), section(targets=("attention", target)), seed=0)
    assert target in error.value.message
    assert "kv_a_proj_with_mqa" in str(error.value.hint) and "experts.down_proj" in str(error.value.hint)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["latent", "dense"])
def test_an_adapter_changes_no_bit_before_it_has_learned(
    name: str, dtype: torch.dtype, network: Any, section: Any, logits: Any
) -> None:
    with torch.no_grad():
        before = logits(network(name, dtype))
        model = network(name, dtype)
        add_adapters(model, section(targets=EVERY if name == "latent" else EVERY[:2]), seed=0)
        assert torch.equal(logits(model), before)


def test_the_same_seed_gives_the_same_adapter_and_parameters_keep_their_names(network: Any, section: Any) -> None:
    first, second, third = network(), network(), network()
    names = [name for name, _ in first.named_parameters()]
    for model, seed in ((first, 3), (second, 3), (third, 4)):
        add_adapters(model, section(targets=EVERY), seed=seed)
    assert set(names) <= {name for name, _ in first.named_parameters()}
    a, b, c = (adapter_parameters(model) for model in (first, second, third))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not any(torch.equal(a[name], c[name]) for name in a if name.endswith("lora_a"))
    assert all(value.dtype == torch.float32 for value in a.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_summed_weights(
    dtype: torch.dtype, network: Any, section: Any, logits: Any, disturb: Any
) -> None:
    """Every part's gradient, against plain autograd through weights to which the product was added."""
    model = network("latent", dtype)
    add_adapters(model, section(targets=EVERY), seed=0)
    disturb(model).train()
    (logits(model).float() * torch.linspace(-1, 1, 64)).sum().backward()
    found = {name: value.grad for name, value in adapter_parameters(model).items()}

    plain = network("latent", torch.float32)
    sides = {}
    weights = {}
    for part, a, b in adapter_parts(model):
        sides[part.name] = (a.detach().clone().requires_grad_(), b.detach().clone().requires_grad_(), part.scale)
    parameters = dict(plain.named_parameters())
    for place in placements(plain.config, lambda key: True):
        name = place.key.removesuffix(".weight")
        if name in sides:
            a, b, scale = sides[name]
            whole = weights.setdefault(place.parameter, parameters[place.parameter].detach().clone())
            start, height = place.start_row, place.shape[-2]
            padded = torch.nn.functional.pad(b @ a * scale, (0, 0, start, whole.shape[-2] - start - height))
            weights[place.parameter] = whole + padded
    tokens = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(2))
    out = torch.func.functional_call(plain, weights, (Batch.without_cache(tokens), None))
    (plain.logits(out).float() * torch.linspace(-1, 1, 64)).sum().backward()
    bound = 1e-4 if dtype == torch.float32 else 0.15
    expected = {name: (a.grad, b.grad) for name, (a, b, _) in sides.items()}
    for module in model.modules():
        for part, grads in parts_of(module):
            for mine, its in zip(grads, expected[part], strict=True):
                assert (mine - its).norm() <= bound * its.norm() + 1e-6, part
    assert all(value is not None and bool(value.isfinite().all()) for value in found.values())


def parts_of(module: Any) -> Any:
    """Names of a layer's parts, and views of the gradients of their A and B."""
    if isinstance(module, AdaptedExperts):
        for leaf, part in module.parts.items():
            yield part.name, [value.grad for value in module.part(leaf)]
    elif getattr(module, "parts", ()):
        rank, start = module.lora_b.shape[1], 0
        for index, part in enumerate(module.parts):
            rows = slice(start, start + part.num_rows)
            yield part.name, [module.lora_a.grad[index * rank : (index + 1) * rank], module.lora_b.grad[rows]]
            start += part.num_rows


def test_some_of_the_projections_that_are_fused(network: Any, section: Any, logits: Any, disturb: Any) -> None:
    """Queries and values without keys, which lie between them."""
    model = network("dense")
    before = logits(model)
    counts = add_adapters(model, section(targets=("q_proj", "v_proj")), seed=0)
    assert counts == {"attention": 2 * (2 * 4 * 64 + 4 * (64 + 32))}
    disturb(model)
    attention = model.layers[0].self_attn
    whole = attention.qkv_proj.whole_weight() - attention.qkv_proj.weight
    assert whole[:64].abs().max() > 0 and whole[96:].abs().max() > 0
    assert not whole[64:96].any()
    assert not torch.allclose(logits(model), before)


def test_absorbed_latent_attention_has_the_adapter(network: Any, section: Any, disturb: Any) -> None:
    model = network()
    add_adapters(model, section(targets=("kv_b_proj",)), seed=0)
    attention = disturb(model).layers[0].self_attn
    assert isinstance(attention, LatentAttention)
    keys, values = attention.up_projections()
    projected = attention.kv_b_proj(torch.eye(32)).T.unflatten(0, (4, -1))
    assert torch.allclose(torch.cat((keys, values), dim=1), projected, atol=1e-6)
    assert not torch.allclose(projected.flatten(0, 1), attention.kv_b_proj.weight, atol=1e-3)


def test_dropout_follows_torchs_generator_and_is_off_outside_training(
    network: Any, section: Any, logits: Any, disturb: Any
) -> None:
    model = network()
    add_adapters(model, section(targets=EVERY, dropout=0.5), seed=0)
    disturb(model).train()
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        model.zero_grad()
        logits(model).sum().backward()
        runs.append(torch.cat([value.grad.flatten() for value in adapter_parameters(model).values()]))
    assert torch.equal(runs[0], runs[1])
    assert not torch.allclose(runs[0], runs[2])
    model.eval()
    plain = network()
    add_adapters(plain, section(targets=EVERY), seed=0)
    assert torch.equal(logits(model), logits(disturb(plain)))
