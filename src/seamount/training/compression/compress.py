"""Quantizes a checkpoint folder into another one, layer by layer: `quantize`.

Called by the command `seamount quantize`. Only one layer is in memory; what enters the next one lies on disk, as do the
finished shards, so that a stopped job goes on where it was. Rounding itself is in `search`, what happens to
a layer in `layer`.
"""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from seamount.core.errors import CapacityError, ConfigError, OutOfMemoryError
from seamount.core.sizes import size_text
from seamount.kernels import rms_norm
from seamount.models.keymap import expert_placements, layer_experts, layer_placements, outer_placements
from seamount.models.memory import available_bytes
from seamount.models.prompt import PromptEncoder

from .calibration import read_samples
from .files import Activations, Entry, ShardWriter
from .layer import Flow, LayerQuantizer, chunks
from .plan import (
    CHUNK_TOKENS,
    Format,
    Method,
    Source,
    choose_format,
    kept_modules,
    layer_entries,
    outer_entries,
    output_bytes,
    peak_bytes,
)
from .work import Mark, WorkFolder, bytes_on_disk, check_output, job_digest, partial_of, sha256

_EMBEDDING = "model.embed_tokens.weight"
_STRIP_ROWS = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What to quantize, and how.

    Attributes:
        folder: of the checkpoint, in 16 or 32 bits or FP8 blocks.
        output: folder to be made.
        method: "awq" searches scales and clips by calibration; "rtn" rounds to nearest.
        bits: 4 or 8.
        group_size: of 4 bits: weights that share a scale; None: 128, or the largest smaller power of two that divides
            the rows of all matrices.
        calibration: a text file; optional for "rtn", which only measures its error with it.
        num_samples, sample_tokens: limits of what is read of it.
    """

    folder: Path
    output: Path
    method: Method
    bits: int
    group_size: int | None = None
    calibration: Path | None = None
    num_samples: int = 128
    sample_tokens: int = 512


@dataclasses.dataclass(frozen=True)
class Costs:
    """What a job takes: told before it starts.

    Attributes:
        memory_bytes: about the most that the process holds.
        disk_bytes: free space that is still needed.
        group_size: None for 8 bits.
        num_tokens: of calibration.
        num_done, num_layers: layers that an earlier run finished, of all.
    """

    memory_bytes: int
    disk_bytes: int
    group_size: int | None
    num_tokens: int
    num_done: int
    num_layers: int


@dataclasses.dataclass(frozen=True)
class Report:
    """What a job made.

    Attributes:
        bits_per_weight: of all weights stored, those left in 16 bits included.
        bytes_before, bytes_after: of the weight files' tensors.
        relative_errors: per layer, see `LayerResult`.
        num_plain_experts: experts that saw too few tokens, over all layers.
        seconds: of all layers, those of earlier runs included.
    """

    method: str
    bits: int
    group_size: int | None
    num_tokens: int
    bits_per_weight: float
    bytes_before: int
    bytes_after: int
    relative_errors: list[float | None]
    num_plain_experts: int
    seconds: float


# Told layers done, layers in all, and the share of the work that is done.
Progress = Callable[[int, int, float], None]


def quantize(job: Job, *, on_start: Callable[[Costs], None] | None = None, progress: Progress | None = None) -> Report:
    """Make the quantized folder, or go on making it.

    Raises:
        ConfigError: an argument, the checkpoint or the calibration file is wrong; or what stands at the output is
            another job's.
        CapacityError: disk or memory do not suffice.
    """
    if job.method == "awq" and job.calibration is None:
        raise ConfigError(
            "The method awq learns from text which weights matter, and no calibration file is given.",
            hint="Give one, or use the method rtn.",
        )
    job = dataclasses.replace(job, output=job.output.expanduser().resolve())
    if job.output.is_relative_to(job.folder.resolve()):
        raise ConfigError(
            f"{job.output} is inside the checkpoint that is read.", hint="Choose an output beside it, or elsewhere."
        )
    check_output(job.output)
    source = Source(job.folder)
    form = choose_format(source, job.bits, job.group_size)
    run = _Run(job, source, form, _read_calibration(job, shortest=2 + source.config.num_mtp_layers))
    arguments = {name: getattr(job, name) for name in ("method", "bits", "num_samples", "sample_tokens")}
    digest = job_digest(source, {**arguments, "group_size": form.group_size}, job.calibration)
    run.check(on_start)
    try:
        with WorkFolder(job.output, digest, source.num_layers + 1) as work:
            return run.finish(work, progress)
    except OSError as cause:
        partial = partial_of(job.output)
        begun = bytes_on_disk(partial) > 0
        raise CapacityError(
            f"{partial} cannot be written: {cause.strerror}.",
            hint="Mend that, then give the same command again: it goes on."
            if begun
            else "Nothing was begun. Choose an output in a folder that can be written.",
        ) from cause


def _read_calibration(job: Job, *, shortest: int) -> list[list[int]]:
    if job.calibration is None:
        return []
    encoder = PromptEncoder.from_folder(job.folder)
    try:
        samples = read_samples(
            job.calibration, encoder, num_samples=job.num_samples, sample_tokens=job.sample_tokens, shortest=shortest
        )
    finally:
        encoder.close()
    if job.method == "awq":
        return samples
    # Rounding to nearest learns nothing; its error is measured on the first chunk alone.
    return samples[: len(chunks([len(sample) for sample in samples])[0].starts) - 1]


class _Run:
    """One job under way."""

    def __init__(self, job: Job, source: Source, form: Format, samples: list[list[int]]) -> None:
        self._job, self._source, self._form, self._samples = job, source, form, samples
        self._num_tokens = sum(map(len, samples))
        self._shards = [layer_entries(source, index, form, job.method) for index in range(source.num_layers)]
        self._shards.append(outer_entries(source))
        self._units = [self._units_of(index) for index in range(source.num_layers)]

    def check(self, on_start: Callable[[Costs], None] | None) -> None:
        """Raise if memory or disk do not suffice; else tell what will be taken."""
        partial = partial_of(self._job.output)
        row_bytes = 4 * self._source.config.hidden_size
        # What enters, lies within and leaves a layer; and embeddings again, for multi-token prediction.
        activations = (3 + (self._source.config.num_mtp_layers > 0)) * self._num_tokens * row_bytes
        needed = output_bytes(self._source, self._form, self._job.method) + activations
        costs = Costs(
            memory_bytes=peak_bytes(self._source, self._job.method, self._num_tokens),
            disk_bytes=max(needed - bytes_on_disk(partial), 0),
            group_size=self._form.group_size,
            num_tokens=self._num_tokens,
            num_done=len(list((partial / "work").glob("layer-*.json"))),
            num_layers=self._source.num_layers,
        )
        available = available_bytes(torch.device("cpu"))
        if costs.memory_bytes > available:
            raise OutOfMemoryError(
                f"One layer takes about {size_text(costs.memory_bytes)} of memory; "
                f"{size_text(available)} is available.",
                hint="The method rtn takes less, and so do fewer samples.",
            )
        parent = next(folder for folder in partial.absolute().parents if folder.exists())
        free = shutil.disk_usage(parent).free
        if costs.disk_bytes > free:
            raise CapacityError(
                f"{size_text(costs.disk_bytes)} of disk is needed at {parent}; {size_text(free)} is free.",
                hint="Free space, or choose an output on another disk.",
            )
        if on_start is not None:
            on_start(costs)

    def finish(self, work: WorkFolder, progress: Progress | None) -> Report:
        """Do all that is left to do."""
        num_layers = self._source.num_layers
        total = sum(self._units)
        work.check_shards()
        if not work.is_complete():
            for index in range(len(work.marks()), num_layers):
                done = sum(self._units[:index])

                def tell(units: int, index: int = index) -> None:
                    nonlocal done
                    done += units
                    if progress is not None:
                        progress(index, num_layers, done / total)

                tell(0)
                self._layer(work, index, tell)
            self._write_outer(work)
            kept = kept_modules(self._source, self._form)
            work.describe(self._source, self._form.described(kept), self._shards)
            facts = dataclasses.asdict(self._report(work.marks()))
            del facts["seconds"]  # the result is the same to the byte, however long it took
            work.write_report(facts)
        seconds = sum(mark.seconds for mark in work.marks())
        report = Report(**work.read_report(), seconds=seconds)
        work.finish()
        if progress is not None:
            progress(num_layers, num_layers, 1.0)
        return report

    def _layer(self, work: WorkFolder, index: int, tell: Callable[[int], None]) -> None:
        started = time.monotonic()
        flow = self._flow(work, index) if self._samples else None
        with ShardWriter(work.shard(index), self._shards[index]) as writer:
            quantizer = LayerQuantizer(self._source, index, self._form, self._job.method, writer, tell)
            result = quantizer.run(flow)
        if flow is not None:
            flow.leaving.flush()
        taken = time.monotonic() - started
        work.mark(index, Mark(result.relative_error, result.num_plain_experts, taken, sha256(work.shard(index))))

    def _flow(self, work: WorkFolder, index: int) -> Flow:
        """The activations of a layer; an MTP block of depth k sees each sequence without its last k tokens."""
        width, depth = self._source.config.hidden_size, index - self._source.config.num_layers + 1
        lengths = [len(sample) - max(depth, 0) for sample in self._samples]
        before = [len(sample) - max(depth - 1, 0) for sample in self._samples]

        def file(name: str, sizes: list[int]) -> Activations:
            return Activations(work.activations(name), sum(sizes), width)

        entering = file(str(index), before)
        if index == 0:
            self._embed([token for sample in self._samples for token in sample], entering.create())
        middle, leaving = file("middle", lengths).create(), file(str(index + 1), lengths).create()
        if depth <= 0:
            return Flow(lengths, entering, middle, leaving)
        told = file("told", lengths).create()
        self._embed([token for sample in self._samples for token in sample[depth:]], told)
        rows = torch.cat(
            [torch.arange(end - size, end - 1) for size, end in zip(before, itertools.accumulate(before), strict=True)]
        )
        norm = self._norm_before(index)

        def joined(chunk: slice) -> tuple[Tensor, Tensor]:
            hidden = entering.read(rows[chunk])
            return told.read(chunk), rms_norm(hidden, norm, self._source.config.norm_eps)

        return Flow(lengths, file("joined", lengths).create(), middle, leaving, joined)

    def _norm_before(self, index: int) -> Tensor:
        """The norm of the hidden states that an MTP block is given: the model's, or the previous block's."""
        previous = f"model.layers.{index - 1}.shared_head.norm.weight"
        name = "model.norm.weight" if index == self._source.config.num_layers else previous
        places = [*outer_placements(self._source.config), *layer_placements(self._source.config, index - 1)]
        return self._source.read(next(place for place in places if place.key == name))

    def _embed(self, token_ids: list[int], into: Activations) -> None:
        """Write the embeddings of tokens, reading the table strip by strip."""
        ids = torch.tensor(token_ids)
        for first in range(0, self._source.config.vocab_size, _STRIP_ROWS):
            rows = ((ids >= first) & (ids < first + _STRIP_ROWS)).nonzero().squeeze(1)
            if len(rows):
                count = min(_STRIP_ROWS, self._source.config.vocab_size - first)
                strip = self._source.read_rows(_EMBEDDING, first, count)
                for part in rows.split(CHUNK_TOKENS):
                    into.write(part, strip[ids[part] - first])

    def _write_outer(self, work: WorkFolder) -> None:
        with ShardWriter(work.shard(self._source.num_layers), self._shards[-1]) as writer:
            for stored in self._source.outer():
                writer.copy(stored)

    def _units_of(self, index: int) -> int:
        """Weights of a layer as its quantizer tells them: those of searched experts' gates and ups twice."""
        experts = layer_experts(self._source.config, index)
        own = sum(
            place.num_values for place in layer_placements(self._source.config, index) if self._form.rounds(place)
        )
        if experts is None:
            return own
        gate, up, down = (place.num_values for place in expert_placements(self._source.config, experts, index, 0))
        twice = gate + up if self._job.method == "awq" else 0
        return own + experts.num_experts * (gate + up + down + twice)

    def _report(self, marks: list[Mark]) -> Report:
        config = self._source.config
        places = [*outer_placements(config)]
        for index in range(self._source.num_layers):
            places += self._source.placements(index)
        num_weights = sum(place.num_values for place in places)
        bytes_after = sum(entry.num_bytes for entries in self._shards for entry in entries)
        copies = sum(entry.num_bytes for entry in self._copies())
        before = self._source.checkpoint.tensors.values()
        return Report(
            method=self._job.method,
            bits=self._job.bits,
            group_size=self._form.group_size,
            num_tokens=self._num_tokens,
            bits_per_weight=8 * (bytes_after - copies) / num_weights,
            bytes_before=sum(stored.num_bytes for stored in before),
            bytes_after=bytes_after,
            relative_errors=[mark.relative_error for mark in marks],
            num_plain_experts=sum(mark.num_plain_experts for mark in marks),
            seconds=sum(mark.seconds for mark in marks),
        )

    def _copies(self) -> list[Entry]:
        """Second copies of embedding and head, which are no weights of their own."""
        own = {place.key for place in outer_placements(self._source.config)}
        return [entry for entry in self._shards[-1] if entry.name not in own]
