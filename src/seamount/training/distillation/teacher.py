"""The network that a student learns from: loaded without its MTP block, run without gradients, in its own precision.

Called by `pipeline` and `cache`. Whether teacher and student speak the same tokens is checked here too. It must not
know the loss.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from seamount.core.errors import CheckpointError, ConfigError
from seamount.models.config import ModelConfig
from seamount.models.load_plan import plan_load
from seamount.models.loading import load_planned
from seamount.models.network import CausalLM
from seamount.models.precision import Precision
from seamount.models.prompt import PromptEncoder
from seamount.models.reading import Progress
from seamount.training.compression.work import sha256
from seamount.training.shards.packing import MicroBatch
from seamount.training.tuning.loss import guesses, head_weight

from .objective import WholeGuide

_ROWS_AT_ONCE = 512


class Teacher:
    """A teacher in memory. It changes nothing and keeps nothing.

    Args:
        temperature: at which its guesses are told.
    """

    def __init__(self, model: CausalLM, temperature: float) -> None:
        self._model, self._temperature = model, temperature

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        temperature: float,
        device: torch.device,
        dtype: torch.dtype | None = None,
        progress: Progress | None = None,
    ) -> Teacher:
        """Load a checkpoint folder, or a .gguf file.

        Args:
            dtype: of the weights in memory; None: as the config says that they are stored.

        Raises:
            CheckpointError, OutOfMemoryError: see `models.loading.load_model`.
        """
        config = ModelConfig.from_folder(folder)
        plan = plan_load(folder, config).without_mtp()
        if not plan.config.has_head:
            raise CheckpointError(f"{folder} has no head: it makes embeddings, and guesses no tokens.")
        chosen = dtype or getattr(torch, config.dtype)
        return cls(load_planned(plan, Precision(chosen), device=device, progress=progress), temperature)

    @torch.no_grad()
    def guide(self, micro: MicroBatch) -> WholeGuide:
        """What the teacher says of a micro-batch."""
        return WholeGuide(self._hidden(micro), head_weight(self._model), self._temperature)

    @torch.no_grad()
    def top(self, micro: MicroBatch, count: int) -> tuple[Tensor, Tensor]:
        """The likeliest tokens of each row that guesses a trained token, N of them.

        Returns:
            ids `[N, count]` int32, the likeliest first; and at the temperature their log-probabilities, behind them
            that of all other tokens together: `[N, count + 1]` fp32.
        """
        hidden, head = self._hidden(micro), head_weight(self._model)
        ids = torch.empty(len(hidden), count, dtype=torch.int32, device=hidden.device)
        found = torch.empty(len(hidden), count + 1, device=hidden.device)
        for start in range(0, len(hidden), _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            logits = torch.nn.functional.linear(hidden[rows], head).float().div_(self._temperature)
            log_p = torch.log_softmax(logits, dim=-1)
            best = log_p.topk(count, dim=-1)
            ids[rows], found[rows, :-1] = best.indices.int(), best.values
            found[rows, -1] = log_p.scatter_(1, best.indices, float("-inf")).logsumexp(dim=-1)
        return ids, found

    def _hidden(self, micro: MicroBatch) -> Tensor:
        rows = guesses(micro).rows
        return self._model.norm(self._model.hidden_states(micro.batch(), None).index_select(0, rows))


def digest_of(folder: Path) -> str:
    """Of config and weights of a teacher: another one is another teacher."""
    files = [folder] if folder.is_file() else sorted([folder / "config.json", *folder.glob("*.safetensors")])
    told = "".join(f"{path.name} {sha256(path)}\n" for path in files)
    return hashlib.sha256(told.encode()).hexdigest()


def check_same_tokens(teacher: Path, student: Path) -> None:
    """Raise ConfigError unless both write the same tokens under the same ids, special ones included."""
    first, second = PromptEncoder.from_folder(teacher), PromptEncoder.from_folder(student)
    try:
        _compare(first, second, f"{teacher} and {student}")
    finally:
        first.close()
        second.close()


def _compare(first: PromptEncoder, second: PromptEncoder, both: str) -> None:
    hint = "A student learns its teacher's guesses token by token: give both the same tokenizer."
    if first.vocab_size != second.vocab_size:
        raise ConfigError(
            f"The tokenizers of {both} differ: they have {first.vocab_size} and {second.vocab_size} tokens.", hint=hint
        )
    for token in range(first.vocab_size):
        added = [encoder.tokenizer.added_tokens.get(token) for encoder in (first, second)]
        if added[0] != added[1] or first.token_bytes(token) != second.token_bytes(token):
            raise ConfigError(f"The tokenizers of {both} differ: token {token} is another one.", hint=hint)
    if first.tokenizer.special_ids != second.tokenizer.special_ids:
        raise ConfigError(f"The tokenizers of {both} differ in their special tokens.", hint=hint)
    if set(first.eos_token_ids) != set(second.eos_token_ids):
        raise ConfigError(f"{both} end an answer with different tokens.", hint=hint)
