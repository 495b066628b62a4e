"""What a tuning run is: the fields of a recipe file, checked. Called by `pipeline`, `seamount tune` and the tests.

A recipe is YAML that people keep in git; unknown keys fail. It must not know tensors, nor how files are read
(`recipe_files`). What a field does is said at the field: `seamount tune --help` points here by printing these
docstrings.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from seamount.core.errors import ConfigError

from .recipe_files import read_fields as read_fields
from .recipe_files import wrong_fields

Precision = Literal["auto", "bf16", "fp16", "fp32"]


class Section(BaseModel):
    """A part of a recipe. Its numbers are finite, and `true` is none of them; whoever adds one bounds it."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _is_number(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[str(info.field_name)].annotation
        kinds = {kind, *get_args(kind)}
        if not kinds & {int, float}:
            return value
        if isinstance(value, bool):
            raise ValueError(f"must be a number, not {str(value).lower()}")
        if isinstance(value, int) and value.bit_length() > 64:
            raise ValueError("is too large a number")
        return value


def _several(value: Any) -> Any:
    return (value,) if isinstance(value, str | Path) else value


Paths = Annotated[tuple[Path, ...], BeforeValidator(_several)]
Names = Annotated[tuple[str, ...], BeforeValidator(_several)]

MANY_STEPS = 10**9
MANY_EXAMPLES = 2**20
# What MLflow would take for a store; anything else it takes for the name of a new folder.
_STORE = re.compile(r"https?://[^/\s]+.*|file:.+|(sqlite|postgresql|mysql|mssql)(\+\w+)?://.+|databricks(://.+)?")


class DataSection(Section):
    """What is learned from.

    Attributes:
        train: files of records, or one folder made by `seamount data build`. Empty where the data is handed over in
            Python.
        evaluation: held-out files in the same formats; the loss on them is told while the run goes on, and with
            `scored` the answers to them are compared before and after.
        evaluation_share: where no `evaluation` is given, this part of the training data is kept apart for it.
        max_length: tokens of one example, prompt and answer together.
        overlong: what becomes of longer ones: an error that names them, left out (and counted), or cut at the end.
        train_on: the last assistant turn of a conversation, or all of them; a turn that the history renders otherwise
            than it was written (with reasoning) becomes an example of its own.
        thinking: whether answers are learned behind the prompt of a server that thinks: `auto` where the turn has
            reasoning, else as a server without arguments asks.
        language: what all examples must be written in, such as `en` or `zh`, told apart by script; others are errors.
        duplicates: whether examples that occur again stay.
        leaks: whether a run may begin although evaluation examples occur in the training data.
        scored: most evaluation examples that are answered before and after the run; 0 is none.
    """

    train: Paths = ()
    evaluation: Paths = ()
    evaluation_share: float = Field(ge=0, lt=1, default=0.0)
    max_length: int = Field(gt=1, le=2**22, default=2048)
    overlong: Literal["error", "skip", "cut"] = "error"
    train_on: Literal["last", "all"] = "all"
    thinking: Literal["auto", "on", "off"] = "auto"
    language: str | None = None
    duplicates: Literal["keep", "drop"] = "keep"
    leaks: Literal["refuse", "allow"] = "refuse"
    scored: int = Field(ge=0, le=MANY_EXAMPLES, default=200)


class AdapterSection(Section):
    """Low-rank weights beside the model (LoRA, arXiv 2106.09685); all else stays as it is.

    Attributes:
        method: `lora`; or `qlora`, which holds the model's own matrices in 4 bits (NF4, arXiv 2305.14314).
        rank: inner width of each pair of matrices.
        alpha: the product is scaled by alpha / rank.
        dropout: of the adapter's input, while training.
        targets: groups (`attention`, `dense`, `shared`, `experts`; `linear` is the first three, as far as the model has
            them) or names of projections (`q_proj`, `kv_b_proj`, ...); a list, or one of them.
        use_rslora: scale by alpha / sqrt(rank) instead (arXiv 2312.03732).
    """

    method: Literal["lora", "qlora"] = "lora"
    rank: int = Field(gt=0, le=4096, default=16)
    alpha: float = Field(gt=0, le=1e6, default=32.0)
    dropout: float = Field(ge=0, lt=1, default=0.0)
    targets: Names = Field(min_length=1, default=("linear",))
    use_rslora: bool = False


class BatchSection(Section):
    """What one step takes.

    Attributes:
        examples: of a step, over all ranks; the loss is the mean over all their trained tokens.
        micro_tokens: a step is computed in parts of about so many tokens, which bounds the memory of activations.
    """

    examples: int = Field(gt=0, le=MANY_EXAMPLES, default=16)
    micro_tokens: int = Field(gt=0, le=2**24, default=4096)


class OptimizerSection(Section):
    """How fp32 weights are changed.

    Attributes:
        method: `adamw` (arXiv 1711.05101); or `muon` for matrices, beside AdamW for embedding, head, routers and norms:
            for networks that begin at random or nearly so, which learn far quicker with it (arXiv 2502.16982).
        learning_rate: at its highest. None: 1e-5 for all weights, 2e-4 for an adapter, 4e-3 with `muon`.
        beta1, beta2, eps: of AdamW: how long the means of gradients and of their squares remember; the least divisor.
        weight_decay: decoupled; matrices only.
        clip_norm: gradients are scaled down to this global norm.
        ema_decay: keeps an average of the weights, each step weighing 1 - decay, which is what is evaluated and
            written at the end; None keeps none.
    """

    method: Literal["adamw", "muon"] = "adamw"
    learning_rate: float | None = Field(gt=0, le=1, default=None)
    beta1: float = Field(ge=0, lt=1, default=0.9)
    beta2: float = Field(ge=0, lt=1, default=0.95)
    eps: float = Field(ge=1e-20, le=1, default=1e-8)
    weight_decay: float = Field(ge=0, le=1000, default=0.0)
    clip_norm: float = Field(gt=0, le=1e12, default=1.0)
    ema_decay: float | None = Field(gt=0, lt=1, default=None)


class ScheduleSection(Section):
    """How long a run is, and the learning rate over it.

    Attributes:
        epochs: passes over the training data.
        steps: of the run; where given, it goes before `epochs`.
        kind: after the warm-up, a cosine or a line down to `final_share`; constant; or plateau, which multiplies by
            `plateau_factor` when `plateau_patience` evaluations in a row brought no lower loss.
        plateau_factor, plateau_patience: see `kind`.
        warmup_share: of the run's steps, in which the rate rises from near zero.
        final_share: of the highest rate, at the end.
    """

    epochs: float = Field(gt=0, le=1e6, default=3.0)
    steps: int | None = Field(gt=0, le=MANY_STEPS, default=None)
    kind: Literal["cosine", "linear", "constant", "plateau"] = "cosine"
    warmup_share: float = Field(ge=0, lt=1, default=0.03)
    final_share: float = Field(ge=0, le=1, default=0.0)
    plateau_factor: float = Field(gt=0, lt=1, default=0.5)
    plateau_patience: int = Field(gt=0, le=10**6, default=2)


class ExpertsSection(Section):
    """What is trained beside the loss where a model has routed experts or an MTP block; for full tuning only.

    Attributes:
        bias_rate: step of the routers' balancing bias after each step (arXiv 2412.19437, section 2.1.2; there 0.001
            while pre-training); 0 leaves it as it is, which short tuning wants.
        balance_weight: of the sequence-wise balance loss (the same, equation 17; there 0.0001).
        mtp_weight: of the multi-token-prediction block's loss (section 2.2; there 0.3, then 0.1); 0 leaves the block as
            it is, which guesses worse the more the model changes.
    """

    bias_rate: float = Field(ge=0, le=1, default=0.0)
    balance_weight: float = Field(ge=0, le=100, default=0.0)
    mtp_weight: float = Field(ge=0, le=100, default=0.0)


class SavingSection(Section):
    """When a run evaluates and what it keeps.

    Attributes:
        evaluate_every_steps: None: about ten times a run.
        checkpoint_every_steps: None: about ten times a run; the end and Ctrl-C always make one.
        full_every: of the checkpoints every so many holds all tensors, those between what has changed.
        keep: newest checkpoints that stay.
    """

    evaluate_every_steps: int | None = Field(gt=0, le=MANY_STEPS, default=None)
    checkpoint_every_steps: int | None = Field(gt=0, le=MANY_STEPS, default=None)
    full_every: int = Field(gt=0, le=10**6, default=8)
    keep: int = Field(gt=0, le=10**6, default=3)


class TrackingSection(Section):
    """Where metrics go beside metrics.jsonl.

    Attributes:
        tensorboard: write event files to the run's folder.
        mlflow: tracking URI, such as http://tracking:5000 or file:///srv/runs; with the whole mlflow package also
            sqlite:///runs.db. None does not.
    """

    tensorboard: bool = False
    mlflow: str | None = None

    @field_validator("mlflow")
    @classmethod
    def _is_store(cls, value: str | None) -> str | None:
        if value is not None and not _STORE.fullmatch(value):
            raise ValueError("must be an address such as http://tracking:5000, file:///srv/runs or sqlite:///runs.db")
        return value


class TuneRecipe(Section):
    """A whole run.

    Attributes:
        model: name of an embedded model, or a folder.
        output: the run's folder: checkpoints, metrics, report, and the adapter or the model that comes out.
        adapter: None trains all weights.
        seed: of the order of data, of new adapters and of dropout.
        device: `cpu`, `cuda`, or `auto`, which is a GPU where there is one.
        precision: of the model's weights while training; auto is as stored (fp32 stays, else bf16).
        activation_checkpointing: keep each layer's input only and compute the rest again in the backward pass: less
            memory, a third more time.
        strategy: over several processes: `ddp` holds all in each; `fsdp` (FSDP2) shares weights and optimizer out.
    """

    model: str
    output: Path
    data: DataSection = DataSection()
    adapter: AdapterSection | None = AdapterSection()
    batch: BatchSection = BatchSection()
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    experts: ExpertsSection = ExpertsSection()
    saving: SavingSection = SavingSection()
    tracking: TrackingSection = TrackingSection()
    seed: int = Field(ge=0, lt=2**32, default=0)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Precision = "auto"
    activation_checkpointing: bool = False
    strategy: Literal["ddp", "fsdp"] = "ddp"

    @model_validator(mode="after")
    def _fits(self) -> TuneRecipe:
        experts = self.experts
        if self.adapter is not None and (experts.bias_rate or experts.mtp_weight or experts.balance_weight):
            raise ValueError("experts: router bias, balance and MTP block are trained with all weights only")
        if self.optimizer.method == "muon" and (self.adapter is not None or self.strategy == "fsdp"):
            raise ValueError("optimizer.method muon is for all weights with strategy ddp; use adamw here")
        if self.schedule.kind == "plateau" and not (self.data.evaluation or self.data.evaluation_share):
            raise ValueError("schedule.kind plateau needs data.evaluation or data.evaluation_share")
        if self.data.max_length > self.batch.micro_tokens:
            raise ValueError("batch.micro_tokens must hold an example of data.max_length")
        return self

    @property
    def learning_rate(self) -> float:
        """The highest learning rate."""
        given = self.optimizer.learning_rate
        if given is not None:
            return given
        if self.optimizer.method == "muon":
            return 4e-3
        return 1e-5 if self.adapter is None else 2e-4

    def to_yaml(self) -> str:
        """This recipe with all its fields."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    @classmethod
    def from_file(cls, path: Path, changes: tuple[str, ...] = ()) -> Self:
        """Read a recipe.

        Args:
            changes: `section.field=value` each, as of `--set`; values are read as YAML.

        Raises:
            ConfigError: names the file and each wrong field.
        """
        return cls.checked(read_fields(path, changes), where=str(path))

    @classmethod
    def checked(cls, raw: dict[str, Any], *, where: str) -> Self:
        """The recipe of these fields. Raises ConfigError that names each wrong one."""
        try:
            return cls.model_validate(raw)
        except ValidationError as cause:
            raise ConfigError(
                f"{where}: {wrong_fields(cause, cls)}.", hint="docs/tuning.md describes the fields."
            ) from cause
