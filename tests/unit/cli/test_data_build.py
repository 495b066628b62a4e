"""`seamount data build`: what it prints when it is done, while it works, and when it cannot."""

import json

import pytest

from seamount.cli import data_build
from seamount.cli.main import main


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    records = [{"text": f"A document about {number % 90}."} for number in range(100)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_person_gets_a_table_and_lines_of_progress(corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data_build, "_TOLD_EVERY_S", 0)
    assert main(["data", "build", str(corpus), "--output", str(tmp_path / "out"), "--duplicates", "drop"]) == 0
    shown = capsys.readouterr()
    for told in ("records     100", "examples    90", "duplicates  10 left out; report.jsonl names them"):
        assert told in shown.out
    for told in ("reading the files: 100%", "looking for duplicates: 100%", "making examples: 100%", "90 examples"):
        assert told in shown.err


def test_a_program_gets_the_manifest(corpus, tmp_path, capsys):
    words = ["data", "build", str(corpus), "--output", str(tmp_path / "out"), "--max-length", "8", "--json"]
    for _ in range(2):  # the second time there is nothing to do
        assert main(words) == 0
        manifest = json.loads(capsys.readouterr().out)
        assert manifest["counts"]["num_records"] == 100
        assert manifest["num_examples"] > 100


def test_the_rate_and_the_time_left_are_of_this_call(monkeypatch, capsys):
    """An earlier call did half of it."""
    from seamount.training.shards.build import Progress

    now = [0.0]
    monkeypatch.setattr(data_build.time, "monotonic", lambda: now[0])
    with data_build._Progress() as progress:
        progress(Progress("encoding", 500_000_000, 1_000_000_000, 10, 1000))
        now[0] = 100.0
        progress(Progress("encoding", 600_000_000, 1_000_000_000, 2000, 123_400_000))
    assert capsys.readouterr().err == "  making examples: 60%, 1.0 MB/s, 0:06:40 left, 2,000 examples, 123.4 M tokens\n"


def test_a_broken_record_is_named(corpus, tmp_path, capsys):
    corpus.write_text(corpus.read_text() + '{"text": 5}\n')
    assert main(["data", "build", str(corpus), "--output", str(tmp_path / "out")]) == 2
    assert f"{corpus}:101: text" in capsys.readouterr().err
