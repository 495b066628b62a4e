"""Stop strings: found wherever they fall, cut off, and never sent in part."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from seamount.engine.output import OutputText


class CodePoints:
    """A detokenizer whose tokens are code points, so that tests can cut text at will."""

    def push(self, token_ids: list[int]) -> str:
        return "".join(map(chr, token_ids))

    def flush(self) -> str:
        return ""


def run(text: str, stop: tuple[str, ...], cuts: list[int]) -> tuple[str, str | None]:
    out = OutputText(CodePoints(), stop)
    sent, start = "", 0
    for end in [*sorted(cuts), len(text)]:
        piece, stopped = out.push([ord(c) for c in text[start:end]])
        sent += piece
        if stopped is not None:
            return sent, stopped
        start = end
    piece, stopped = out.flush()
    return sent + piece, stopped


@given(
    st.text("abc", max_size=30),
    st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.integers(0, 30), max_size=8),
)
def test_any_split_gives_the_text_before_the_first_stop_string(text, stop, cuts) -> None:
    cuts = [min(cut, len(text)) for cut in cuts]
    sent, stopped = run(text, tuple(stop), list(range(len(text))))
    places = [text.find(s) for s in stop if s in text]
    if not places:
        assert (sent, stopped) == (text, None)
        assert run(text, tuple(stop), cuts) == (text, None)
    else:
        # Token by token, the string that is complete first ends the output.
        end = min(text.find(s) + len(s) for s in stop if s in text)
        assert stopped is not None and text.startswith(sent + stopped)
        assert len(sent) + len(stopped) == end


def test_what_may_become_a_stop_string_waits() -> None:
    out = OutputText(CodePoints(), ("###",))
    assert out.push([ord(c) for c in "ab#"]) == ("ab", None)
    assert out.push([ord(c) for c in "#c"]) == ("##c", None)
    assert out.push([ord(c) for c in "#"]) == ("", None)
    assert out.flush() == ("#", None)


def test_before_min_tokens_stop_strings_do_not_count() -> None:
    out = OutputText(CodePoints(), ("x",))
    assert out.push([ord("x")], may_stop=False) == ("x", None)
    assert out.push([ord("x")]) == ("", "x")
