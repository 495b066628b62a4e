"""The folder of an unfinished quantization, gone on with."""

from __future__ import annotations

from pathlib import Path

import pytest

from seamount.core.errors import ConfigError
from seamount.training.compression.work import Mark, WorkFolder, sha256


def test_a_shard_that_was_damaged_meanwhile_is_refused(tmp_path: Path) -> None:
    output = tmp_path / "quantized"
    with WorkFolder(output, "digest", 3) as work:
        for index in range(2):
            work.shard(index).write_bytes(bytes([index]) * 100)
            work.mark(index, Mark(0.1, 0, 1.0, sha256(work.shard(index))))
        work.check_shards()
        damaged = work.shard(1)
    damaged.write_bytes(b"\1" * 99 + b"\0")
    with WorkFolder(output, "digest", 3) as work, pytest.raises(ConfigError, match="is damaged") as refused:
        work.check_shards()
    assert str(damaged) in str(refused.value)
    assert "Remove" in (refused.value.hint or "")
