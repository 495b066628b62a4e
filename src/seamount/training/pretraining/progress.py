"""What people see of a training run: lines, a live one below them on a terminal, metrics.jsonl, the loss curve.

Called by `tiny`. It must not know the network.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from math import log10
from pathlib import Path
from typing import Any

from rich.console import Console

from seamount.training.evaluate import Cell
from seamount.training.pretraining.loop import Progress, StepRecord

_STEPS_PER_LINE = 20
_SMOOTHING = 0.95


class RunLog:
    """Shows a run on a console and appends to `metrics.jsonl` and `probes.jsonl` in its folder."""

    def __init__(self, folder: Path, console: Console | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._metrics, self._probes = folder / "metrics.jsonl", folder / "probes.jsonl"
        self._console = console or Console(soft_wrap=True, highlight=False)
        self._status = self._console.status("") if self._console.is_terminal else None
        if self._status is not None:
            self._status.start()
        self._loss: float | None = None
        self._rate = 0.0

    def rewind(self, step: int) -> None:
        """Forget what a killed run wrote after the checkpoint at `step`."""
        for path in (self._metrics, self._probes):
            kept = [record for record in read_records(path) if record["step"] <= step]
            path.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")

    def say(self, text: str) -> None:
        """A line for people."""
        self._console.print(text)

    def step(self, record: StepRecord, progress: Progress) -> None:
        """One step was done."""
        _append(self._metrics, {key: _short(value) for key, value in asdict(record).items()})
        speed = record.num_tokens / record.seconds
        smooth = _SMOOTHING if self._loss is not None else 0.0
        self._loss = smooth * (self._loss or 0.0) + (1 - smooth) * record.loss
        self._rate = smooth * self._rate + (1 - smooth) * speed
        per_step = progress.num_tokens / progress.step / max(self._rate, 1e-9)
        left = max(progress.end_step - progress.step, 0) * per_step
        text = (
            f"{record.phase} step {record.step}/{progress.end_step}  loss {self._loss:.4f}  "
            f"lr {record.learning_rate:.2e}  norm {record.gradient_norm:.2f}  balance {record.imbalance:.2f}  "
            f"{self._rate:,.0f} tokens/s  {progress.num_tokens / 1e6:.1f}M tokens "
            f"({progress.num_trained_tokens / 1e6:.1f}M trained)  {_duration(left)} left"
        )
        if self._status is not None:
            self._status.update(text)
        if record.step % _STEPS_PER_LINE == 0 or record.step == progress.end_step:
            self.say(text)

    def probe(self, cells: Sequence[Cell], progress: Progress) -> None:
        """Held-out items were answered."""
        shares = {f"{cell.skill}/{cell.language}": round(cell.share, 4) for cell in cells}
        overall = sum(cell.num_right for cell in cells) / max(sum(cell.num_items for cell in cells), 1)
        _append(self._probes, {"step": progress.step, "overall": round(overall, 4), "shares": shares})
        listed = "  ".join(f"{name} {100 * share:.0f}" for name, share in shares.items())
        self.say(f"probe at step {progress.step}: {100 * overall:.1f} % right  ({listed})")


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON lines file; a last line that a kill cut off is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def loss_curve(metrics: Sequence[dict[str, Any]], probes: Sequence[dict[str, Any]], title: str) -> str:
    """The loss (logarithmic) and the share of right answers over tokens, as a self-contained SVG."""
    width, height, left, top, bottom = 760, 360, 56, 34, 44
    tokens, total = [], 0
    smooth: list[float] = []
    for record in metrics:
        total += record["num_tokens"]
        tokens.append(total)
        smooth.append(0.98 * smooth[-1] + 0.02 * record["loss"] if smooth else record["loss"])
    low, high = min(smooth), max(smooth)
    span = max(log10(high / low), 1e-9)
    inner_width, inner_height = width - 2 * left, height - top - bottom
    by_step = {record["step"]: count for record, count in zip(metrics, tokens, strict=True)}

    def x(count: float) -> float:
        return left + inner_width * count / max(total, 1)

    def y(share: float) -> float:
        return top + inner_height * (1 - share)

    every = max(len(tokens) // 300, 1)
    curve = " ".join(
        f"{x(t):.1f},{y(log10(value / low) / span):.1f}" for t, value in list(zip(tokens, smooth, strict=True))[::every]
    )
    points = [(x(by_step[p["step"]]), y(p["overall"])) for p in probes if p["step"] in by_step]
    shares = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
    grid = "".join(
        f'<line x1="{left}" x2="{width - left}" y1="{y(s):.1f}" y2="{y(s):.1f}" stroke="#d5dbe1"/>'
        f'<text x="{width - left + 6}" y="{y(s) + 4:.1f}" fill="#0a7d6c">{100 * s:.0f} %</text>'
        f'<text x="{left - 6}" y="{y(s) + 4:.1f}" text-anchor="end" fill="#24507a">{low * 10 ** (span * s):.3g}</text>'
        for s in (0, 0.25, 0.5, 0.75, 1)
    )
    ticks = "".join(
        f'<text x="{x(total * s):.1f}" y="{height - bottom + 18}" text-anchor="middle">{total * s / 1e6:.1f}M</text>'
        for s in (0, 0.25, 0.5, 0.75, 1)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="12" fill="#333"><rect width="{width}" height="{height}" fill="#fff"/>'
        f'<text x="{left}" y="20" font-size="14">{title}</text>{grid}{ticks}'
        f'<polyline points="{curve}" fill="none" stroke="#24507a" stroke-width="1.6"/>'
        f'<polyline points="{shares}" fill="none" stroke="#0a7d6c" stroke-width="1.6" stroke-dasharray="4 3"/>'
        f'<text x="{width / 2}" y="{height - 8}" text-anchor="middle">tokens seen · solid: loss · '
        f"dashed: held-out items answered exactly</text></svg>\n"
    )


def _append(path: Path, record: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def _short(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _duration(seconds: float) -> str:
    hours, minutes = divmod(int(seconds) // 60, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min"
