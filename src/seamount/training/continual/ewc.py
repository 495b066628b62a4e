"""Elastic weight consolidation: how much earlier tasks need each weight (`fisher`), and the pull back (`Penalty`).

Called by `pipeline`, the pull by the trainer through `objective`. Kirkpatrick et al., "Overcoming catastrophic
forgetting in neural networks" (PNAS 2017, arXiv 1612.00796). It must not know what the examples say.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from seamount.models.network import CausalLM
from seamount.training.shards.dataset import Dataset
from seamount.training.shards.order import permute
from seamount.training.shards.packing import pack
from seamount.training.tuning.distributed import World
from seamount.training.tuning.loss import guesses
from seamount.training.tuning.optimizer import Optimizer

_FP16_SCALE = 2.0**10
_TEMPERATURE = 2.0


def fisher(model: CausalLM, data: Dataset, num_examples: int, *, seed: int, world: World) -> dict[str, Tensor]:
    """The diagonal of the Fisher information over the trained weights, by name, in fp32; all of it adds up to 1.

    The mean over examples of each example's own squared gradient of the log-likelihood of an answer that is drawn from
    the model, given the tokens that the data has before each. With the data's answers it would be the "empirical
    Fisher", which is none (Kunstner, Balles and Hennig, arXiv 1905.12558); the square of a batch's mean gradient
    shrinks with the batch and mixes examples.

    The model's guesses are softened to temperature 2 for it. Of what a model has learned it is sure, and where it is
    quite sure the loss is flat near by, though it rises steeply further out: information at temperature 1 would count
    such answers for little (docs/log.md compares both).

    A drawn token's gradient at the logits is e - p, with covariance diag(p) - p p'. Normal vectors of that covariance
    are drawn in its place: the expectation is the same, and does not hang on whether an unlikely token happened to be
    drawn.

    Surer tasks have less information, by orders of magnitude; divided by its sum every task counts the same, which is
    what online EWC does (Schwarz et al., arXiv 1805.06370, section 3).

    Args:
        model: weights that require gradients are measured; it is left without gradients, in eval mode.
        num_examples: how many of the data's are looked at, chosen by `seed`.
        world: ranks share the examples.
    """
    model.eval()
    device = model.embed_tokens.weight.device
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in trained.items()}
    count = min(num_examples, len(data))
    chosen = permute(np.arange(count), len(data), f"fisher {seed}")
    # In fp16 small gradients would vanish.
    scale = _FP16_SCALE if any(p.dtype == torch.float16 for p in trained.values()) else 1.0
    for index in (int(number) for number in chosen[world.rank :: world.size]):
        micro = pack([(index, data.example(index))], micro_tokens=1)[0].to(device)
        hidden = model.hidden_states(micro.batch(), None).index_select(0, guesses(micro).rows)
        logits = model.logits(model.norm(hidden))
        generator = torch.Generator(device).manual_seed(seed * 2**31 + index)
        logits.backward(_drawn(logits.detach() / _TEMPERATURE, generator).mul_(scale))
        for name, parameter in trained.items():
            if parameter.grad is not None:
                gradient = parameter.grad.float()
                found[name].addcmul_(gradient, gradient, value=scale**-2)
                parameter.grad = None
    world.add_up(list(found.values()))
    total = sum(float(tensor.sum(dtype=torch.float64)) for tensor in found.values())
    return {name: tensor.div_(total or 1.0) for name, tensor in found.items()}


def _drawn(logits: Tensor, generator: torch.Generator) -> Tensor:
    """For each row of `[N, V]` a normal vector with covariance diag(p) - p p', p being the row's softmax."""
    odds = logits.softmax(dim=-1)
    noise = torch.randn(odds.shape, generator=generator, device=odds.device).mul_(odds.sqrt())
    return noise.sub_(odds.mul_(noise.sum(dim=-1, keepdim=True)))


def joined(earlier: Mapping[str, Tensor], new: Mapping[str, Tensor], decay: float) -> dict[str, Tensor]:
    """Fisher information of all tasks so far: `decay * earlier + new`.

    One sum and one anchor, the latest weights, serve all tasks: that is the recursion of the Laplace approximation
    (Huszar, "Note on the quadratic penalties in elastic weight consolidation", PNAS 2018, arXiv 1712.03847), where a
    penalty per task would count the first ones several times, and grow. Decay below 1 is "online EWC" (Schwarz et al.,
    arXiv 1805.06370).
    """
    return {name: tensor + decay * earlier[name] if name in earlier else tensor for name, tensor in new.items()}


class Penalty:
    """weight / 2 * sum of information * (weights - anchor)**2, in nats per trained token, as the loss is.

    Args:
        information: from `fisher`, by weight.
        anchor: the weights when earlier tasks had been learned.
    """

    def __init__(self, weight: float, information: Mapping[str, Tensor], anchor: Mapping[str, Tensor]) -> None:
        self._weight, self._information, self._anchor = weight, information, anchor

    @torch.no_grad()
    def add_gradients(self, optimizer: Optimizer) -> None:
        """Add the penalty's gradient to those of the masters, in fp16 times the scale that these have."""
        factor = self._weight * optimizer.loss_scale
        for name, master in optimizer.masters.items():
            pull = (master - self._anchor[name]).mul_(self._information[name]).mul_(factor)
            master.grad = pull if master.grad is None else master.grad.add_(pull)
