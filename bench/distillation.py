"""What a quarter of the embedded model learns from it, and what it learns alone: accuracy on held-out items, by skill.

    python bench/distillation.py FOLDER [--arms distilled,alone] [--steps N] [--set k=v ...]

Makes examples of the embedded model's skills and token shards of them, and trains one student per arm, each on the same
examples in the same order for as many steps:

    distilled    begins with what it can take over from the teacher, and hears the teacher (recipes/distill.yaml)
    alone        the same network from random weights, with the data alone
    begun        begins as `distilled`, and goes on with the data alone: what of it the beginning brings
    heard        begins at random, and hears the teacher: what of it the teacher's word brings

Whatever a stopped run has done stays in FOLDER, and the same command goes on. Each arm's view goes to FOLDER/ARM.log.
Prints a table; `--json` prints the numbers. It measures and never fails on one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

ARMS = ("distilled", "alone", "begun", "heard")
TEACHER = "seamount-tiny"
# Skills that take longer to learn are drawn more often.
SHARES = {"arithmetic": 4, "extraction": 4, "masking": 4, "commands": 3, "tools": 6, "unknown": 3}


def main() -> None:
    """Train what is not trained yet, score, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--arms", default="distilled,alone", help=f"of {', '.join(ARMS)}")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--examples", type=int, default=50_000, help="that are made")
    parser.add_argument("--items", type=int, default=50, help="held-out items of each skill and language")
    parser.add_argument("--set", dest="changes", action="append", default=[], help="of recipes/distill.yaml")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    shards = data(args.folder, args.examples)
    arms = {arm: train(arm, args, shards) for arm in args.arms.split(",")}
    told = {"teacher": {"skills": skills(args, TEACHER, TEACHER)}, **arms}
    print(json.dumps(told, indent=1) if args.json else table(told))


def data(folder: Path, count: int) -> Path:
    """Token shards of so many examples; made once."""
    from seamount.training.skills import LANGUAGES, generate

    shards = folder / "shards"
    if (shards / "manifest.json").exists():
        return shards
    names = [name for name, share in SHARES.items() for _ in range(share)]
    chance = Random("distillation")
    records = folder / "examples.jsonl"
    with open(records, "w", encoding="utf-8") as file:
        for index in range(count):
            item = generate(chance.choice(names), chance.choice(LANGUAGES), 11, index)
            told = {"messages": list(item.messages)} | ({"tools": list(item.tools)} if item.tools else {})
            file.write(json.dumps(told, ensure_ascii=False) + "\n")
    command = ["data", "build", str(records), "--output", str(shards), "--model", TEACHER, "--max-length", "512"]
    run(command, folder / "data.log")
    return shards


def train(arm: str, args: argparse.Namespace, shards: Path) -> dict[str, Any]:
    """Train one arm's student, or go on; returns what is told of it."""
    from seamount.training.distillation.recipe import DistillRecipe

    output, done = args.folder / arm, args.folder / arm / "bench.json"
    changes = (f"output={output}", f"data.train={shards}", "data.evaluation_share=0", "data.scored=0")
    changes += (f"schedule.steps={args.steps}", *args.changes)
    recipe = DistillRecipe.from_file(Path("recipes/distill.yaml"), changes)
    if not done.exists():
        student = begin(recipe, args.folder, at_random=arm in ("alone", "heard"))
        if arm in ("distilled", "heard"):
            named = (*changes, f"student={json.dumps({'model': str(student)})}")
            words = ["distill", "recipes/distill.yaml", *(word for change in named for word in ("--set", change))]
        else:
            own = args.folder / f"{arm}.yaml"
            own.write_text(recipe.tuning(student).to_yaml(), encoding="utf-8")
            words = ["tune", str(own)]
        started = time.monotonic()
        run(words, args.folder / f"{arm}.log")
        told = {
            "seconds": time.monotonic() - started,
            "weights": weights(student),
            "teacher_weights": weights(teacher()),
        }
        done.write_text(json.dumps(told), encoding="utf-8")
    found: dict[str, Any] = json.loads(done.read_text(encoding="utf-8"))
    return found | {"skills": skills(args, str(output / "model"), arm)}


def begin(recipe: Any, folder: Path, *, at_random: bool) -> Path:
    """A student that has learned nothing yet: what the recipe makes, or that network from random weights."""
    from seamount.training.distillation.recipe import StudentSection
    from seamount.training.distillation.student import make_student

    made = make_student(recipe.student, teacher(), folder / "student", seed=recipe.seed)
    if not at_random:
        return made
    config = json.loads((made / "config.json").read_text(encoding="utf-8"))
    return make_student(StudentSection(config=config), teacher(), folder / "student-at-random", seed=recipe.seed)


def teacher() -> Path:
    """The teacher's folder."""
    from seamount.models.locate import locate_model

    return locate_model(TEACHER)


def weights(folder: Path) -> int:
    """Weights of a checkpoint, without MTP blocks."""
    from seamount.models.config import ModelConfig
    from seamount.training.distillation.student import num_weights

    return num_weights(ModelConfig.from_folder(folder))


def skills(args: argparse.Namespace, model: str, name: str) -> dict[str, float]:
    """Accuracy by skill, and `all`; asked once."""
    kept = args.folder / f"scores-{name}-{args.items}.json"
    if not kept.exists():
        log = args.folder / f"scores-{name}.log"
        run(["eval", model, "--json", "--items", str(args.items)], log, into=kept)
    found: dict[str, list[int]] = {}
    for cell in json.loads(kept.read_text(encoding="utf-8"))["cells"]:
        right, total = found.get(cell["skill"], [0, 0])
        found[cell["skill"]] = [right + cell["num_right"], total + cell["num_items"]]
    return {name: right / total for name, (right, total) in found.items()}


def run(words: list[str], log: Path, into: Path | None = None) -> None:
    """Run a `seamount` command, which says in the log how far it is; what it prints stands in `into`, or there too."""
    command = [sys.executable, "-m", "seamount", *words]
    with open(log, "a", encoding="utf-8") as file:
        if into is None:
            subprocess.run(command, check=True, stdout=file, stderr=file)
            return
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=file, text=True).stdout
    into.write_text(printed, encoding="utf-8")


def table(told: dict[str, Any]) -> str:
    """The numbers for people."""
    lines = [f"{'':14}" + "".join(f"{name:>12}" for name in told)]
    for skill in told["teacher"]["skills"]:
        lines.append(f"{skill:14}" + "".join(f"{arm['skills'][skill]:12.1%}" for arm in told.values()))
    best = told["teacher"]["skills"]["all"]
    lines.append(f"{'of teacher':14}" + "".join(f"{arm['skills']['all'] / best:12.1%}" for arm in told.values()))
    for label, name, form in (("weights", "weights", "12,"), ("minutes", "seconds", "12.1f")):
        values = [arm.get(name) for arm in told.values()]
        shown = [value / 60 if name == "seconds" and value else value for value in values]
        lines.append(f"{label:14}" + "".join(f"{'':12}" if value is None else f"{value:{form}}" for value in shown))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
