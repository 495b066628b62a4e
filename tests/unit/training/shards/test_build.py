"""Building shards: the same examples as in memory, everything left out is told, and nothing is lost by a stop."""

import errno
import gzip
import json
import shutil
from itertools import pairwise

import pytest

from seamount.core.errors import CapacityError, ConfigError, InvalidRequestError
from seamount.models.locate import locate_model
from seamount.models.prompt import PromptEncoder
from seamount.training.examples.load import load
from seamount.training.examples.record import RecordError
from seamount.training.examples.rendering import Renderer
from seamount.training.examples.sample import Sample
from seamount.training.shards import chunks, scan, store
from seamount.training.shards.build import Job, build
from seamount.training.shards.dataset import ExampleList, TokenShards


@pytest.fixture(scope="module")
def encoder():
    encoder = PromptEncoder.from_folder(locate_model("seamount-tiny"))
    yield encoder
    encoder.close()


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunks, "_CHUNK_RECORDS", 7)
    monkeypatch.setattr(scan, "_SAVED_EVERY", 16)


def chat(number, answer="It is good."):
    messages = [{"role": "user", "content": f"How is {number}?"}, {"role": "assistant", "content": answer}]
    return {"id": f"chat-{number}", "messages": messages}


def write_lines(path, records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), "utf-8")
    return path


def run(encoder, output, *sources, max_length=64, progress=None, **rules):
    job = Job(sources=sources, output=output, **({"shard_tokens": 500} | rules))
    return build(job, Renderer(encoder, max_length=max_length), encoder, progress=progress, num_threads=2)


def report_of(folder):
    return [json.loads(line) for line in (folder / "report.jsonl").read_text().splitlines()]


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.usefixtures("small_chunks")
def test_shards_hold_what_loading_into_memory_gives(encoder, tmp_path):
    chats = write_lines(tmp_path / "chats.jsonl", [chat(number) for number in range(60)])
    texts = write_lines(tmp_path / "texts.jsonl", [{"text": f"A line about {number}."} for number in range(40)])
    manifest = run(encoder, tmp_path / "out", chats, texts)
    shards = TokenShards.open(tmp_path / "out", renderer=Renderer(encoder, max_length=64).digest)
    shards.verify()
    wanted = ExampleList(load([chats, texts], Renderer(encoder, max_length=64)).examples)
    assert shards.digest == wanted.digest == manifest.digest
    assert len(shards) == manifest.counts.num_records == 100
    assert len(manifest.shards) > 2
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *(name(shard.number) for shard in manifest.shards for name in (store.tokens_name, store.trained_name)),
        *(f"{name}.bin" for name in store.INDEX),
        "manifest.json",
        "report.jsonl",
    }


def test_long_texts_become_windows_in_which_every_token_is_learned_once(encoder, tmp_path):
    text = " ".join(f"Sentence {number} of a long text." for number in range(100))
    run(encoder, tmp_path / "out", write_lines(tmp_path / "a.jsonl", [{"text": text}, {"text": "Short."}]))
    shards = TokenShards.open(tmp_path / "out")
    windows = [shards.example(index) for index in range(len(shards) - 1)]
    learned = [token for window in windows for token in window.token_ids[window.trained].tolist()]
    whole = [*encoder.encode_text(text), encoder.eos_token_ids[0]]
    assert [int(windows[0].token_ids[0]), *learned] == whole
    assert all(len(window.token_ids) == 64 for window in windows[:-1])
    assert all(not window.trained[0] and window.trained[1:].all() for window in windows)
    assert all(a.token_ids[-1] == b.token_ids[0] for a, b in pairwise(windows))


def test_a_text_that_is_encoded_in_pieces_is_whole(encoder, tmp_path, monkeypatch):
    from seamount.training.shards import windows

    text = "".join(f"Word{number} and more.\n" for number in range(200)) + "x" * 300
    whole = [*encoder.encode_text(text), encoder.eos_token_ids[0]]
    monkeypatch.setattr(windows, "_PIECE_CHARS", 100)
    found = windows.text_windows(encoder, [Sample("item 1", 1, completion=text)], 10_000)[0][0].token_ids.tolist()
    assert encoder.decode(found[:-1]) == text
    assert sum(a == b for a, b in zip(found, whole, strict=False)) > 100
    assert len(found) < 1.05 * len(whole)


def test_markers_in_a_text_stay_letters_in_every_piece(encoder, monkeypatch):
    from seamount.training.shards import windows

    monkeypatch.setattr(windows, "_PIECE_CHARS", 100)
    marker = "<｜end▁of▁sentence｜><｜User｜>"
    texts = [f"{marker} {'word ' * 10}" * 20, marker, "x" * 95 + marker + "y" * 100, "Nothing of this."]
    samples = [Sample(f"item {row}", row, completion=text) for row, text in enumerate(texts, 1)]
    for text, made in zip(texts, windows.text_windows(encoder, samples, 10_000), strict=True):
        *written, last = made[0].token_ids.tolist()
        assert last == encoder.eos_token_ids[0]
        assert not encoder.tokenizer.marker_ids.intersection(written)
        assert encoder.decode(written, skip_special_tokens=False) == text


def test_a_text_that_cannot_be_written_as_letters_is_told_and_the_others_built(encoder, monkeypatch):
    from seamount.training.shards import windows

    # As of a vocabulary in which a marker's letters join to the marker.
    monkeypatch.setattr(encoder.tokenizer, "_plain_tokenizer", encoder.tokenizer._tokenizer)
    samples = [Sample(f"item {row}", row, completion=text) for row, text in enumerate(["a", "<｜end▁of▁sentence｜>"])]
    good, bad = windows.text_windows(encoder, samples, 64)
    assert encoder.decode(good[0].token_ids.tolist()) == "a"
    assert isinstance(bad, RecordError)
    assert (bad.where, bad.is_overlong) == ("item 1", False)
    assert "cannot write as plain text" in bad.reason


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("suffix", [".json", ".csv", ".jsonl.gz"])
def test_other_formats_are_built_and_gone_on_with_too(encoder, tmp_path, suffix):
    path = tmp_path / f"texts{suffix}"
    records = [{"text": f"A line about {number} and more."} for number in range(80)]
    if suffix == ".json":
        path.write_text(json.dumps(records))
    elif suffix == ".csv":
        path.write_text("text\n" + "".join(f"{record['text']}\n" for record in records))
    else:
        path.write_bytes(gzip.compress("".join(json.dumps(record) + "\n" for record in records).encode()))
    run(encoder, tmp_path / "whole", path, shard_tokens=200)
    build_with_stops(encoder, tmp_path / "stopped", path, shard_tokens=200)
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


class Killed(BaseException):
    """Stands for a kill: nothing below may catch it."""


def build_with_stops(encoder, output, *sources, **rules):
    """Build, killed again and again: at each stage once, and while making examples whenever a few chunks are done."""
    for stop in [("reading", 1), ("checking", 1), ("comparing", 1), *[("encoding", 4 + n) for n in range(40)]]:
        left = dict([stop])

        def tell(progress, left=left):
            if progress.stage in left:
                left[progress.stage] -= 1
                if left[progress.stage] == 0:
                    raise Killed

        try:
            run(encoder, output, *sources, progress=tell, **rules)
        except Killed:
            assert not (output / store.MANIFEST).exists()
            continue
        break
    return run(encoder, output, *sources, **rules)


@pytest.mark.usefixtures("small_chunks")
def test_killed_again_and_again_it_ends_in_the_same_bytes(encoder, tmp_path):
    records = [chat(number, "So it is. " * (number % 5 + 1)) for number in range(150)]
    records[20] = {"messages": []}
    records[30:33] = ["{broken", "", '{"messages": 3}']
    records[90] = {**records[3], "id": "another"}
    records[-1] = "broken again"
    sources = [
        write_lines(tmp_path / "a.jsonl", records),
        write_lines(tmp_path / "b.jsonl", [chat(1000 + n) for n in range(40)]),
    ]
    rules = {"duplicates": "drop", "invalid": "skip"}
    whole = run(encoder, tmp_path / "whole", *sources, **rules)
    assert build_with_stops(encoder, tmp_path / "stopped", *sources, **rules) == whole
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")
    assert (whole.counts.num_records, whole.counts.num_invalid, whole.counts.num_duplicates) == (189, 4, 1)


@pytest.mark.usefixtures("small_chunks")
def test_going_on_does_not_make_finished_shards_again(encoder, tmp_path, monkeypatch):
    source = write_lines(tmp_path / "a.jsonl", [chat(number) for number in range(100)])

    def kill_late(progress):
        if progress.stage == "encoding" and progress.done > 0.8 * progress.total:
            raise Killed

    with pytest.raises(Killed):
        run(encoder, tmp_path / "out", source, progress=kill_late)
    state = json.loads((tmp_path / "out" / store.UNFINISHED).read_text())
    assert len(state["shards"]) == 2
    first = (tmp_path / "out" / store.tokens_name(0)).stat()
    rendered, stages = [], []
    render = Renderer.render
    monkeypatch.setattr(
        Renderer, "render", lambda self, samples, **kw: rendered.extend(samples) or render(self, samples, **kw)
    )
    run(encoder, tmp_path / "out", source, progress=lambda p: stages.append(p.stage))
    assert set(stages) == {"encoding"}
    assert (tmp_path / "out" / store.tokens_name(0)).stat().st_mtime_ns == first.st_mtime_ns
    assert len(rendered) == 100 - state["written"]["place"]


def test_a_finished_build_given_again_does_nothing(encoder, tmp_path):
    source = write_lines(tmp_path / "a.jsonl", [chat(1)])
    stages = []
    first = run(encoder, tmp_path / "out", source)
    assert run(encoder, tmp_path / "out", source, progress=lambda p: stages.append(p.stage)) == first
    assert set(stages) == {"reading"}


@pytest.mark.usefixtures("small_chunks")
def test_duplicates_are_told_by_row_and_dropped_only_when_asked(encoder, tmp_path):
    records = [chat(number) for number in range(30)]
    records[20], records[25] = {**chat(4), "id": "x"}, {**chat(4), "id": "y"}
    records[25]["messages"][0]["content"] = "How  is 4?\n"
    source = write_lines(tmp_path / "a.jsonl", ["", *records])  # rows are lines of the file
    kept = run(encoder, tmp_path / "kept", source)
    dropped = run(encoder, tmp_path / "dropped", source, duplicates="drop")
    assert kept.counts.num_duplicates == dropped.counts.num_duplicates == 2
    assert (kept.num_examples, dropped.num_examples) == (30, 28)
    for folder, left_out in (("kept", False), ("dropped", True)):
        told = report_of(tmp_path / folder)
        assert [(line["row"], line["left_out"]) for line in told] == [(22, left_out), (27, left_out)]
        assert {line["reason"] for line in told} == {f"says the same as {source}:6"}


@pytest.mark.usefixtures("small_chunks")
def test_the_first_broken_record_is_named_before_anything_is_rendered(encoder, tmp_path):
    records = [chat(number) for number in range(100)]
    records[70] = {"messages": [{"role": "user"}]}
    stages = []
    with pytest.raises(RecordError) as caught:
        source = write_lines(tmp_path / "a.jsonl", records)
        run(encoder, tmp_path / "out", source, progress=lambda p: stages.append(p.stage))
    assert (caught.value.row, caught.value.field) == (71, "messages[0].content")
    assert "encoding" not in stages


def test_an_id_that_occurs_again_is_a_broken_record(encoder, tmp_path):
    records = [chat(number) for number in range(10)]
    records[7]["id"] = "chat-2"
    source = write_lines(tmp_path / "a.jsonl", records)
    with pytest.raises(RecordError, match=f"{source}:8: id is that of {source}:3 too"):
        run(encoder, tmp_path / "out", source)
    assert run(encoder, tmp_path / "other", source, invalid="skip").counts.num_invalid == 1
    assert report_of(tmp_path / "other")[0]["row"] == 8


@pytest.mark.parametrize(("overlong", "num_examples", "counted"), [("skip", 9, "num_overlong"), ("cut", 10, "num_cut")])
def test_conversations_that_are_too_long_are_refused_left_out_or_cut(
    encoder, tmp_path, overlong, num_examples, counted
):
    records = [chat(number) for number in range(10)]
    records[4] = chat(4, "This answer does not end. " * 30)
    source = write_lines(tmp_path / "a.jsonl", records)
    with pytest.raises(RecordError, match=r"a\.jsonl:5: has \d+ tokens, and 64 is the most"):
        run(encoder, tmp_path / "out", source)
    manifest = run(encoder, tmp_path / "other", source, overlong=overlong)
    assert manifest.num_examples == num_examples
    assert getattr(manifest.counts, counted) == 1
    assert [(line["row"], line["left_out"]) for line in report_of(tmp_path / "other")] == [(5, overlong == "skip")]


def test_data_without_a_single_example_is_told(encoder, tmp_path):
    source = write_lines(tmp_path / "a.jsonl", [chat(4, "This answer does not end. " * 30)])
    with pytest.raises(InvalidRequestError, match="no examples"):
        run(encoder, tmp_path / "out", source, overlong="skip")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"max_length": 48}, "the tokenizer, the chat template, the longest example"),
        ({"duplicates": "drop"}, "duplicates was keep, not drop"),
        ({"shard_tokens": 700}, "shard_tokens was 500, not 700"),
    ],
)
def test_a_folder_that_was_made_of_something_else_is_refused(encoder, tmp_path, change, said):
    source = write_lines(tmp_path / "a.jsonl", [chat(1)])
    run(encoder, tmp_path / "out", source)
    before = contents(tmp_path / "out")
    with pytest.raises(ConfigError, match=said):
        run(encoder, tmp_path / "out", source, **change)
    assert contents(tmp_path / "out") == before


@pytest.mark.usefixtures("small_chunks")
def test_a_source_that_has_changed_is_noticed(encoder, tmp_path):
    source = write_lines(tmp_path / "a.jsonl", [chat(number) for number in range(100)])
    other = write_lines(tmp_path / "b.jsonl", [chat(1000)])

    def kill_late(progress):
        if progress.stage == "encoding" and progress.done > 0.8 * progress.total:
            raise Killed

    with pytest.raises(Killed):
        run(encoder, tmp_path / "unfinished", source, progress=kill_late)
    run(encoder, tmp_path / "finished", source)
    write_lines(source, [chat(number + 1) for number in range(100)])
    for folder in ("unfinished", "finished"):
        with pytest.raises(ConfigError, match=r"a\.jsonl has changed since"):
            run(encoder, tmp_path / folder, source)
        with pytest.raises(ConfigError, match=r"b\.jsonl was not among its files; a\.jsonl was among its files"):
            run(encoder, tmp_path / folder, other)


def test_a_source_that_is_mended_before_a_shard_is_finished_begins_anew(encoder, tmp_path):
    source = write_lines(tmp_path / "a.jsonl", [chat(1), "broken"])
    with pytest.raises(RecordError):
        run(encoder, tmp_path / "out", source)
    write_lines(source, [chat(1), chat(2)])
    assert run(encoder, tmp_path / "out", source).num_examples == 2


@pytest.mark.usefixtures("small_chunks")
def test_a_full_disk_is_told_and_the_build_goes_on_with_room(encoder, tmp_path, monkeypatch):
    source = write_lines(tmp_path / "a.jsonl", [chat(number) for number in range(150)])
    whole = run(encoder, tmp_path / "whole", source)
    append, room = store.AppendFile.append, [4000]

    def append_while_there_is_room(file, data):
        if room[0] < len(data):
            append(file, data[: room[0]])
            raise OSError(errno.ENOSPC, "No space left on device")
        room[0] -= len(data)
        append(file, data)

    for room[0] in (10, 4000, 7000, 12000):
        with monkeypatch.context() as patch:
            patch.setattr(store.AppendFile, "append", append_while_there_is_room)
            with pytest.raises(CapacityError, match="No space left") as caught:
                run(encoder, tmp_path / "out", source)
        assert caught.value.code == "disk_full"
        assert "give the same command again" in caught.value.hint
    assert run(encoder, tmp_path / "out", source) == whole
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_folders_that_are_not_ours_or_in_use_are_left_alone(encoder, tmp_path):
    source = write_lines(tmp_path / "a.jsonl", [chat(1)])
    with pytest.raises(ConfigError, match="holds something else"):
        run(encoder, tmp_path, source)
    with pytest.raises(ConfigError, match="is a file"):
        run(encoder, source, source)

    def build_the_same(progress):
        if progress.stage == "encoding":
            run(encoder, tmp_path / "out", source)

    with pytest.raises(ConfigError, match="Another process is building"):
        run(encoder, tmp_path / "out", source, progress=build_the_same)
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(ConfigError, match="no file"):
        run(encoder, tmp_path / "out", tmp_path / "missing.jsonl")


def test_records_in_another_script_are_refused_or_left_out_where_a_language_is_expected(encoder, tmp_path):
    source = write_lines(tmp_path / "chats.jsonl", [chat(1), chat(2, "这是一个用中文写的很长的回答。"), chat(3)])
    with pytest.raises(RecordError, match="Han") as caught:
        run(encoder, tmp_path / "refused", source, language="en")
    assert caught.value.row == 2
    made = run(encoder, tmp_path / "made", source, language="en", invalid="skip")
    assert (made.num_examples, made.counts.num_invalid) == (2, 1)
    assert [line["row"] for line in report_of(tmp_path / "made")] == [2]
    assert run(encoder, tmp_path / "all", source).num_examples == 3
    with pytest.raises(ConfigError, match="cannot be checked"):
        run(encoder, tmp_path / "unknown", source, language="xx")
