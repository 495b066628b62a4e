"""Measure the engine's GPU path on a model of true shape with random weights made in place; prints JSON.

    python bench/gpu.py                          # V2-Lite with all layers, against transformers at batch 64
    python bench/gpu.py --layers 4 --no-peer     # a quick look

For each batch size: decode tokens/s with and without graphs, the greedy choice included, and for graphs the share of
the measured memory bandwidth that reading weights and contexts once would take. Prefill is one prompt of 2,048 tokens.
The peer is `transformers` `generate` on the same shape: 64 equal prompts, time per token after the first. Never run on
a GPU so far.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from make_checkpoint import SHAPES
from seamount.engine.graphs import DecodeGraphs
from seamount.models.batch import Batch, Cache, Piece
from seamount.models.config import ModelConfig
from seamount.models.network import CausalLM, build_network

_COMMON = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
_BLOCK = 16
_WARM_STEPS = 16
_PREFILL_TOKENS = 2048


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=SHAPES, default="v2-lite")
    parser.add_argument("--layers", type=int, help="only so many layers")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--context", type=int, default=512, help="tokens in each cache before decode (default 512)")
    parser.add_argument("--tokens", type=int, default=128, help="decode steps that are timed (default 128)")
    parser.add_argument("--no-peer", action="store_true", help="do not measure transformers")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("There is no CUDA GPU here: nothing was measured.")
    raw: dict[str, Any] = _COMMON | SHAPES[options.shape]
    if options.layers is not None:
        raw["num_hidden_layers"] = options.layers
    report: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "shape": options.shape,
        "layers": raw["num_hidden_layers"],
        "context": options.context,
        "tokens": options.tokens,
        "bandwidth_gb_s": measured_bandwidth() / 1e9,
    }
    report |= measure_engine(raw, options.batches, options.context, options.tokens, report["bandwidth_gb_s"] * 1e9)
    if not options.no_peer:
        gc.collect()
        torch.cuda.empty_cache()
        report["transformers"] = measure_transformers(raw, 64, options.context, options.tokens)
        ours = next((row for row in report["decode"] if row["batch"] == 64), None)
        if ours is not None:
            report["ratio_at_64"] = ours["graphs_tokens_per_s"] / report["transformers"]["tokens_per_s"]
    print(json.dumps(report, indent=2))


def timed(work: Callable[[], object]) -> float:
    """Seconds until the GPU has done `work`."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def measured_bandwidth() -> float:
    """Bytes per second: the better of reading 4 GiB (a sum) and copying them (read and written), best of ten."""
    source = torch.ones(2**30, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    source.sum()
    read = min(timed(source.sum) for _ in range(10))
    copied = min(timed(lambda: target.copy_(source)) for _ in range(10))
    return max(source.nbytes / read, 2 * source.nbytes / copied)


def random_model(raw: dict[str, Any]) -> CausalLM:
    """The network in bfloat16 on the GPU: norms of one, matrices with variance 1 / columns."""
    torch.manual_seed(0)
    model = build_network(ModelConfig.from_dict(raw)).to(torch.bfloat16).to_empty(device="cuda").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
            else:
                parameter.fill_(1.0)
        for buffer in model.buffers():
            buffer.zero_()
    return model.requires_grad_(False)


def bytes_per_step(model: CausalLM, batch: int, context: int) -> float:
    """What a decode step has to read: weights once, of the experts those that a uniform router would choose."""
    experts = model.config.experts
    total = 0.0
    for name, parameter in model.named_parameters():
        if name.startswith("mtp.") or (name.startswith("embed_tokens") and model.lm_head is not None):
            continue
        share = 1.0
        if experts is not None and ".experts." in name:
            share = 1.0 - (1.0 - experts.num_chosen / experts.num_experts) ** batch
        total += parameter.nbytes * share
    return total + batch * context * model.cache_spec.values_per_token() * 2


@torch.inference_mode()
def measure_engine(
    raw: dict[str, Any], batches: list[int], context: int, num_tokens: int, bandwidth: float
) -> dict[str, Any]:
    """Decode at each batch size, and prefill."""
    model = random_model(raw)
    device = torch.device("cuda", torch.cuda.current_device())
    num_steps = _WARM_STEPS + num_tokens
    blocks_each = -(-(max(context, _PREFILL_TOKENS) + 2 * num_steps) // _BLOCK)
    cache = model.cache_spec.allocate(max(batches) * blocks_each * _BLOCK, torch.bfloat16, device)
    for tensors in cache:
        for tensor in tensors:
            tensor.normal_()
    found: dict[str, Any] = {"weight_gb": sum(p.nbytes for p in model.parameters()) / 1e9}
    start = time.perf_counter()
    graphs = DecodeGraphs(
        model, cache, block_size=_BLOCK, max_blocks=blocks_each, max_num_seqs=max(batches), device=device
    )
    found["capture_s"] = time.perf_counter() - start
    found["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    found["prefill_tokens_per_s"] = measure_prefill(model, cache, device)
    found["decode"] = rows = []
    for batch in batches:
        tables = [list(range(s * blocks_each, (s + 1) * blocks_each)) for s in range(batch)]
        replayed = decode_s(model, graphs.run, tables, context, num_tokens)
        eager = decode_s(
            model, lambda p: model(Batch.over_cache(p, _BLOCK, device), cache), tables, context, num_tokens
        )
        needed = bytes_per_step(model, batch, context + _WARM_STEPS + num_tokens // 2)
        rows.append(
            {
                "batch": batch,
                "graphs_tokens_per_s": batch / replayed,
                "eager_tokens_per_s": batch / eager,
                "step_ms": replayed * 1e3,
                "gb_per_step": needed / 1e9,
                "share_of_bandwidth": needed / replayed / bandwidth,
            }
        )
    return found


def decode_s(
    model: CausalLM,
    run: Callable[[list[Piece]], torch.Tensor],
    tables: list[list[int]],
    context: int,
    num_tokens: int,
) -> float:
    """Seconds per greedy decode step, the choice read back each time as the engine does."""
    # Different tokens: equal ones would all choose the same experts.
    tokens = [(37 * s + 11) % model.config.vocab_size for s in range(len(tables))]

    def steps(first: int, count: int) -> None:
        nonlocal tokens
        for step in range(first, first + count):
            pieces: list[Piece] = [([token], step, table) for token, table in zip(tokens, tables, strict=True)]
            tokens = model.logits(run(pieces)).argmax(dim=-1).tolist()

    steps(context, _WARM_STEPS)
    return timed(lambda: steps(context + _WARM_STEPS, num_tokens)) / num_tokens


def measure_prefill(model: CausalLM, cache: Cache, device: torch.device) -> float:
    """Tokens per second of one prompt in one chunk, best of five."""
    tokens = [(7 * i) % model.config.vocab_size for i in range(_PREFILL_TOKENS)]
    pieces: list[Piece] = [(tokens, 0, list(range(-(-_PREFILL_TOKENS // _BLOCK))))]

    def run() -> None:
        model.logits(model(Batch.over_cache(pieces, _BLOCK, device), cache)[-1:])

    run()
    return _PREFILL_TOKENS / min(timed(run) for _ in range(5))


@torch.inference_mode()
def measure_transformers(raw: dict[str, Any], batch: int, context: int, num_tokens: int) -> dict[str, Any]:
    """`generate` on the same shape: time of `num_tokens` more tokens, the first (prefill) taken off."""
    import transformers

    fields = {key: value for key, value in raw.items() if key not in ("model_type", "torch_dtype")}
    config = transformers.AutoConfig.for_model(raw["model_type"], **fields)
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    prompts = torch.randint(0, raw["vocab_size"], (batch, context), device="cuda")
    mask = torch.ones_like(prompts)

    def generate(count: int) -> None:
        model.generate(
            prompts, attention_mask=mask, do_sample=False, min_new_tokens=count, max_new_tokens=count, pad_token_id=0
        )

    generate(4)
    first = timed(lambda: generate(1))
    whole = timed(lambda: generate(1 + num_tokens))
    return {
        "version": transformers.__version__,
        "batch": batch,
        "tokens_per_s": batch * num_tokens / (whole - first),
        "prefill_and_first_s": first,
    }


if __name__ == "__main__":
    main()
