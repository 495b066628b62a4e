"""What a training run is: the fields of a recipe file, checked. Called by `tiny` and the tests.

A recipe is YAML that people keep in git; unknown keys fail. It must not know tensors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from seamount.core.errors import ConfigError


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Stage(_Section):
    """A stretch of the run with its own mixture of data.

    Attributes:
        from_step: first step that draws from it.
        samples: how many are made; a stage that needs more starts again, in another order.
        weights: how often each skill is drawn, relative. Empty: the corpus's own.
    """

    from_step: int = Field(ge=0)
    samples: int = Field(gt=0)
    weights: dict[str, float] = {}


class DataSection(_Section):
    """Where samples come from and how they are put into batches.

    Attributes:
        tokenizer: folder with tokenizer.json.
        batch_tokens: rows times length of a batch, padding included.
        buckets: row lengths, in tokens; a sample goes to the shortest that holds it, one longer than all is left out
            (and counted in the log).
    """

    tokenizer: Path
    batch_tokens: int = Field(gt=0)
    buckets: tuple[int, ...] = Field(min_length=1)
    stages: tuple[Stage, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _in_order(self) -> DataSection:
        starts = [stage.from_step for stage in self.stages]
        if starts[0] != 0 or sorted(set(starts)) != starts:
            raise ValueError("stages begin at step 0 and follow each other")
        if sorted(set(self.buckets)) != list(self.buckets) or self.buckets[-1] > self.batch_tokens:
            raise ValueError("buckets grow, and the longest fits into batch_tokens")
        return self


class OptimizerSection(_Section):
    """Muon for matrices, Adam for embedding, head, router and norms.

    Attributes:
        learning_rate: at the plateau, for both (Muon's update is scaled to the size of Adam's).
        weight_decay: decoupled; per step a weight shrinks by learning rate times this. Matrices only.
        clip_norm: gradients are scaled down to this global norm.
    """

    learning_rate: float = Field(gt=0)
    weight_decay: float = Field(ge=0, default=0.05)
    momentum: float = Field(gt=0, lt=1, default=0.95)
    beta1: float = Field(gt=0, lt=1, default=0.9)
    beta2: float = Field(gt=0, lt=1, default=0.95)
    clip_norm: float = Field(gt=0, default=1.0)


class ScheduleSection(_Section):
    """Warm-up, plateau, linear decay to zero.

    The decay can be brought forward while a run goes on: see `loop.Trainer`.
    """

    warmup_steps: int = Field(ge=0)
    total_steps: int = Field(gt=0)
    decay_steps: int = Field(gt=0)

    @model_validator(mode="after")
    def _fits(self) -> ScheduleSection:
        if self.warmup_steps + self.decay_steps > self.total_steps:
            raise ValueError("warm-up and decay are longer than the run")
        return self


class MtpSection(_Section):
    """The multi-token-prediction block, trained by itself when the rest is done and no longer changes.

    Attributes:
        steps: how many follow the run's own.
        learning_rate: falls linearly to zero over them.
    """

    steps: int = Field(gt=0)
    learning_rate: float = Field(gt=0)


class Recipe(_Section):
    """A whole run.

    Attributes:
        name: of the model.
        run_folder: checkpoints, metrics, shards and logs go here.
        model: config.json of the network.
        router_bias_rate: step of the routers' balancing bias (arXiv 2412.19437, section 2.1.2).
        compile: compile layers; minutes at the start, half the time per step after.
        checkpoint_every_steps: the last `keep_checkpoints` are kept.
        probe_every_steps: how often `probe_items` held-out items per skill and language are answered and scored.
    """

    name: str
    run_folder: Path
    seed: int = Field(ge=0, lt=2**32)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compile: bool = True
    model: dict[str, Any]
    data: DataSection
    optimizer: OptimizerSection
    schedule: ScheduleSection
    mtp: MtpSection | None = None
    router_bias_rate: float = Field(ge=0, default=0.001)
    checkpoint_every_steps: int = Field(gt=0, default=200)
    keep_checkpoints: int = Field(gt=0, default=2)
    probe_every_steps: int = Field(gt=0, default=500)
    probe_items: int = Field(ge=0, default=20)

    @classmethod
    def from_file(cls, path: Path) -> Recipe:
        """Read a recipe. Raises ConfigError that names the file and each wrong field."""
        try:
            raw = yaml.safe_load(path.read_text(encoding="utf-8"))
            return cls.model_validate(raw)
        except OSError as cause:
            raise ConfigError(f"{path} cannot be read: {cause.strerror}.", hint="Give a recipe file.") from cause
        except yaml.YAMLError as cause:
            raise ConfigError(f"{path} is not valid YAML: {cause}.") from cause
        except ValidationError as cause:
            wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in cause.errors())
            raise ConfigError(
                f"{path}: {wrong}.", hint="The fields are described in training/pretraining/recipe.py."
            ) from cause
