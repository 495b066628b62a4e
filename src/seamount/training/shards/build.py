"""Makes token shards of data files, whatever their size: `build`.

Called by `seamount data build`. Records are read as a stream, rendered and encoded in threads, and written shard by
shard: memory does not grow with the data. A build that was killed, or that met a full disk, goes on with the shard that
was under way when it is given again, and ends in the same bytes: what goes into which shard depends on the sources and
the job alone.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from seamount.core.errors import CapacityError, InvalidRequestError
from seamount.models.prompt import PromptEncoder
from seamount.training.examples.reading import sources_of
from seamount.training.examples.rendering import Renderer
from seamount.training.shards import duplicates, scan, store
from seamount.training.shards.chunks import ChunkMaker, Rules, chunks
from seamount.training.shards.cursor import Position
from seamount.training.shards.folder import BuildFolder, State

REPORT = "report.jsonl"
_MOST_THREADS = 4
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Stage = Literal["reading", "checking", "comparing", "encoding"]


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be built.

    Attributes:
        sources: files of records, or folders of such.
        output: the folder to be made.
        overlong: of conversations longer than the renderer's `max_length`: an error, left out, or cut at the end.
            Plain text is not concerned: long documents become several examples.
        duplicates: of records that say what an earlier one says: kept, or left out; counted and reported in any case.
        invalid: of records that no example can be made of: an error, or left out and reported.
        language: what assistants' words should be in, such as `en` or `zh`, told by their script; others are invalid.
        shard_tokens: a shard ends when it has so many; as much work is lost at most when a build is killed.
    """

    sources: tuple[Path, ...]
    output: Path
    overlong: Literal["error", "skip", "cut"] = "error"
    duplicates: Literal["keep", "drop"] = "keep"
    invalid: Literal["error", "skip"] = "error"
    language: str | None = None
    shard_tokens: int = 2**24


@dataclass(frozen=True, slots=True)
class Progress:
    """How far one stage is, earlier calls included: in bytes of the sources, "comparing" in hundredths."""

    stage: Stage
    done: int
    total: int
    num_examples: int = 0
    num_tokens: int = 0


Tell = Callable[[Progress], None]


def build(
    job: Job,
    renderer: Renderer,
    encoder: PromptEncoder,
    *,
    progress: Tell | None = None,
    num_threads: int | None = None,
) -> store.Manifest:
    """Build, or go on building; where it is finished already, nothing is done.

    In `job.output`, beside the shards, `report.jsonl` has a line for each record that was left out or cut, and for each
    duplicate: file, row, and why.

    Args:
        encoder: the renderer's.
        progress: told how far it is, several times a second.
        num_threads: that render and encode, each with some 50 MB; None takes as many as there are processors to use,
            but four at most, as the tokenizer has threads of its own.

    Raises:
        ConfigError: a source cannot be read; the output holds something else, or what was made of other sources, with
            another tokenizer or by other rules; another process is building it.
        RecordError: a record is broken or over-long, and may not be left out.
        CapacityError: the disk is full ("disk_full"); with room, the same call goes on.
    """
    tell = progress or (lambda _: None)
    files = [part for part in sources_of(list(job.sources)) if isinstance(part, Path)]
    try:
        with BuildFolder(job.output) as folder:
            origin, stamps = _origin(job, files, folder.load(), renderer, encoder, tell)
            manifest = folder.finished(origin)
            if manifest is not None:
                return manifest
            work = _Build(job, files, folder, renderer, encoder, tell)
            state = work.check(folder.begin(origin, stamps))
            state = work.encode(state, num_threads or min(len(os.sched_getaffinity(0)), _MOST_THREADS))
            manifest = _manifest(state, encoder)
            folder.finish(manifest)
            return manifest
    except OSError as cause:
        if cause.errno not in _FULL:
            raise
        raise _not_written(cause, job.output) from cause


class _Build:
    """One call of `build`."""

    def __init__(
        self,
        job: Job,
        files: Sequence[Path],
        folder: BuildFolder,
        renderer: Renderer,
        encoder: PromptEncoder,
        tell: Tell,
    ) -> None:
        self._job, self._files, self._folder, self._tell = job, files, folder, tell
        self._renderer, self._encoder = renderer, encoder
        self._sizes = [path.stat().st_size for path in files]
        self._formats = scan.formats_of(files, job.language)

    def check(self, state: State) -> State:
        """Look through all records."""
        if not state.is_scanned:
            steps = scan.scan(
                self._files,
                self._formats,
                state.scanned,
                self._folder.work,
                skip_invalid=self._job.invalid == "skip",
            )
            for position, is_last in steps:
                counts = state.counts.model_copy(update={"num_records": position.place})
                state = state.model_copy(update={"scanned": position, "is_scanned": is_last, "counts": counts})
                self._folder.save(state)
                self._told("checking", position)
        return state

    def encode(self, state: State, num_threads: int) -> State:
        """Make examples of all records, and shards of these."""
        found, ids = (self._compare(name, start) for name, start in ((scan.KEYS, 0), (scan.IDS, 50)))
        rules = Rules(self._job.overlong, self._job.duplicates, self._job.invalid)
        counts, end = state.counts, state.written
        num_examples = sum(shard.num_examples for shard in state.shards)
        num_tokens = sum(shard.num_tokens for shard in state.shards)
        with (
            scan.Rows(self._folder.work, self._files) as rows,
            store.AppendFile(self._folder.path / REPORT, state.report_bytes) as report,
            store.ShardWriter(self._folder.path, store.token_type(self._encoder.vocab_size), state.shards) as writer,
        ):
            if len(ids) and rules.invalid == "error":
                raise rows.same_id(int(ids.places[0]), int(ids.first[0]))
            maker = ChunkMaker(rules, self._renderer, self._encoder, self._formats, found, ids, rows)
            for made in maker.run(chunks(self._files, state.written), num_threads):
                writer.write(made.examples)
                report.append(made.report)
                counts, end = counts.plus(made.counts), made.end
                num_examples += len(made.examples)
                num_tokens += sum(len(example.token_ids) for example in made.examples)
                self._told("encoding", end, num_examples, num_tokens)
                if writer.num_tokens >= self._job.shard_tokens:
                    state = self._end_shard(state, writer, report, counts, end)
            if writer.num_tokens:
                state = self._end_shard(state, writer, report, counts, end)
            report.sync()
        if not state.shards:
            raise InvalidRequestError("The data holds no examples.", hint="See `seamount data check FILE`.")
        return state.model_copy(update={"counts": counts})

    def _compare(self, name: str, start: int) -> duplicates.Duplicates:
        def told(share: float) -> None:
            self._tell(Progress("comparing", start + round(50 * share), 100))

        keys = self._folder.work / name
        kept = keys.with_suffix(".npy")
        if not kept.exists():
            duplicates.save(duplicates.find(keys, progress=told), kept)
        return duplicates.load(kept)

    def _end_shard(
        self,
        state: State,
        writer: store.ShardWriter,
        report: store.AppendFile,
        counts: store.Counts,
        written: Position,
    ) -> State:
        report.sync()
        shards = (*state.shards, writer.end_shard())
        new = {"shards": shards, "counts": counts, "written": written, "report_bytes": report.size}
        state = state.model_copy(update=new)
        self._folder.save(state)
        return state

    def _told(self, stage: Stage, position: Position, num_examples: int = 0, num_tokens: int = 0) -> None:
        done = sum(self._sizes[: position.source]) + position.offset
        self._tell(Progress(stage, done, sum(self._sizes), num_examples, num_tokens))


def _origin(
    job: Job,
    files: Sequence[Path],
    before: State | None,
    renderer: Renderer,
    encoder: PromptEncoder,
    tell: Tell,
) -> tuple[store.Origin, tuple[tuple[int, int], ...]]:
    """What will be built, and the stamps of its files; those that an earlier call identified are not read again."""
    facts = [path.stat() for path in files]
    stamps = tuple((fact.st_size, fact.st_mtime_ns) for fact in facts)
    names = [path.name for path in files]
    if before is not None and before.stamps == stamps and [s.name for s in before.origin.sources] == names:
        sources = before.origin.sources
    else:
        total = sum(fact.st_size for fact in facts)
        sources = scan.identify(files, lambda done: tell(Progress("reading", done, total)))
    origin = store.Origin(
        sources=sources,
        renderer=renderer.digest,
        vocab_size=encoder.vocab_size,
        overlong=job.overlong,
        duplicates=job.duplicates,
        invalid=job.invalid,
        language=job.language,
        shard_tokens=job.shard_tokens,
    )
    return origin, stamps


def _manifest(state: State, encoder: PromptEncoder) -> store.Manifest:
    return store.Manifest(
        num_examples=sum(shard.num_examples for shard in state.shards),
        num_tokens=sum(shard.num_tokens for shard in state.shards),
        num_trained=sum(shard.num_trained for shard in state.shards),
        counts=state.counts,
        token_type=store.token_type(encoder.vocab_size),
        digest=state.shards[-1].digest,
        origin=state.origin,
        shards=state.shards,
    )


def _not_written(cause: OSError, output: Path) -> CapacityError:
    return CapacityError(
        f"{output} cannot be written: {cause.strerror}.",
        hint="Finished shards are kept: make room, and give the same command again to go on.",
        code="disk_full",
    )
