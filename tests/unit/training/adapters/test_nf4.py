"""NF4: the code book and rounding of `bitsandbytes`, products and gradients of what is dequantized, and memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bitsandbytes import functional as reference

from seamount.models.loading import resident_bytes
from seamount.training.adapters.lora import adapter_parameters, add_adapters
from seamount.training.adapters.nf4 import BLOCK, LEVELS, Nf4
from seamount.training.adapters.qlora import quantize_base

EVERY = ("attention", "dense", "shared", "experts")


def test_the_code_book_is_that_of_bitsandbytes() -> None:
    _, state = reference.quantize_4bit(torch.randn(64, 64), blocksize=BLOCK, quant_type="nf4")
    assert torch.equal(torch.tensor(LEVELS), state.code)


@pytest.mark.parametrize("shape", [(64, 64), (300, 128), (1, 64), (5, 37)])
def test_codes_are_those_of_bitsandbytes(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
    codes, _ = reference.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
    count = codes.numel()
    assert torch.equal(Nf4(weight).codes.flatten()[:count], codes.flatten())


def test_the_error_on_normal_weights_is_that_of_the_format() -> None:
    weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(0)) * 0.02
    ours = Nf4(weight)
    quantized, state = reference.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
    theirs = reference.dequantize_4bit(quantized, state)
    size = weight.abs().mean()
    mine = ours.dequantize(torch.float32)
    assert 0.085 < (mine - weight).abs().mean() / size < 0.1
    # Between the two lies only that magnitudes are rounded to 8 bits here.
    assert (mine - theirs).abs().mean() / size < 0.004
    num_bytes = sum(buffer.nbytes for buffer in ours.buffers())
    assert 8 * num_bytes / weight.numel() < 4.13 + 0.01


@pytest.mark.parametrize("weight", [torch.zeros(4, 64), torch.full((2, 64), 3.0), torch.eye(64) * 1e-30])
def test_blocks_without_spread_keep_their_values(weight: torch.Tensor) -> None:
    assert torch.allclose(Nf4(weight).dequantize(torch.float32), weight, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_and_gradients_are_those_of_the_dequantized_matrix(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    nf4 = Nf4(torch.randn(96, 64, generator=generator))
    x = torch.randn(7, 64, generator=generator).to(dtype).requires_grad_()
    grad = torch.randn(7, 96, generator=generator).to(dtype)
    matrix = nf4.dequantize(dtype)
    assert torch.equal(nf4.multiply(x), x @ matrix.T)
    assert torch.equal(torch.autograd.grad(nf4.multiply(x), x, grad)[0], grad @ matrix)


@pytest.mark.parametrize("order", ["before", "after"])
def test_a_network_in_4_bits_computes_as_one_with_the_dequantized_weights(
    order: str, network: Any, section: Any, logits: Any, disturb: Any
) -> None:
    """Outputs and the adapters' gradients; the base may be quantized before or after the adapter is added."""
    model, plain = network(), network()
    steps = [lambda: quantize_base(model), lambda: add_adapters(model, section(targets=EVERY), seed=0)]
    for step in steps if order == "before" else reversed(steps):
        step()
    with torch.no_grad():
        for module in plain.layers.modules():
            if type(module).__name__ == "Linear":
                module.weight.copy_(Nf4(module.weight).dequantize(torch.float32))
            elif type(module).__name__ == "Experts":
                for stack in (module.gate_up_proj, module.down_proj):
                    held = Nf4(stack)
                    stack.copy_(torch.stack([held.dequantize(torch.float32, e) for e in range(len(stack))]))
    add_adapters(plain, section(targets=EVERY), seed=0)
    grads = []
    for each in (disturb(model), disturb(plain)):
        out = logits(each.train())
        out.sum().backward()
        grads.append((out.detach(), [value.grad for value in adapter_parameters(each).values()]))
    assert torch.allclose(grads[0][0], grads[1][0], atol=1e-5)
    for mine, its in zip(grads[0][1], grads[1][1], strict=True):
        assert torch.allclose(mine, its, atol=1e-4, rtol=1e-4)
    with torch.no_grad():  # another way through the experts
        assert torch.allclose(logits(model.eval()), logits(plain.eval()), atol=1e-5)


def test_the_frozen_base_takes_a_quarter_of_its_16_bits_and_activations_hold_no_weight(
    network: Any, section: Any, logits: Any
) -> None:
    model = network(dtype=torch.bfloat16)
    held = {id(v) for v in [*model.layers.parameters()] if v.dim() > 1}
    before, outside = sum(v.nbytes for v in model.layers.parameters()), resident_bytes(model)
    outside -= before
    quantize_base(model)
    after = resident_bytes(model) - outside
    assert after < 0.29 * before
    assert {id(v) for v in model.layers.parameters() if v.dim() > 1} < held  # routers
    add_adapters(model, section(targets=EVERY), seed=0)
    saved: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        logits(model.train())
    matrices = {tuple(shape) for shape in ((96 * 2, 64), (64, 96), (128, 64), (4, 128, 64), (4, 64, 64), (128, 32))}
    assert not matrices & set(saved)
