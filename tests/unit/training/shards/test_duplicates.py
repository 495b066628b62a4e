"""Duplicates: all of them, each with the first of its kind, in parts as in one piece."""

import numpy as np
import pytest

from seamount.training.shards import duplicates


def naive(values):
    first, found = {}, []
    for place, value in enumerate(values):
        if first.setdefault(value, place) != place:
            found.append((place, first[value]))
    return found


@pytest.mark.parametrize("sorted_keys", [2**21, 50, 7])
def test_every_repeat_is_found_with_its_first(tmp_path, monkeypatch, sorted_keys):
    monkeypatch.setattr(duplicates, "_SORTED_KEYS", sorted_keys)
    monkeypatch.setattr(duplicates, "_READ_KEYS", 13)
    values = np.random.default_rng(0).integers(0, 150, 400).tolist()
    path = tmp_path / "keys"
    path.write_bytes(b"".join(duplicates.key_of([str(value)]) for value in values))
    told = []
    found = duplicates.find(path, progress=told.append)
    assert list(zip(found.places.tolist(), found.first.tolist(), strict=True)) == naive(values)
    assert len(found) == 400 - len(set(values))
    assert told[-1] == 1
    assert told == sorted(told)


def test_a_file_without_keys_has_no_duplicates(tmp_path):
    (tmp_path / "keys").touch()
    assert len(duplicates.find(tmp_path / "keys")) == 0


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (["Grüße,  Welt\n"], ["Gru\u0308ße, Welt"], True),
        (["a", "b"], ["a b"], False),
        (["a", "b"], ["ab", ""], False),
        (["print x"], ["Print x"], False),
        (["\ud800"], ["\ud801"], False),
        ([], [""], False),
    ],
)
def test_what_counts_as_the_same_text(one, other, same):
    assert (duplicates.key_of(one) == duplicates.key_of(other)) is same
