"""Where a JSON object ends, and where a text stops being one."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seamount.models.tools_json import JsonFollower, members

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text(max_size=4), VALUES, max_size=4)


def follow(text: str, size: int = 1 << 20) -> tuple[int, bool, bool]:
    follower = JsonFollower()
    position = 0
    for start in range(0, len(text), size):
        position += follower.feed(text[start : start + size])
    return position, follower.done, follower.broken


@given(OBJECTS, st.sampled_from([None, 2]), st.booleans(), st.text(max_size=5), st.integers(1, 5))
def test_an_object_ends_at_its_brace_whatever_follows(value, indent, ascii_only, rest, size):
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    assert follow(text + rest) == follow(text + rest, size) == (len(text), True, False)


@pytest.mark.parametrize(
    ("text", "taken"),
    [
        ("{'a': 1}", 1),
        ('{"a" 1}', 5),
        ('{"a": 1,}', 8),
        ('{"a": 01}', 8),
        ('{"a": nul}', 9),
        ('{"a": True}', 10),
        ('{"a": 1]', 7),
        ('{"a": [1}', 8),
        ('{"a": 1 "b"', 8),
        ('{"a": 1<', 7),
        ("{,", 1),
        ("{1", 1),
        ('{"a": [,', 7),
    ],
)
def test_what_is_no_json_is_seen_where_it_stands(text, taken):
    assert follow(text) == follow(text, 1) == (taken, False, True)


@pytest.mark.parametrize("text", ["{", '{"a', '{"a": "\\', '{"a": "\\"}', '{"a": tru', '{"a": 1', '{"a": [[{}'])
def test_a_beginning_is_neither_done_nor_broken(text):
    assert follow(text) == follow(text, 1) == (len(text), False, False)


def test_strings_may_hold_what_models_write_into_them():
    assert follow('{"a": "line\nline\t</tool_call>"}') == (31, True, False)


@given(OBJECTS)
def test_members_are_the_objects_own_text(value):
    text = json.dumps(value, indent=1)
    found = members(text)
    assert found is not None
    assert {name: json.loads(part) for name, part in found} == value
    assert all(part in text for _, part in found)


def test_a_name_that_stands_twice_gives_no_members():
    assert members('{"a": 1, "a": 2}') is None
