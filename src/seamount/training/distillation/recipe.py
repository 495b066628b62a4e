"""What distillation adds to a recipe: the teacher, the student, and how much of the loss is whose. Called by `pipeline`
and `seamount distill`. It must not know tensors.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from seamount.training.tuning.recipe import Precision, Section, TuneRecipe


class StudentSection(Section):
    """Who learns; one of these is given.

    Attributes:
        model: a checkpoint folder, or the name of an embedded model.
        config: what config.json is to hold, of any family that is served; the weights begin at random, and the
            tokenizer and template are the teacher's.
        shrink: a model like the teacher, of at most this share of its weights, that begins with what it can take over
            from it: see docs/tuning-distillation.md.
    """

    model: str | None = None
    config: dict[str, Any] | None = None
    shrink: float | None = Field(gt=0, lt=1, default=None)

    @model_validator(mode="after")
    def _is_one(self) -> StudentSection:
        if sum(value is not None for value in (self.model, self.config, self.shrink)) != 1:
            raise ValueError("give one of model, config and shrink")
        try:
            json.dumps(self.config, allow_nan=False)
        except (ValueError, TypeError) as cause:
            raise ValueError("config holds what config.json cannot, such as an infinite number") from cause
        return self


class DistillationSection(Section):
    """How the student learns from the teacher.

    Attributes:
        weight: of the teacher's word in the loss; the rest is the data's.
        temperature: at which both distributions are compared: above 1, unlikely tokens count for more (arXiv
            1503.02531).
        top_k: the teacher's likeliest tokens are written to disk before the run, and learned from there: for several
            passes over the data, or where teacher and student do not fit into memory together. None: the teacher runs
            beside the student.
        cache: folder of what is written; None is `teacher-cache` in the run's folder.
        teacher_precision: of the teacher's weights; auto is as stored.
    """

    weight: float = Field(gt=0, le=1, default=0.9)
    temperature: float = Field(ge=0.01, le=1000, default=1.0)
    top_k: int | None = Field(gt=0, le=2**20, default=None)
    cache: Path | None = None
    teacher_precision: Precision = "auto"


class DistillRecipe(TuneRecipe):
    """A whole run. All weights of the student are trained; an MTP block stays as it is.

    Attributes:
        teacher: name of an embedded model, a folder, or a .gguf file.
        model: left out; `student` says who learns.
    """

    model: str = ""
    adapter: None = None
    teacher: str
    student: StudentSection
    distillation: DistillationSection = DistillationSection()

    @model_validator(mode="after")
    def _is_of_a_student(self) -> DistillRecipe:
        if self.model:
            raise ValueError("model: left out in a recipe with a teacher; name it in student.model")
        if self.experts.mtp_weight:
            raise ValueError("experts.mtp_weight: a teacher says nothing of MTP blocks; leave it at 0")
        if self.distillation.cache is not None and self.distillation.top_k is None:
            raise ValueError("distillation.cache: a cache holds distillation.top_k tokens per row; set it")
        return self

    @property
    def cache_folder(self) -> Path:
        """Where the teacher's guesses are kept, with `top_k`."""
        return self.distillation.cache or self.output / "teacher-cache"

    def tuning(self, student: Path) -> TuneRecipe:
        """The same run as one that tunes `student`; one that knows nothing yet is not asked before it."""
        fields = {name: getattr(self, name) for name in TuneRecipe.model_fields} | {"model": str(student)}
        if self.student.model is None:
            fields["data"] = self.data.model_copy(update={"scored": 0})
        return TuneRecipe.model_validate(fields)
