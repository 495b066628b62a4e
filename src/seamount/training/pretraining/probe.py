"""Greedy answers of the network in training to held-out items, to see which skill lags. Called by `loop`.

A small batched decoder over the paged cache; the engine does this properly, and training must not depend on it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer

from seamount.models.batch import Batch, Cache, Piece
from seamount.models.network import CausalLM
from seamount.training.evaluate import Cell, held_out_items, score
from seamount.training.pretraining.corpus import render
from seamount.training.skills import LANGUAGES, SKILLS

_BLOCK_TOKENS = 32
_PROBE_SEED = 7


def probe(model: CausalLM, tokenizer: Tokenizer, num_items: int, *, max_new_tokens: int = 160) -> list[Cell]:
    """Score `num_items` held-out items of each skill and language; other ones than the final evaluation's."""
    (end,) = model.config.eos_token_ids
    cells = []
    for skill in SKILLS:
        for language in LANGUAGES:
            items = held_out_items(skill, language, num_items, _PROBE_SEED)
            prompts = [render(item.prompt, item.tools, add_generation_prompt=True) for item in items]
            ids = [tokenizer.encode(prompt, add_special_tokens=False).ids for prompt in prompts]
            outputs = greedy(model, ids, end, max_new_tokens)
            texts = [tokenizer.decode(output, skip_special_tokens=False) for output in outputs]
            right = sum(score(item, text) for item, text in zip(items, texts, strict=True))
            cells.append(Cell(skill, language, right, len(items)))
    return cells


@torch.inference_mode()
def greedy(model: CausalLM, prompts: Sequence[Sequence[int]], end: int, max_new_tokens: int) -> list[list[int]]:
    """The likeliest continuation of each prompt, up to `end` (not included) or `max_new_tokens`."""
    device = model.embed_tokens.weight.device
    room = -(-(max(map(len, prompts)) + max_new_tokens) // _BLOCK_TOKENS)
    cache = model.cache_spec.allocate(len(prompts) * room * _BLOCK_TOKENS, model.embed_tokens.weight.dtype, device)
    outputs: list[list[int]] = [[] for _ in prompts]
    lengths = [0] * len(prompts)
    new = {index: list(prompt) for index, prompt in enumerate(prompts)}
    for _ in range(max_new_tokens):
        guesses = _next_tokens(model, cache, new, lengths, room)
        new = {}
        for index, guess in guesses.items():
            if guess != end:
                outputs[index].append(guess)
                new[index] = [guess]
        if not new:
            break
    return outputs


def _next_tokens(
    model: CausalLM, cache: Cache, new: dict[int, list[int]], lengths: list[int], room: int
) -> dict[int, int]:
    """Run the new tokens of the sequences that go on; updates `lengths` and returns each one's next token."""
    device = model.embed_tokens.weight.device
    pieces: list[Piece] = []
    for index, tokens in new.items():
        pieces.append((tokens, lengths[index], range(index * room, (index + 1) * room)))
        lengths[index] += len(tokens)
    batch = Batch.over_cache(pieces, _BLOCK_TOKENS, device)
    hidden = model(batch, cache)
    last = torch.tensor(batch.query_starts[1:], device=device) - 1
    return dict(zip(new, model.logits(hidden[last]).argmax(dim=-1).tolist(), strict=True))
