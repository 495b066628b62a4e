"""A distillation from its recipe to its report: the composition root behind `seamount distill`.

The run itself is `tuning.pipeline.tune`, of the student, with an objective that listens to a teacher; checkpoints,
resume, metrics and report are its. What is added: the student is made, the teacher loaded or its guesses written down,
and in the end both answer the evaluation examples.
"""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from seamount.core.errors import ConfigError
from seamount.core.sizes import size_text
from seamount.models.config import ModelConfig
from seamount.models.load_plan import plan_load
from seamount.models.locate import locate_model
from seamount.training.compression.files import write_whole
from seamount.training.tuning.distributed import World
from seamount.training.tuning.estimate import Plan, plan
from seamount.training.tuning.failures import together
from seamount.training.tuning.network import DTYPES
from seamount.training.tuning.pipeline import Quiet, Resume, Silent, TuneResult, Watcher, tune
from seamount.training.tuning.prepare import Prepared
from seamount.training.tuning.report import write_report
from seamount.training.tuning.scoring import questions, score_model
from seamount.training.tuning.trainer import Objective
from seamount.training.tuning.writing import writing

from .cache import CacheFacts, TopCache, build
from .objective import DistillationObjective
from .recipe import DistillRecipe
from .student import make_student
from .teacher import Teacher, check_same_tokens, digest_of


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of teacher and student: weights without MTP blocks, and bytes on disk with them."""

    teacher_weights: int
    student_weights: int
    teacher_bytes: int
    student_bytes: int

    @property
    def share(self) -> float:
        """The student's weights per weight of the teacher."""
        return self.student_weights / self.teacher_weights

    @property
    def text(self) -> str:
        """A line for people."""
        return (
            f"Teacher: {self.teacher_weights:,} weights, {size_text(self.teacher_bytes)}. "
            f"Student: {self.student_weights:,} ({self.share:.1%}), {size_text(self.student_bytes)}."
        )


@dataclass(frozen=True, slots=True)
class DistillResult:
    """What came out of a distillation.

    Attributes:
        run: of the student; `run.result` is its folder, once it has learned.
        teacher_accuracy, student_accuracy: on evaluation examples, 0 to 1; None where none were scored, or the run was
            stopped.
    """

    run: TuneResult
    sizes: Sizes
    teacher_accuracy: float | None
    student_accuracy: float | None


@dataclass(frozen=True, slots=True)
class DistillPlan:
    """What a distillation would do.

    Attributes:
        plan: of the student's run, with the teacher beside it.
        cache_bytes: what the teacher's guesses would take on disk, where they are written down.
    """

    plan: Plan
    sizes: Sizes
    cache_bytes: int | None


def distill(
    recipe: DistillRecipe,
    *,
    train: Any = None,
    evaluation: Any = None,
    resume: Resume = "auto",
    watcher: Watcher | None = None,
) -> DistillResult:
    """Run a recipe; arguments as of `tuning.pipeline.tune`.

    Raises:
        ConfigError: the recipe, teacher, student, data or output do not fit; the tokenizers differ.
        CheckpointError, IntegrityError: a checkpoint, or the teacher's cache, is damaged or of another run.
        CapacityError: memory or disk do not suffice.
    """
    world = World.join(recipe.device)
    watcher = watcher or Silent()
    if not world.is_main:
        watcher = Quiet(watcher)
    teacher = locate_model(recipe.teacher)
    seen: list[Prepared] = []

    def objective(data: Prepared, world: World) -> Objective:
        seen.append(data)
        return _objective(recipe, teacher, data, world, watcher)

    with together(recipe.output, world):
        if world.is_main:
            watcher.stage("Making the student")
            make_student(recipe.student, teacher, recipe.output / "student", seed=recipe.seed)
        world.wait()
        student = make_student(recipe.student, teacher, recipe.output / "student", seed=recipe.seed)
        check_same_tokens(teacher, student)
        sizes = _sizes(teacher, student, watcher)
        run = tune(
            recipe.tuning(student),
            train=train,
            evaluation=evaluation,
            objective=objective,
            resume=resume,
            watcher=watcher,
            world=world,
        )
    teachers = students = None
    if run.result is not None:
        teachers = _accuracy(recipe, teacher, seen[0], watcher)
        students = _accuracy(recipe, run.result, seen[0], watcher) if run.after is None else run.after
        told = {"teacher": recipe.teacher, **recipe.distillation.model_dump(mode="json"), **asdict(sizes)}
        told |= {"teacher_accuracy": teachers, "student_accuracy": students}
        _tell(run.folder, told)
    return DistillResult(run, sizes, teachers, students)


def plan_distillation(recipe: DistillRecipe, watcher: Watcher | None = None) -> DistillPlan:
    """Prepare a run and try its first steps, with the teacher running beside them; nothing is written.

    Raises:
        SeamountError: the run could not begin; see `distill`.
    """
    watcher = watcher or Silent()
    teacher = locate_model(recipe.teacher)
    with tempfile.TemporaryDirectory(prefix="seamount-") as spare:
        student = make_student(recipe.student, teacher, Path(spare) / "student", seed=recipe.seed)
        check_same_tokens(teacher, student)
        sizes = _sizes(teacher, student, watcher)
        num_rows: list[int] = []

        def objective(data: Prepared, world: World) -> Objective:
            num_rows.append(int(data.train.num_trained.sum()))
            return _beside(recipe, teacher, world, watcher)

        found = plan(recipe.tuning(student), watcher, objective=objective)
    cache_bytes = None
    if recipe.distillation.top_k is not None:
        cache_bytes = _facts(recipe, "", "", "").num_bytes(num_rows[0])
    return DistillPlan(found, sizes, cache_bytes)


def _objective(
    recipe: DistillRecipe, teacher: Path, data: Prepared, world: World, watcher: Watcher
) -> DistillationObjective:
    section = recipe.distillation
    if section.top_k is None:
        return _beside(recipe, teacher, world, watcher)
    watcher.stage("Writing down the teacher's guesses")
    facts = _facts(recipe, digest_of(teacher), str(_dtype(recipe) or "as stored"), data.train.digest)
    vocab_size = ModelConfig.from_folder(teacher).vocab_size
    if section.top_k > vocab_size:
        raise ConfigError(f"distillation.top_k is {section.top_k}; the teacher knows {vocab_size} tokens.")
    build(
        recipe.cache_folder,
        facts,
        data.train,
        _loader(recipe, teacher, world, watcher),
        micro_tokens=recipe.batch.micro_tokens,
        world=world,
        progress=watcher.scoring,
    )
    gc.collect()  # the teacher
    cache = TopCache(recipe.cache_folder, facts, data.train)
    return _following(recipe, teacher, DistillationObjective(cache.guide, section.weight, section.temperature))


def _beside(recipe: DistillRecipe, teacher: Path, world: World, watcher: Watcher) -> DistillationObjective:
    watcher.stage("Loading the teacher")
    loaded = _loader(recipe, teacher, world, watcher)()
    section = recipe.distillation
    return _following(recipe, teacher, DistillationObjective(loaded.guide, section.weight, section.temperature))


def _following(recipe: DistillRecipe, teacher: Path, made: DistillationObjective) -> DistillationObjective:
    """The objective, which says by what rules and which teacher: a run goes on by the same ones only."""
    made.rules = f"{recipe.distillation.model_dump_json()} of {teacher.name}"
    return made


def _loader(recipe: DistillRecipe, teacher: Path, world: World, watcher: Watcher) -> Callable[[], Teacher]:
    return lambda: Teacher.load(
        teacher,
        temperature=recipe.distillation.temperature,
        device=world.device,
        dtype=_dtype(recipe),
        progress=watcher.loading,
    )


def _dtype(recipe: DistillRecipe) -> torch.dtype | None:
    precision = recipe.distillation.teacher_precision
    return None if precision == "auto" else DTYPES[precision]


def _facts(recipe: DistillRecipe, teacher: str, precision: str, data: str) -> CacheFacts:
    section = recipe.distillation
    return CacheFacts(
        teacher=teacher, precision=precision, data=data, top_k=section.top_k or 0, temperature=section.temperature
    )


def _sizes(teacher: Path, student: Path, watcher: Watcher) -> Sizes:
    weights, bytes_on_disk = [], []
    for folder in (teacher, student):
        found = plan_load(folder, ModelConfig.from_folder(folder))
        bytes_on_disk.append(sum(found.num_bytes(key) for key in found.places))
        weights.append(sum(place.num_values for place in found.without_mtp().places.values()))
    sizes = Sizes(*weights, *bytes_on_disk)
    if sizes.share > 1:
        watcher.stage(
            f"The student has {sizes.student_weights:,} weights, more than its teacher's {sizes.teacher_weights:,}"
        )
    return sizes


def _accuracy(recipe: DistillRecipe, folder: Path, data: Prepared, watcher: Watcher) -> float | None:
    if data.evaluation is None or not recipe.data.scored:
        return None
    watcher.stage(f"Answering evaluation examples: {folder.name}")
    asked = questions(data.evaluation, recipe.data.scored)
    return score_model(str(folder), None, asked, on_progress=watcher.scoring).accuracy


def _tell(folder: Path, told: dict[str, Any]) -> None:
    """Add to the run's facts, and with them to its report."""
    path = folder / "facts.json"
    facts = json.loads(path.read_text(encoding="utf-8")) | {"distillation": told}
    with writing(folder):
        write_whole(path, (json.dumps(facts, indent=2, ensure_ascii=False) + "\n").encode())
    write_report(folder, folder / "report.html")
