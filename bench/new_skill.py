"""A skill that the embedded model lacks, learned from a file of examples: before, after, and what the others lost.

    python bench/new_skill.py --make FOLDER           # train.jsonl and held-out.jsonl
    python bench/new_skill.py FOLDER [--set k=v ...]  # makes them, tunes with recipes/lora.yaml, scores all skills

The skill is to write a date, given in one of many ways in English or Chinese, as ISO 8601. Dates of the held-out file
never occur in the training file. Beside the new examples there are some of the old skills (`--rehearsal`), which
is what keeps them, more of those that the embedded model itself needed most of: tools and arithmetic. Prints a table;
`--json` prints the numbers. It measures and never fails on one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from random import Random
from typing import Any

MONTHS = [f"{datetime(2000, month, 1):%B}" for month in range(1, 13)]
NUMERALS = "一二三四五六七八九十"
ASKED = {
    "en": (
        "Write this date as ISO 8601: {}",
        "ISO date of {}?",
        "Which ISO 8601 date is {}?",
        "Convert to ISO: {}",
        "Normalise the date {}.",
    ),
    "zh": ("把这个日期写成ISO格式：{}", "{}的ISO日期是什么？", "转换成ISO日期：{}", "请规范日期{}。"),
}


def main() -> None:
    """Make the data, or measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--make", type=Path, metavar="FOLDER", help="only make the data")
    parser.add_argument("--examples", type=int, default=4000, help="of the new skill")
    parser.add_argument("--held-out", type=int, default=400)
    parser.add_argument("--rehearsal", type=float, default=3.0, help="examples of the old skills, per new one")
    parser.add_argument("--recipe", default="recipes/lora.yaml")
    parser.add_argument("--items", type=int, default=150, help="held-out items of each old skill and language")
    parser.add_argument("--set", dest="changes", action="append", default=[])
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.make or args.folder is None:
        make(args.make or Path("new-skill"), args.examples, args.held_out, args.rehearsal)
        return
    make(args.folder, args.examples, args.held_out, args.rehearsal)
    told = measure(args)
    print(json.dumps(told, indent=1) if args.json else table(told))


def make(folder: Path, num_examples: int, num_held_out: int, rehearsal: float) -> None:
    """Write the two files."""
    from seamount.training.skills import LANGUAGES, SKILLS, generate

    chance = Random("dates")
    folder.mkdir(parents=True, exist_ok=True)
    dates = [(year, month, day) for year in range(1950, 2050) for month in range(1, 13) for day in range(1, 29)]
    chance.shuffle(dates)
    held_out, trained = dates[:num_held_out], dates[num_held_out:]
    records = [record(chance, trained[index % len(trained)]) for index in range(num_examples)]
    names = [name for name in SKILLS for _ in range({"tools": 3, "arithmetic": 2}.get(name, 1))]
    for index in range(round(num_examples * rehearsal)):
        item = generate(names[index % len(names)], LANGUAGES[index // len(names) % 2], 5, index)
        records.append({"messages": list(item.messages)} | ({"tools": list(item.tools)} if item.tools else {}))
    chance.shuffle(records)
    write(folder / "train.jsonl", records)
    write(folder / "held-out.jsonl", [record(chance, date) for date in held_out])


def write(path: Path, records: list[dict[str, Any]]) -> None:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in records), encoding="utf-8")


def record(chance: Random, date: tuple[int, int, int]) -> dict[str, Any]:
    """A question for a date and its answer, in OpenAI's form."""
    year, month, day = date
    language = chance.choice(("en", "zh"))
    name = MONTHS[month - 1]
    if language == "en":
        written = chance.choice(
            (
                f"{day} {name} {year}",
                f"{name} {day}, {year}",
                f"the {ordinal(day)} of {name} {year}",
                f"{name[:3]} {day} {year}",
                f"{day}-{name[:3]}-{year}",
                f"{day:02}.{month:02}.{year}",
                f"{year}/{month}/{day}",
            )
        )
    else:
        written = chance.choice(
            (f"{year}年{month}月{day}日", f"{year}年{numeral(month)}月{numeral(day)}日", f"{day}日{month}月{year}年")
        )
    asked = chance.choice(ASKED[language]).format(written)
    answer = {"role": "assistant", "content": f"{year}-{month:02}-{day:02}"}
    return {"messages": [{"role": "user", "content": asked}, answer]}


def ordinal(day: int) -> str:
    """As "3rd"."""
    return f"{day}{'th' if 10 < day < 20 else {1: 'st', 2: 'nd', 3: 'rd'}.get(day % 10, 'th')}"


def numeral(number: int) -> str:
    """A number from 1 to 31 in Chinese."""
    tens, ones = divmod(number, 10)
    head = "" if not tens else ("十" if tens == 1 else NUMERALS[tens - 1] + "十")
    return head + (NUMERALS[ones - 1] if ones else "")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Tune and score; returns what was measured."""
    folder = args.folder
    changes = [f"data.train={folder / 'train.jsonl'}", f"data.evaluation={folder / 'held-out.jsonl'}"]
    changes += ["data.evaluation_share=0", f"output={folder / 'run'}", "data.scored=400", *args.changes]
    command = [sys.executable, "-m", "seamount", "tune", args.recipe, "--json"]
    started = time.monotonic()
    result = json.loads(run([*command, *(part for change in changes for part in ("--set", change))]))
    seconds = time.monotonic() - started
    before = skills([], args.items)
    adapter = ["--adapter", result["result"]] if "adapter" in result["result"] else []
    after = skills(adapter, args.items, "seamount-tiny" if adapter else result["result"])
    return {"seconds": seconds, "result": result, "skills_before": before, "skills_after": after}


def skills(flags: list[str], items: int, model: str = "seamount-tiny") -> dict[str, float]:
    """Accuracy by skill."""
    told = json.loads(run([sys.executable, "-m", "seamount", "eval", model, "--json", "--items", str(items), *flags]))
    found: dict[str, list[int]] = {}
    for cell in told["cells"]:
        right, total = found.get(cell["skill"], [0, 0])
        found[cell["skill"]] = [right + cell["num_right"], total + cell["num_items"]]
    return {name: right / total for name, (right, total) in found.items()}


def run(command: list[str]) -> str:
    """Run a command; return what it printed."""
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def table(told: dict[str, Any]) -> str:
    """The numbers for people."""
    result = told["result"]
    lines = [
        f"tuned in {told['seconds'] / 60:.1f} minutes, {result['num_steps']} steps",
        f"{'new skill':12} {result['before']:7.1%} -> {result['after']:7.1%}",
    ]
    for name, before in told["skills_before"].items():
        after = told["skills_after"][name]
        lines.append(f"{name:12} {before:7.1%} -> {after:7.1%}  ({100 * (after - before):+.1f} points)")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
