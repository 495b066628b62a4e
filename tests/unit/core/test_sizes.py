"""Numbers of bytes in words."""

from __future__ import annotations

import pytest

from seamount.core.sizes import size_text


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1 kB"),
        (25_340_000, "25.3 MB"),
        (999_400_000, "999 MB"),
        (1_534_000_000, "1.53 GB"),
        (671_000_000_000, "671 GB"),
        (-2_000_000, "-2 MB"),
    ],
)
def test_a_size_is_told_in_the_unit_that_shows_it(num_bytes: int, text: str) -> None:
    assert size_text(num_bytes) == text
