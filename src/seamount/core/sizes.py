"""Numbers of bytes, in words for people. Called wherever a message or a table tells one."""

from __future__ import annotations

_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def size_text(num_bytes: float) -> str:
    """Return a number of bytes in the largest decimal unit of which there is one, with three digits: "25.3 MB"."""
    for unit, name in _UNITS:
        if abs(num_bytes) >= unit:
            value = num_bytes / unit
            return f"{value:.0f} {name}" if abs(value) >= 100 else f"{value:.3g} {name}"
    return f"{num_bytes:.0f} bytes"
