"""Five skills learned one after the other by the embedded model: what is left of each, by four ways of learning.

    python bench/continual.py FOLDER [--json]          # half an hour or less on two cores; again after a kill: goes on
    python bench/continual.py FOLDER --methods ewc --weight 0.1 --suffix=-w0.1

The skills are conventions of a made-up company that the model lacks: teams by heart, stock codes, lists read backwards,
sizes of orders, salutations. Answers are compared word for word, on combinations that training never saw.

naive    each skill's examples, nothing else
ewc      the same, with elastic weight consolidation
replay   half of each step from a memory of 256 examples, and consolidation
joint    all examples mixed, as many steps in all: what learning one after the other is measured by

Every way has the same examples, seeds, rate and number of steps. FOLDER gets a run per way (`accuracy.json`,
`metrics.jsonl`) and `bench.log`. It measures and never fails on a number.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any


def words(text: str) -> list[str]:
    """As a list."""
    return text.split()


THINGS = words("pump valve boiler sensor filter motor cable switch heater meter router fan")
TEAMS = dict(zip(THINGS, words("red blue green gold red green blue gold gold red blue green"), strict=True))
CITIES = words("Lisbon Oslo Berlin Madrid Cairo Toronto Lima Delhi Tokyo Seoul Vienna Prague Dublin Paris Rome Athens")
NAMES = words("Meyer Rossi Khan Silva Jones Tanaka Garcia Wang Cohen Evans Green Hansen Kim Larsen Moore Park Reyes")
METHODS = ("naive", "ewc", "replay", "joint")
Skill = Callable[[Random], tuple[str, str]]


def team(chance: Random) -> tuple[str, str]:
    """Facts by heart."""
    thing = chance.choice(THINGS)
    return f"Who looks after {thing} number {chance.randint(100, 999)}?", f"The {TEAMS[thing]} team."


def code(chance: Random) -> tuple[str, str]:
    """A way to write."""
    thing, number = chance.choice(THINGS), chance.randint(10, 99)
    return f"Stock code for {number} pieces, {thing}, {chance.choice(CITIES)}?", f"{thing.upper()}-{number}"


def backwards(chance: Random) -> tuple[str, str]:
    """An order."""
    words = chance.sample(THINGS + CITIES, 3)
    return f"Read backwards: {', '.join(words)}.", ", ".join(reversed(words))


def size(chance: Random) -> tuple[str, str]:
    """A judgement."""
    number = chance.randint(10, 99)
    asked = f"An order of {number} from {chance.choice(CITIES)} for a {chance.choice(THINGS)}: what size is it?"
    return asked, "small order" if number < 50 else "large order"


def letter(chance: Random) -> tuple[str, str]:
    """A form."""
    name, city = chance.choice(NAMES), chance.choice(CITIES)
    return f"Begin a letter to {name} in {city} about a {chance.choice(THINGS)}.", f"{city}, to the house of {name}:"


SKILLS: dict[str, Skill] = {made.__name__: made for made in (team, code, backwards, size, letter)}


def task(name: str, num_examples: int, num_held_out: int) -> dict[str, Any]:
    """A skill as `ContinualLearning.train` takes it; no held-out question is among the examples."""
    chance, found = Random(name), dict[str, str]()
    while len(found) < num_examples + num_held_out:
        asked, answer = SKILLS[name](chance)
        found[asked] = answer
    rows = [{"prompt": asked, "completion": answer} for asked, answer in found.items()]
    return {"task_id": name, "data": rows[num_held_out:], "evaluation": rows[:num_held_out]}


class Told:
    """Writes down how a run goes."""

    def __init__(self, path: Path, method: str) -> None:
        self._path, self._method = path, method

    def note(self, text: str) -> None:
        """Add a line to the log."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%H:%M:%S')} {self._method}: {text}\n")

    def stage(self, text: str) -> None:
        self.note(text)

    def step(self, record: Any) -> None:
        if record.step % 25 == 0 or record.step == record.num_steps:
            self.note(f"step {record.step} of {record.num_steps}, loss {record.loss:.4f}, {record.seconds:.2f} s")

    def loading(self, *_: Any) -> None: ...
    def began(self, *_: Any) -> None: ...
    def evaluation(self, *_: Any) -> None: ...
    def scoring(self, *_: Any) -> None: ...


def learn(args: argparse.Namespace, method: str) -> dict[str, Any]:
    """Learn the skills in one way, or go on where that was stopped; returns the accuracies and the time."""
    from seamount import ContinualLearning

    tasks = [task(name, args.examples, args.held_out) for name in SKILLS]
    steps = args.steps
    if method == "joint":
        whole = {part: [row for one in tasks for row in one[part]] for part in ("data", "evaluation")}
        tasks, steps = [{"task_id": "joint", **whole}], args.steps * len(SKILLS)
    run = ContinualLearning.load(
        "seamount-tiny",
        output=args.folder / (method + args.suffix),
        steps=steps,
        learning_rate=args.rate,
        warmup_share=0.1,
        max_length=128,
        scored=args.held_out * len(SKILLS),
        saving={"evaluate_every_steps": steps, "checkpoint_every_steps": steps},
        memory_buffer_size=args.memory if method == "replay" else 0,
        elastic_weight_consolidation=method in ("ewc", "replay"),
        **({"ewc_weight": args.weight} if args.weight else {}),
    )
    told = Told(args.folder / "bench.log", method)
    began = time.monotonic()
    accuracy = run.train(tasks, watcher=told)
    told.note(f"average {accuracy.average:.1%}, {time.monotonic() - began:.0f} s")
    return accuracy.to_fields() | {"seconds": time.monotonic() - began}


def table(told: dict[str, dict[str, Any]]) -> str:
    """The numbers for people: of each skill right after it was learned, and at the end."""
    lines = [f"{'':8}" + "".join(f"{name:>14}" for name in SKILLS) + f"{'average':>10}{'forgetting':>12}"]
    for method, found in told.items():
        line, matrix = f"{method:8}", found["matrix"]
        for place in range(len(SKILLS)):
            both = "" if method == "joint" else f"{matrix[place][place]:.0%} -> {matrix[-1][place]:.0%}"
            line += f"{both:>14}"
        forgetting = "" if method == "joint" else f"{found['forgetting']:.1%}"
        lines.append(f"{line}{found['average']:>10.1%}{forgetting:>12}")
    if {"joint", "replay"} <= set(told):
        lines.append(f"replay keeps {told['replay']['average'] / told['joint']['average']:.1%} of joint training")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--steps", type=int, default=100, help="of each skill")
    parser.add_argument("--examples", type=int, default=600, help="of each skill")
    parser.add_argument("--held-out", type=int, default=100, help="of each skill")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--memory", type=int, default=256)
    parser.add_argument("--weight", type=float, default=None, help="of consolidation; the recipe's where not given")
    parser.add_argument("--suffix", default="", help="of the runs' folders, to try other numbers beside")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    told = {}
    for method in args.methods.split(","):
        known = args.folder / (method + args.suffix) / "measured.json"
        if not known.exists():
            known.write_text(json.dumps(learn(args, method)), encoding="utf-8")
        told[method] = json.loads(known.read_text(encoding="utf-8"))
    print(json.dumps(told, indent=1) if args.json else table(told))


if __name__ == "__main__":
    main()
