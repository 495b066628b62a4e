"""A person sees what is learned, and nothing that a terminal would obey."""

from __future__ import annotations

from chat_families import sample_of

from seamount.models.prompt import PromptEncoder
from seamount.training.examples.rendering import Renderer
from seamount.training.examples.showing import as_plain, as_text

SAID = {"role": "assistant", "content": "Hi\x1b[2J\u202e 你好\n\tx"}
RECORD = {"messages": [{"role": "user", "content": "Hello\x07"}, SAID]}


def test_learned_tokens_are_marked_and_controls_spelled(tiny: PromptEncoder, tiny_renderer: Renderer) -> None:
    example = tiny_renderer.example(sample_of(RECORD))
    plain = as_plain(example, tiny)
    assert plain.startswith(
        "‹<｜begin▁of▁sentence｜><｜User｜>›Hello\\x07‹<｜Assistant｜><think>›⟦‹</think>›Hi\\x1b[2J\\u202e"
    )
    assert plain.endswith("你好\n\tx‹<｜end▁of▁sentence｜>›⟧")
    shown = as_text(example, tiny)
    assert shown.plain == plain.translate(dict.fromkeys(map(ord, "⟦⟧‹›")))
    green = [span for span in shown.spans if "green" in str(span.style)]
    assert "".join(shown.plain[span.start : span.end] for span in green).startswith("</think>Hi")
    assert "User" not in "".join(shown.plain[span.start : span.end] for span in green)


def test_letters_that_spell_a_marker_are_told_from_the_marker(tiny: PromptEncoder, tiny_renderer: Renderer) -> None:
    end = "<｜end▁of▁sentence｜>"
    example = tiny_renderer.example(sample_of({"text": f"a {end}"}))
    plain = as_plain(example, tiny)
    assert plain.replace("⟦", "") == f"a {end}‹{end}›⟧"
    shown = as_text(example, tiny)
    bold = [shown.plain[span.start : span.end] for span in shown.spans if "underline" in str(span.style)]
    assert bold == [end]
