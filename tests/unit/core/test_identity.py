"""Which addresses only this machine can reach."""

from __future__ import annotations

import pytest

from seamount.core.identity import is_loopback


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost", "LocalHost", "::ffff:127.0.0.1"])
def test_these_are_loopback(host):
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host",
    ["0.0.0.0", "::", "10.0.0.1", "::ffff:10.0.0.1", "localhost.evil.example", "", "127.0.0.1.evil", "0177.0.0.1"],
)
def test_these_are_not(host):
    assert not is_loopback(host)
