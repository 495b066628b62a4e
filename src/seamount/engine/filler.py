"""When sequences that only fill idle time may join a step that somebody waits for.

Used by `scheduler`. Pure: it is told what steps took. Beside people's requests, a batch's sequences may cost those at
most `SHARE` of their time: how much longer a step with them is than one without is measured, and what it cost is waited
out before the next. So where a step takes as long with them as without, as decoding from memory does, they join nearly
every one; where each costs its time, one in many.
"""

from __future__ import annotations

SHARE = 0.2
_NEWEST_WEIGHT = 0.2
# One step that took very long, whatever for, does not keep them out for minutes.
_MAX_OWED_S = 1.0


class Filler:
    """What those who fill idle time have cost the others, and what they may."""

    def __init__(self) -> None:
        self._alone_s: float | None = None
        self._owed_s = 0.0

    def may_join(self) -> bool:
        """Say whether the next step may hold them too; before anything was measured it may not."""
        return self._alone_s is not None and self._owed_s <= 0.0

    def measured(self, took_s: float, *, joined: bool, decodes_only: bool) -> None:
        """Learn from a step that held somebody's request.

        Args:
            took_s: the seconds that it took.
            joined: it held others' as well, who fill idle time.
            decodes_only: nobody's prompt was in it: such steps tell what one more costs.
        """
        if not joined:
            self._owed_s = max(self._owed_s - SHARE * took_s, 0.0)
            if decodes_only:
                known = self._alone_s
                self._alone_s = took_s if known is None else known + _NEWEST_WEIGHT * (took_s - known)
        elif self._alone_s is not None:
            self._owed_s = min(self._owed_s + took_s - (1 + SHARE) * self._alone_s, _MAX_OWED_S)
