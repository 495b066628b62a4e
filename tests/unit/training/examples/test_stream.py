"""Sources become examples in order; nothing is left out without being counted or named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from seamount.core.errors import ConfigError
from seamount.models.prompt import PromptEncoder
from seamount.training.examples import check as checking
from seamount.training.examples.check import check
from seamount.training.examples.load import load
from seamount.training.examples.record import RecordError
from seamount.training.examples.rendering import Renderer
from seamount.training.examples.stream import ExampleStream


def chat(number: int, **more: Any) -> dict[str, Any]:
    turns = [("user", f"question {number}"), ("assistant", f"answer {number}")]
    return {"messages": [{"role": role, "content": text} for role, text in turns], **more}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_examples_keep_the_order_of_their_records(tiny: PromptEncoder, tiny_renderer: Renderer, tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", [chat(n) for n in range(300)])
    loaded = load([path, path], tiny_renderer)
    texts = [tiny.decode(example.token_ids.tolist()) for example in loaded.examples]
    assert [text.rpartition(" ")[2] for text in texts] == [str(n) for n in [*range(300), *range(300)]]
    assert (loaded.counts.num_records, loaded.counts.num_examples, loaded.num_overlong) == (600, 600, 0)


def test_each_file_has_a_format_of_its_own(tiny_renderer: Renderer, tmp_path: Path) -> None:
    one = write(tmp_path / "a.jsonl", [chat(1)])
    two = write(tmp_path / "b.jsonl", [{"text": "plain text"}])
    stream = ExampleStream([one, two], tiny_renderer)
    assert len(list(stream)) == 2
    assert stream.formats == {str(one): "messages", str(two): "text"}


def test_bad_records_come_in_their_place(tiny_renderer: Renderer, tmp_path: Path) -> None:
    rows = [chat(1), "{broken", chat(2), {"messages": []}, {"messages": [{"role": "user", "content": "x"}]}, chat(3)]
    stream = ExampleStream(write(tmp_path / "d.jsonl", rows), tiny_renderer)
    items = list(stream)
    assert [isinstance(item, RecordError) for item in items] == [False, True, False, True, True, False]
    assert [item.row if isinstance(item, RecordError) else item[0].row for item in items] == [1, 2, 3, 4, 5, 6]
    assert (stream.counts.num_records, stream.counts.num_bad, stream.counts.num_examples) == (6, 3, 3)


def test_loading_refuses_bad_data_or_tells_of_it(tiny_renderer: Renderer) -> None:
    rows = [chat(1), {"messages": 5}, chat(2), {"messages": 6}]
    with pytest.raises(RecordError, match=r"item 2: messages is no list") as caught:
        load(rows, tiny_renderer)
    assert "1 more is bad" in str(caught.value.hint)
    told: list[RecordError] = []
    assert len(load(rows, tiny_renderer, on_bad=told.append).examples) == 2
    assert [error.row for error in told] == [2, 4]
    with pytest.raises(RecordError, match="no examples"):
        load(rows[1:2], tiny_renderer, on_bad=told.append)


def test_over_long_records_are_errors_skipped_or_cut(tiny: PromptEncoder) -> None:
    renderer = Renderer(tiny, max_length=30)
    long = chat(2)
    long["messages"][1]["content"] = "many words " * 40
    with pytest.raises(RecordError, match="and 30 is the most"):
        load([chat(1), long], renderer)
    skipped = load([chat(1), long], renderer, overlong="skip")
    assert (len(skipped.examples), skipped.counts.num_skipped, skipped.num_overlong) == (1, 1, 1)
    cut = load([chat(1), long], renderer, overlong="cut")
    assert [len(example.token_ids) <= 30 for example in cut.examples] == [True, True]
    assert (cut.counts.num_cut, cut.counts.num_bad) == (1, 0)
    long["messages"][0]["content"] = "many words " * 40
    with pytest.raises(RecordError, match="nothing to learn within its first 30"):
        load([chat(1), long], renderer, overlong="cut")


def test_ids_that_occur_again_are_bad(tiny_renderer: Renderer, tmp_path: Path) -> None:
    one = write(tmp_path / "a.jsonl", [chat(1, id="x"), chat(2, id="y"), chat(3, id="x")])
    two = write(tmp_path / "b.jsonl", [chat(4, id="y"), chat(5), chat(6)])
    bad = [item for item in ExampleStream([one, two], tiny_renderer) if isinstance(item, RecordError)]
    assert [(error.where, error.field) for error in bad] == [(f"{one}:3", "id"), (f"{two}:1", "id")]
    assert bad[0].reason == f"is that of row 1 of {one} too"
    assert bad[1].reason == f"is that of row 2 of {one} too"


def test_an_expected_language(tiny_renderer: Renderer) -> None:
    chinese = chat(1)
    chinese["messages"][1]["content"] = "今天的天气很好，我们去公园散步吧。"
    english = chat(2)
    english["messages"][1]["content"] = "The weather is fine today, so let us walk in the park."
    for language, wrong in (("en", [1]), ("zh", [2]), (None, [])):
        items = ExampleStream([chinese, english], tiny_renderer, language=language)
        bad = [item for item in items if isinstance(item, RecordError)]
        assert [error.row for error in bad] == wrong
    with pytest.raises(ConfigError, match="'xx' cannot be checked"):
        ExampleStream([], tiny_renderer, language="xx")


@pytest.mark.parametrize(
    ("rows", "reasons"),
    [
        ([], ["holds no records"]),
        (["{"], ["is not JSON"]),
        ([{"a": 1}], ["no known format"]),
        (["{", {"a": 1}], ["is not JSON", "no known format"]),
        ([{"chosen": "a", "rejected": "b"}], ["preference"]),
    ],
)
def test_files_of_no_use_are_told_once(
    tiny_renderer: Renderer, tmp_path: Path, rows: list[Any], reasons: list[str]
) -> None:
    items = list(ExampleStream(write(tmp_path / "d.jsonl", rows), tiny_renderer))
    assert len(items) == len(reasons)
    for item, reason in zip(items, reasons, strict=True):
        assert isinstance(item, RecordError)
        assert reason in item.reason


def test_the_report_counts_everything(tiny_renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "KEPT_ERRORS", 2)
    monkeypatch.setattr(checking, "_PROGRESS_EVERY", 1)
    told: list[int] = []
    rows = [chat(1), chat(1), chat(2), *[{"messages": 5}] * 3]
    report = check(rows, tiny_renderer, progress=told.append)
    assert not report.is_good
    assert (report.counts.num_records, report.counts.num_bad, report.num_duplicates) == (6, 3, 1)
    assert [error.row for error in report.bad] == [4, 5]
    assert told == [1, 2, 3, 4, 5, 6]
    assert report.lengths.tolist() == [report.length_at(1)] * 3
    assert report.num_tokens == 3 * report.length_at(0.5)
    assert 0 < report.num_trained < report.num_tokens
    assert dict(report.rows())["bad"] == "3"
    fields = json.loads(report.to_json())
    assert fields["num_bad"] == 3
    assert fields["bad"][0] == {
        "where": "item 4",
        "row": 4,
        "field": "messages",
        "reason": "is no list but a number",
        "hint": None,
    }
    assert check([chat(1)], tiny_renderer).is_good
