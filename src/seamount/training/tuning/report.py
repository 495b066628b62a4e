"""One page about a run, for people: `write_report` makes a self-contained HTML file of what the run's folder holds.

Called by `pipeline` when a run ends, and for any run's folder at any time. The page loads nothing, runs nothing, and
says so to the browser (a policy with the digest of its only style). Of the folder it reads

    metrics.jsonl     see `log`
    facts.json        model, groups (weights trained, by part), num_weights, data, machine, software ...: what is there
    scores.json       before and after: num_right, num_items
    accuracy.json     of continual learning: tasks, matrix, average, forgetting, backward_transfer
    recipe.yaml       shown as it is, but for passwords in addresses

and leaves out what is missing. It must not know how any of it was measured.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from seamount.core.errors import CapacityError, ConfigError
from seamount.core.sizes import size_text

from .curves import Curve, draw
from .log import METRICS_NAME, read_log
from .trackers import without_secrets
from .view import duration

_MOST_EVENTS = 200
_Z = 1.959964  # of the normal distribution, for 95 %


def write_report(folder: Path, path: Path) -> None:
    """Write the report of the run in `folder`; a file that is there is replaced when the new one is whole.

    Raises:
        ConfigError: a file of the folder is not what it should be.
        CapacityError: the report cannot be written.
    """
    style = (files(__package__) / "report.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {"percent": _percent, "points": _points, "bar": _bar}
    template = environment.from_string((files(__package__) / "report.html.jinja").read_text(encoding="utf-8"))
    text = template.render(
        run=_run(folder),
        style=Markup(style),
        policy=f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'",
    )
    partial = path.with_name(path.name + ".tmp")
    try:
        with open(partial, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as cause:
        partial.unlink(missing_ok=True)
        raise CapacityError(f"{path} cannot be written: {cause.strerror}.", code="disk_full") from cause


@dataclass(slots=True)
class _Course:
    """What the lines of a log come to: rows of (step, value) by name, and what else is told."""

    rows: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    tasks: list[tuple[float, str]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    skills: dict[str, dict[str, float]] = field(default_factory=dict)
    sums: dict[str, float] = field(default_factory=dict)
    last: dict[str, Any] = field(default_factory=dict)
    num_unread: int = 0

    def add(self, line: dict[str, Any] | None) -> None:
        if line is None:
            self.num_unread += 1
        elif line["kind"] == "step":
            for name in ("loss", "learning_rate", "gradient_norm", "tokens_per_s", "imbalance"):
                self._note(name, line["step"], line.get(name))
            for name in ("seconds", "num_tokens", "num_trained_tokens"):
                self.sums[name] = self.sums.get(name, 0) + (line.get(name) or 0)
            if isinstance(line.get("task"), str) and (not self.tasks or self.tasks[-1][1] != line["task"]):
                self.tasks.append((line["step"], line["task"]))
            peak = max(self.last.get("memory_bytes") or 0, line.get("memory_bytes") or 0)
            self.last = {**line, "memory_bytes": peak}
        elif line["kind"] == "evaluation":
            self._note("evaluation", line["step"], line.get("loss"))
            if line.get("phase") in ("before", "after") and isinstance(line.get("skills"), dict):
                self.skills[line["phase"]] = line["skills"]
        elif line["kind"] == "event" and len(self.events) < _MOST_EVENTS:
            self.events.append({"step": line["step"], "text": str(line.get("text"))})

    def ends(self, name: str) -> tuple[float, float] | None:
        """The first and the last value; of a tenth of the run each, where there are many."""
        values = [value for _, value in self.rows.get(name, [])]
        if not values:
            return None
        count = max(len(values) // 10, 1)
        return sum(values[:count]) / count, sum(values[-count:]) / count

    def _note(self, name: str, step: float, value: object) -> None:
        if isinstance(value, int | float) and math.isfinite(value):
            self.rows.setdefault(name, []).append((step, float(value)))


def _run(folder: Path) -> dict[str, Any]:
    """All that the template shows."""
    course = _Course()
    for line in read_log(folder / METRICS_NAME):
        course.add(line)
    facts = _read(folder / "facts.json")
    scores = _scores(_read(folder / "scores.json"), course.skills)
    matrix = _matrix(_read(folder / "accuracy.json"))
    recipe = folder / "recipe.yaml"
    return {
        "name": str(facts.get("model") or folder.resolve().name),
        "outcome": _outcome(folder, course),
        "brief": _brief(course, scores, matrix),
        "scores": scores,
        "matrix": matrix,
        "charts": _charts(course),
        "groups": _groups(facts),
        "facts": _facts(facts),
        "events": course.events,
        "recipe": without_secrets(recipe.read_text(encoding="utf-8", errors="replace")) if recipe.exists() else "",
    }


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no file."""
    if not path.exists():
        return {}
    try:
        fields = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as cause:
        raise ConfigError(f"{path} cannot be read: {cause}.", hint="The run writes it anew when it goes on.") from cause
    if not isinstance(fields, dict):
        raise ConfigError(f"{path} holds no JSON object.", hint="The run writes it anew when it goes on.")
    return fields


def _outcome(folder: Path, course: _Course) -> str:
    told = []
    if course.last:
        step, total = course.last["step"], course.last.get("num_steps")
        ended = "finished" if total in (None, step) else f"stopped after step {step:,} of {total:,}"
        told.append(f"{ended[0].upper()}{ended[1:]}")
    else:
        told.append("No step was done")
    told.append(f"run {folder.resolve().name}")
    if course.num_unread:
        told.append(f"{course.num_unread} lines of {METRICS_NAME} cannot be read")
    return " · ".join(told)


def _brief(course: _Course, scores: list[dict[str, Any]], matrix: dict[str, Any] | None) -> list[dict[str, str]]:
    keys = [] if matrix is None else [(value, name.lower()) for name, value in matrix["sums"]]
    if scores:
        keys.append((f"{_percent(scores[0]['before'])} → {_percent(scores[0]['after'])}", "accuracy, before → after"))
    for name, label in (("loss", "training loss"), ("evaluation", "evaluation loss")):
        ends = course.ends(name)
        if ends is not None:
            keys.append((f"{ends[0]:.3g} → {ends[1]:.3g}", f"{label}, begin → end"))
    if course.last:
        keys.append((f"{course.last['step']:,}", "steps"))
        if course.sums["num_trained_tokens"]:
            keys.append((_short(course.sums["num_trained_tokens"]), "trained tokens seen"))
        keys.append((duration(course.sums["seconds"]), "in steps"))
        if course.last["memory_bytes"]:
            keys.append((size_text(course.last["memory_bytes"]), "memory at most"))
    return [{"value": value, "label": label} for value, label in keys]


def _scores(held: dict[str, Any], skills: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    rows = []
    if isinstance(held.get("before"), dict) and isinstance(held.get("after"), dict):
        shares: dict[str, Any] = {}
        for when in ("before", "after"):
            right, items = int(held[when]["num_right"]), int(held[when]["num_items"])
            shares |= {when: right / max(items, 1), f"{when}_range": _range(right, items)}
        rows.append({"name": f"all ({int(held['after']['num_items']):,})", **shares})
    before, after = skills.get("before", {}), skills.get("after", {})
    for name in before:
        if before[name] is not None and after.get(name) is not None:
            rows.append({"name": name, "before": before[name], "after": after[name]})
    blank = {"before_range": "", "after_range": ""}
    return [{**blank, **row, "change": row["after"] - row["before"]} for row in rows]


def _range(right: int, items: int) -> str:
    """Where the true share lies with 95 % certainty: E. B. Wilson, JASA 22 (1927) 209."""
    if not items:
        return ""
    share, square = right / items, _Z * _Z
    middle = share + square / (2 * items)
    spread = _Z * math.sqrt(share * (1 - share) / items + square / (4 * items * items))
    low, high = ((middle + sign * spread) / (1 + square / items) for sign in (-1, 1))
    return f"({100 * max(low, 0):.0f} to {100 * min(high, 1):.0f})"


def _matrix(held: dict[str, Any]) -> dict[str, Any] | None:
    tasks, rows = held.get("tasks"), held.get("matrix")
    if not tasks or not rows:
        return None
    known = (("average", "Average accuracy"), ("forgetting", "Forgetting"), ("backward_transfer", "Backward transfer"))
    show = {"average": _percent, "forgetting": lambda value: _points(value).lstrip("+"), "backward_transfer": _points}
    return {
        "tasks": [str(task) for task in tasks],
        "rows": [{"task": str(task), "shares": row} for task, row in zip(tasks, rows, strict=False)],
        "sums": [(label, show[name](held[name])) for name, label in known if held.get(name) is not None],
    }


def _charts(course: _Course) -> list[dict[str, Any]]:
    rows, marks = course.rows, course.tasks
    evaluation = rows.get("evaluation", [])
    loss = [Curve("line", rows.get("loss", [])), Curve("dots", evaluation)]
    picture = draw("Loss over steps", loss, marks=marks, is_wide=True)
    charts = [{"title": "Loss", "wide": True, "evaluation": bool(evaluation), "picture": picture}]
    for name, title, from_zero in (
        ("learning_rate", "Learning rate", True),
        ("gradient_norm", "Gradient norm", False),
        ("tokens_per_s", "Tokens per second", True),
        ("imbalance", "Busiest expert's load over the mean", False),
    ):
        if name == "imbalance" and all(value == 1.0 for _, value in rows.get(name, [])):
            continue  # a model without experts
        picture = draw(f"{title} over steps", [Curve("line", rows.get(name, []))], marks=marks, from_zero=from_zero)
        charts.append({"title": title, "wide": False, "evaluation": False, "picture": picture})
    return [chart for chart in charts if chart["picture"]]


def _groups(facts: dict[str, Any]) -> list[dict[str, Any]]:
    groups = facts.get("groups")
    if not isinstance(groups, dict) or not groups:
        return []
    total = facts.get("num_weights")
    counts = {str(name): int(count) for name, count in groups.items()}
    rows = [*counts.items(), ("trained in all", sum(counts.values()))]
    if total:
        rows.append(("weights of the model", int(total)))
    return [{"name": name, "count": count, "share": f"{count / total:.3%}" if total else ""} for name, count in rows]


def _facts(facts: dict[str, Any]) -> list[tuple[str, list[tuple[str, list[tuple[str, str]]]]]]:
    """Sections of tables of rows, of whatever is there."""
    rest = {name: value for name, value in facts.items() if name not in ("groups", "data")}
    titled = (("Data", facts.get("data")), ("Model, machine and software", rest))
    return [(title, _tables(value)) for title, value in titled if isinstance(value, dict) and value]


def _tables(fields: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    plain = [(_label(name), _shown(name, value)) for name, value in fields.items() if not isinstance(value, dict)]
    inner = [
        (_label(name), [(_label(key), _shown(key, part)) for key, part in value.items()])
        for name, value in fields.items()
        if isinstance(value, dict) and value
    ]
    return ([("", plain)] if plain else []) + inner


def _label(name: str) -> str:
    return str(name).removeprefix("num_").removesuffix("_bytes").replace("_", " ")


def _shown(name: str, value: Any) -> str:
    if value is None:
        return "none"
    if name == "digest":
        return f"{value!s:.16}…"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float) and str(name).endswith("_bytes"):
        return size_text(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ", ".join(_shown("", part) for part in value)
    return without_secrets(str(value))


def _short(count: float) -> str:
    for unit, name in ((1e9, "B"), (1e6, "M")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count:,.0f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _points(change: float) -> str:
    return f"{100 * change:+.1f} points"


def _bar(share: float) -> Markup:
    picture = (
        '<svg class="bar" viewBox="0 0 100 4" preserveAspectRatio="none" aria-hidden="true">'
        '<rect class="all" width="100" height="4" rx="1"/><rect class="part" width="{:.1f}" height="4" rx="1"/></svg>'
    )
    return Markup(picture).format(100 * share)
