"""From generated tokens to text that is safe to send: whole characters, stop strings found and cut off."""

from __future__ import annotations

from seamount.models.tokenizer import Detokenizer


class OutputText:
    """The text of one sequence as it grows.

    Text is held back while its end may still become a stop string, so nothing sent ever has to be taken back.

    Args:
        detokenizer: fresh, for this sequence alone.
        stop: strings that end the output.
    """

    def __init__(self, detokenizer: Detokenizer, stop: tuple[str, ...]) -> None:
        self._detokenizer = detokenizer
        self._stop = stop
        self._held = ""

    def push(self, token_ids: list[int], *, may_stop: bool = True) -> tuple[str, str | None]:
        """Add tokens; return the text that is now certain and the stop string that was met, if any.

        After a stop string was met there is nothing more to push or flush.
        """
        text = self._held + self._detokenizer.push(token_ids)
        return self._split(text, may_stop)

    def flush(self, *, may_stop: bool = True) -> tuple[str, str | None]:
        """The sequence has ended: return all that was held back, cut at a stop string if the end completes one."""
        text = self._held + self._detokenizer.flush()
        certain, stopped = self._split(text, may_stop)
        self._held = ""
        return (certain, stopped) if stopped else (text, None)

    def _split(self, text: str, may_stop: bool) -> tuple[str, str | None]:
        if not may_stop or not self._stop:
            self._held = ""
            return text, None
        found = [(place, stop) for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:
            place, stop = min(found, key=lambda pair: (pair[0], -len(pair[1])))
            self._held = ""
            return text[:place], stop
        keep = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0
