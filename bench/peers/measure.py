"""Measure Seamount beside its peers: `make bench-peers`, or `python bench/peers/measure.py --help`.

Sets up what is missing, then lets everybody answer the same requests in turn, row by row and round by round. Every
timing is appended to a file in the cache folder at once, so that a run that was interrupted continues where it ended.
The result is written under bench/results/. It measures and never fails on a number.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import report
from artifacts import ConversionError, artifact, checkpoint, num_bytes
from build_llamacpp import native_server
from environments import Environment, InstallError, prepare
from fleet import Fleet, Runner, RunnerError
from traffic import ROWS, Row, Shape, cache_bytes_per_token, fit, prompts, read_config, seeding, warm_up

from peers import PEERS, Peer

_HERE = Path(__file__).resolve().parent
_EMBEDDED = _HERE.parents[1] / "src" / "seamount" / "models" / "embedded"
_BASE_BYTES = 15 * 10**8  # what a runner holds beside weights and cache: libraries, activations


def main() -> None:
    """Parse the command line, measure, write the report."""
    options = _options()
    work = options.cache / "runs" / options.run
    work.mkdir(parents=True, exist_ok=True)
    log = work / "measurements.jsonl"
    if options.fresh:
        log.unlink(missing_ok=True)
    bench = Bench(options, work, log)
    try:
        if not options.report_only:
            bench.measure()
    except KeyboardInterrupt:
        print("interrupted; what was measured is kept, the same command continues", flush=True)
    report.write(bench.records, bench.shapes, _HERE.parent / "results", options.name)


def _options() -> argparse.Namespace:
    shapes = ("r1-distill-qwen-1.5b", "v2-lite", "seamount-tiny")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [peer.name for peer in PEERS]
    parser.add_argument("--shapes", nargs="+", choices=shapes, default=shapes, metavar="SHAPE", help=", ".join(shapes))
    parser.add_argument("--peers", nargs="+", choices=names, metavar="PEER", help=", ".join(names))
    parser.add_argument("--rows", nargs="+", choices=[row.name for row in ROWS], help="default: all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=5, help="layers of v2-lite: 1 dense, the others experts (5)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--budget-s", type=float, default=float("inf"), help="begin no measurement after so many seconds"
    )
    parser.add_argument("--timeout-s", type=float, default=3600.0, help="longest wait for one answer (3600)")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "seamount" / "bench-peers")
    parser.add_argument("--run", default="default", help="name of the run that is continued or begun")
    parser.add_argument("--fresh", action="store_true", help="forget what this run has measured")
    parser.add_argument("--retry-failed", action="store_true", help="try again what failed earlier in this run")
    parser.add_argument("--report-only", action="store_true", help="measure nothing, write the report")
    parser.add_argument("--name", help="of the result's files; default: date and machine")
    return parser.parse_args()


class Bench:
    """One run: what is ready, what was measured, and the loop over rounds, shapes, rows and peers."""

    def __init__(self, options: argparse.Namespace, work: Path, log: Path) -> None:
        self._options, self._work, self._log = options, work, log
        self.records = [json.loads(line) for line in log.read_text("utf-8").splitlines()] if log.exists() else []
        self.shapes = [self._shape(name) for name in options.shapes]
        self._environments: dict[str, Environment | InstallError] = {}
        self._llama_servers: dict[bool, str] = {}
        self._refused: dict[tuple[str, ...], ConversionError | RunnerError] = {}

    def measure(self) -> None:
        """Everything that is asked for and not measured yet."""
        if self._options.retry_failed:
            self.records = [record for record in self.records if "error" not in record]
        started, options = time.monotonic(), self._options
        chosen = [peer for peer in PEERS if (peer.name in options.peers if options.peers else peer.default)]
        rows = [row for row in ROWS if not options.rows or row.name in options.rows]
        self._note({"kind": "machine"} | report.machine(options.threads))
        self._prepare(chosen)
        with Fleet(self._work / "logs", options.timeout_s) as fleet:
            for turn in range(options.rounds):
                self._probe(turn)
                for shape in self.shapes:
                    for row in rows:
                        # Whoever comes first in a row may find another machine than the last: take turns at it.
                        for peer in chosen[turn % len(chosen) :] + chosen[: turn % len(chosen)]:
                            if peer.shapes and shape.name not in peer.shapes:
                                continue
                            if time.monotonic() - started > options.budget_s:
                                print("the time budget is spent; the same command continues", flush=True)
                                return
                            self._one(fleet, turn, shape, row, peer, rows)

    def _one(self, fleet: Fleet, turn: int, shape: Shape, row: Row, peer: Peer, rows: list[Row]) -> None:
        where = {"shape": shape.name, "row": row.name, "peer": peer.name}
        for record in self.records:
            if all(record.get(name) == value for name, value in where.items()) and (
                record.get("round") == turn or "error" in record
            ):
                return
        label = f"round {turn + 1} {shape.name} {row.name} {peer.name}"
        try:
            source = checkpoint(shape, self._options.cache)
            config = read_config(source)
            fitted = fit(row, config)
            runner = self._runner(fleet, shape, source, config, peer, fitted, [fit(other, config) for other in rows])
            try:
                times = self._times(runner, fitted, config["vocab_size"], f"{shape.name}/{row.name}/{turn}")
            except RunnerError:
                fleet.stop(runner)  # it may have ended, or still be at work: the next row starts a new one
                raise
        except (RunnerError, ConversionError, InstallError) as error:
            print(f"{label}: FAILED {type(error).__name__}: {str(error)[:300]}", flush=True)
            self._note({"kind": "row", **where, "round": turn, "error": f"{error}"})
            return
        facts = {"round": turn, "folder": str(source), "load_s": runner.load_s, "peak_bytes": fleet.note_peak(runner)}
        measured = where | facts | asdict(fitted) | times
        self._note({"kind": "row"} | measured)
        rates = report.rates(measured)
        print(f"{label}: prefill {rates['prefill']:.1f}, decode {rates['decode']:.1f} tokens/s", flush=True)

    def _runner(
        self,
        fleet: Fleet,
        shape: Shape,
        source: Path,
        config: dict[str, Any],
        peer: Peer,
        row: Row,
        rows: list[Row],
    ) -> Runner:
        environment = None
        if peer.environment is not None:
            environment = self._environments[peer.environment]
            if isinstance(environment, InstallError):
                raise environment
        shared = bool(row.shared_tokens)
        key = (shape.name, peer.name, "shared" if shared else "separate")
        for known in (key, (shape.name, peer.artifact)):
            if known in self._refused:
                raise self._refused[known]
        try:
            model = artifact(peer.artifact, shape, source, self._options.cache, environment)
        except ConversionError as error:
            self._refused[shape.name, peer.artifact] = error
            raise
        same = [other for other in rows if bool(other.shared_tokens) == shared]
        concurrency, longest = max(o.concurrency for o in same), max(o.total_tokens for o in same)
        cache = int(1.25 * concurrency * longest * cache_bytes_per_token(config))
        extra = dict(peer.extra)
        if peer.ours:
            extra["cache_bytes"] = str(max(cache, 2**28))
        elif peer.environment == "vllm":
            extra["cache_gib"] = str(max(1, -(-cache // 2**30)))
        elif peer.environment == "llamacpp":
            extra["server"] = self._server("kv_lora_rank" not in config) if extra.pop("build") == "native" else ""
        settings = {
            "model": str(model),
            "threads": self._options.threads,
            "max_concurrency": concurrency,
            "max_tokens": longest,
            "prefix_cache": shared,
            "extra": extra,
        }
        python = sys.executable if environment is None else str(environment.python)
        command = [python, str(_HERE / peer.runner), json.dumps(settings)]
        try:
            return fleet.get(key, command, self._environ(environment, peer), num_bytes(model) + cache + _BASE_BYTES)
        except RunnerError as error:
            self._refused[key] = error
            raise

    def _times(self, runner: Runner, row: Row, vocab_size: int, seed: str) -> dict[str, Any]:
        """Seconds for 1 and for 1 + N new tokens, after one warm-up per row and process."""
        timeout = self._options.timeout_s
        if row.name not in runner.warm:
            runner.ask({"prompts": warm_up(row, vocab_size, seed), "new_tokens": 4}, timeout)
            runner.warm.add(row.name)
        seconds: dict[str, Any] = {}
        others = 0.0
        for name, new_tokens in (("first_s", 1), ("all_s", 1 + row.new_tokens)):
            asked = prompts(row, vocab_size, f"{seed}/{name}")
            if row.shared_tokens:
                runner.ask({"prompts": seeding(row, asked, seed), "new_tokens": 1}, timeout)
            before, own_before = _busy_s(), runner.cpu_s()
            answer = runner.ask({"prompts": asked, "new_tokens": new_tokens}, timeout)
            others += _busy_s() - before - (runner.cpu_s() - own_before)
            if answer["tokens"] != [new_tokens] * len(asked):
                raise RunnerError(f"gave {answer['tokens']} new tokens where {new_tokens} each were asked for")
            seconds[name] = answer["seconds"]
        # How much of the machine somebody else had meanwhile: a reader's measure of the trust a number deserves.
        capacity_s = (os.cpu_count() or 1) * (seconds["first_s"] + seconds["all_s"])
        return seconds | {"others_share": round(max(0.0, others / capacity_s), 3)}

    def _shape(self, name: str) -> Shape:
        if (_EMBEDDED / name).is_dir():
            return Shape(name, None, folder=_EMBEDDED / name)
        if name == "v2-lite":
            return Shape(f"{name}-{self._options.layers}", name, layers=self._options.layers)
        return Shape(name, name)

    def _prepare(self, chosen: list[Peer]) -> None:
        for name in dict.fromkeys(peer.environment for peer in chosen if peer.environment):
            try:
                self._environments[name] = prepare(name, self._options.cache / "environments")
                self._note({"kind": "versions", "environment": name, "versions": self._environments[name].versions})
            except InstallError as error:
                print(f"{name} cannot be installed: {error}", flush=True)
                self._environments[name] = error

    def _server(self, amx: bool) -> str:
        """Path of the compiled llama-server; empty, after a message, where it cannot be compiled."""
        if amx not in self._llama_servers:
            environment = self._environments["llamacpp"]
            assert isinstance(environment, Environment)
            build = "compiled here, AMX" if amx else "compiled here, AVX-512 without AMX"
            try:
                self._llama_servers[amx] = str(native_server(environment, self._options.cache, amx=amx))
            except InstallError as error:
                print(f"llama.cpp cannot be compiled, the ready-made AVX2 build is measured: {error}", flush=True)
                self._llama_servers[amx], build = "", "ready-made, AVX2"
            self._note({"kind": "build", "for": "dense" if amx else "latent attention", "llamacpp": build})
        return self._llama_servers[amx]

    def _environ(self, environment: Environment | None, peer: Peer) -> dict[str, str]:
        environ = {
            "OMP_NUM_THREADS": str(self._options.threads),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        if peer.environment == "vllm" and environment is not None:
            environ["OMP_NUM_THREADS"] = ""  # it asks not to be told: it binds one thread to each core itself
            environ["VLLM_CACHE_ROOT"] = str(self._options.cache / "vllm")
            # vLLM's guide: it is fastest with Intel's OpenMP loaded first, and tcmalloc where there is one.
            libraries = [
                environment.python.parents[1] / "lib" / "libiomp5.so",
                *Path("/usr/lib").rglob("libtcmalloc*.so.4"),
            ]
            environ["LD_PRELOAD"] = ":".join(str(library) for library in libraries if library.exists())
        return environ

    def _probe(self, turn: int) -> None:
        command = [sys.executable, str(_HERE / "probe.py"), str(self._options.threads)]
        environ = os.environ | {"OMP_NUM_THREADS": str(self._options.threads)}
        measured = json.loads(subprocess.run(command, env=environ, stdout=subprocess.PIPE, check=True).stdout)
        self._note({"kind": "ceiling", "round": turn} | measured)

    def _note(self, record: dict[str, Any]) -> None:
        record["at"] = datetime.now(UTC).isoformat(timespec="seconds")
        self.records.append(record)
        with self._log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def _busy_s() -> float:
    """Processor seconds that the machine has not been idle, those taken by its host included."""
    times = psutil.cpu_times()
    return sum(times) - times.idle - times.iowait - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)


if __name__ == "__main__":
    main()
