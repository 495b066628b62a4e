"""The formats in which people keep training data, recognised by their fields: `recognise`, `Format.sample`.

Called by `stream`. A format says how a record becomes a `Sample`; every rule about its fields that does not depend on a
model is checked here, and a broken record names row, field and reason. Knows no template.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .messages import Turns, bad, plain_text
from .record import Record, RecordError
from .sample import Sample

__all__ = ["FORMATS", "Format", "RecordError", "recognise"]

PROBED_RECORDS = 32
# Fields that say what a record is for, and why that cannot be had.
_LATER = {
    "chosen": "a pair of answers (chosen, rejected), and preference tuning is not there yet",
    "rejected": "a pair of answers (chosen, rejected), and preference tuning is not there yet",
    "image": "images, and only text can be learned from",
    "images": "images, and only text can be learned from",
    "audio": "sound, and only text can be learned from",
    "audios": "sound, and only text can be learned from",
    "video": "videos, and only text can be learned from",
    "videos": "videos, and only text can be learned from",
    "input_ids": "token ids, and the text itself is needed to know which of them to learn",
}


@dataclass(frozen=True, slots=True)
class Format:
    """One way of writing records.

    Attributes:
        name: for people.
        needs: the fields by which it is recognised; of each group one must be there.
        shape: of a record, for people.
    """

    name: str
    needs: tuple[tuple[str, ...], ...]
    shape: str
    read: Callable[[Record], Sample]

    def fits(self, present: Iterable[str]) -> bool:
        """Whether a record with these fields is of this format."""
        return all(any(name in present for name in names) for names in self.needs)

    def sample(self, record: Record) -> Sample:
        """Return what a record says.

        Raises:
            RecordError: it is none of this format, or broken; names the field.
        """
        present = _present(record.value)
        for name, what in _LATER.items():
            if name in present:
                raise bad(record, name, f"holds {what}")
        for names in self.needs:
            if not any(name in present for name in names):
                raise bad(record, names[0], f"is missing, and the data is of the format {self.name}")
        return self.read(record)


def recognise(records: Iterable[Record]) -> Format:
    """Return the format of most of the first records.

    Raises:
        RecordError: none of them is of a known format, or they are of one that cannot be learned from yet.
    """
    votes: Counter[str] = Counter()
    first: Record | None = None
    for _, record in zip(range(PROBED_RECORDS), records, strict=False):
        first = first or record
        present = _present(record.value)
        for name, what in _LATER.items():
            if name in present:
                raise bad(record, name, f"holds {what}")
        found = next((known.name for known in FORMATS if known.fits(present)), None)
        if found is not None:
            votes[found] += 1
    if votes:
        name = votes.most_common(1)[0][0]
        return next(known for known in FORMATS if known.name == name)
    if first is None:
        raise RecordError("The data holds no records.")
    fields = ", ".join(sorted(map(repr, first.value))[:12]) or "none"
    known = "; ".join(known.shape for known in FORMATS)
    raise bad(first, "", f"is of no known format; its fields: {fields[:300]}", hint=f"Known are {known}.")


def _present(value: Mapping[str, Any]) -> set[str]:
    """Names of the fields that hold something; tables fill up what a row lacks with nothing."""
    return {
        name for name, held in value.items() if held is not None and not (isinstance(held, str | list) and not held)
    }


def _messages(record: Record) -> Sample:
    turns = Turns(record)
    turns.add_system("system")
    turns.add_messages("messages")
    return turns.sample(tools="tools")


def _conversations(record: Record) -> Sample:
    turns = Turns(record)
    turns.add_system("system")
    turns.add_messages("conversations" if record.value.get("conversations") is not None else "conversation")
    return turns.sample(tools="tools")


def _prompt_completion(record: Record) -> Sample:
    prompt, completion = record.value["prompt"], record.value["completion"]
    turns = Turns(record)
    if isinstance(prompt, str) and isinstance(completion, str):
        if record.value.get("system") is None:
            return turns.plain(plain_text(record, "prompt"), plain_text(record, "completion"))
        turns.add_system("system")
    if isinstance(prompt, str):
        turns.add("user", "prompt")
    else:
        turns.add_messages("prompt", loss=False)
    if isinstance(completion, str):
        turns.add("assistant", "completion")
    else:
        turns.add_messages("completion")
    return turns.sample(tools="tools")


def _alpaca(record: Record) -> Sample:
    turns = Turns(record)
    turns.add_system("system")
    turns.add_history("history")
    asked = [plain_text(record, name, may_be_empty=True) for name in ("instruction", "input")]
    turns.add("user", "instruction", content="\n".join(text for text in asked if text.strip()))
    turns.add("assistant", "output")
    return turns.sample()


def _text(record: Record) -> Sample:
    return Turns(record).plain("", plain_text(record, "text"))


# In the order in which they are tried: some data sets carry the same under two names.
FORMATS = (
    Format("messages", (("messages",),), '{"messages": [{"role", "content"}, ...]}', _messages),
    Format(
        "conversations",
        (("conversations", "conversation"),),
        '{"conversations": [{"from", "value"}, ...]}',
        _conversations,
    ),
    Format("prompt/completion", (("prompt",), ("completion",)), '{"prompt", "completion"}', _prompt_completion),
    Format("alpaca", (("instruction", "input"), ("output",)), '{"instruction", "input", "output"}', _alpaca),
    Format("text", (("text",),), '{"text"}', _text),
)
