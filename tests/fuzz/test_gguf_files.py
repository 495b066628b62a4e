"""Whatever bytes a GGUF file holds, reading it ends in a correct read or in a CheckpointError."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from seamount.core.errors import CheckpointError
from seamount.models.config import ModelConfig
from seamount.models.gguf import BLOCK_TYPE_OF, Gguf
from seamount.models.gguf_config import generation_config, hf_config
from seamount.models.gguf_keymap import gguf_entries
from seamount.models.gguf_reading import read_rows
from seamount.models.gguf_tokenizer import tokenizer_files

quick = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

FIELDS: dict[str, Any] = {
    "deepseek2.context_length": 64,
    "deepseek2.embedding_length": 32,
    "deepseek2.block_count": 1,
    "deepseek2.feed_forward_length": 64,
    "deepseek2.attention.head_count": 2,
    "deepseek2.attention.layer_norm_rms_epsilon": 1e-6,
    "deepseek2.attention.kv_lora_rank": 32,
    "deepseek2.attention.key_length_mla": 20,
    "deepseek2.attention.value_length_mla": 16,
    "deepseek2.rope.dimension_count": 4,
    "deepseek2.rope.scaling.type": "yarn",
    "deepseek2.rope.scaling.factor": 4.0,
    "deepseek2.rope.scaling.original_context_length": 32,
    "deepseek2.expert_count": 2,
    "deepseek2.expert_used_count": 1,
    "deepseek2.expert_feed_forward_length": 32,
    "deepseek2.expert_gating_func": 2,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "deepseek-v3",
    "tokenizer.ggml.tokens": ["a", "b", "ab", "<x>"],
    "tokenizer.ggml.token_type": [1, 1, 1, 3],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.bos_token_id": 3,
    "tokenizer.chat_template": "{{ messages }}",
}
TENSORS = {
    "token_embd.weight": (4, 32),
    "blk.0.attn_q.weight": (40, 32),
    "blk.0.attn_k_b.weight": (2, 32, 16),
    "blk.0.attn_v_b.weight": (2, 16, 32),
    "blk.0.ffn_gate_exps.weight": (2, 32, 32),
    "output_norm.weight": (32,),
}


def good_file(path: Path) -> bytes:
    writer = gguf.GGUFWriter(path, "deepseek2")
    for key, value in FIELDS.items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}
        add[type(value)](key, value)
    for name, shape in TENSORS.items():
        kind = gguf.GGMLQuantizationType.Q4_1 if name.startswith("blk") and shape[-1] == 32 else 0
        values = np.linspace(-1, 1, int(np.prod(shape)), dtype=np.float32).reshape(shape)
        stored = gguf.quants.quantize(values, gguf.GGMLQuantizationType(kind))
        writer.add_tensor(name, stored, raw_dtype=gguf.GGMLQuantizationType(kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return good_file(tmp_path_factory.mktemp("good") / "model.gguf")


def check(path: Path) -> int:
    """Go the whole way; each stage may refuse. Returns how many stages were passed."""
    try:
        file = Gguf.from_file(path)
    except CheckpointError as error:
        assert str(path) in str(error)
        return 0
    size = path.stat().st_size
    for stored in file.tensors.values():
        kind = BLOCK_TYPE_OF[stored.dtype]
        assert 0 <= stored.offset <= stored.offset + stored.num_bytes <= size
        assert torch.Size(stored.shape).numel() // kind.num_values * kind.num_bytes == stored.num_bytes
    passed = 1
    try:
        json.dumps(tokenizer_files(file).tokenizer)
        passed += 1
    except CheckpointError:
        pass
    try:
        generation_config(file)
        raw = hf_config(file)
        ModelConfig.from_dict(raw)
        entries = gguf_entries(file, raw)
        passed += 1
        for entry in entries.values():
            assert _shape(entry) == entry.shape
            passed += 1
    except CheckpointError:
        pass
    return passed


def _shape(entry: Any) -> tuple[int, ...]:
    found = read_rows(entry)
    return tuple(found.shape if isinstance(found, torch.Tensor) else found.codes.shape)


def test_the_file_that_is_damaged_below_is_whole(good: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(good)
    assert check(path) == 3 + 6  # of six tensors, two make one entry, and one makes two


@quick
@given(st.binary(max_size=200))
@example(b"GGUF" + struct.pack("<IQQ", 3, 2**64 - 1, 2**64 - 1))
@example(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + b"\xff" * 40)
def test_random_bytes(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "model.gguf"
    for prefix in (b"", b"GGUF\x03\0\0\0"):
        path.write_bytes(prefix + data)
        check(path)


@quick
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=6), st.integers(0, 10**6))
def test_flipped_and_missing_bytes(tmp_path: Path, good: bytes, flips: list[tuple[int, int]], end: int) -> None:
    data = bytearray(good)
    header = good.index(b"output_norm") + 60
    for position, value in flips:
        data[position % (header if position % 3 else len(data))] = value
    path = tmp_path / "model.gguf"
    path.write_bytes(data[: end % len(data)] if end % 2 else data)
    check(path)


NUMBERS = {0: "<B", 1: "<b", 2: "<H", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 12: "<d"}
texts = st.text(max_size=6).map(lambda value: struct.pack("<Q", len(value.encode())) + value.encode())
numbers = st.sampled_from(sorted(NUMBERS)).flatmap(
    lambda kind: st.tuples(
        st.just(kind), st.sampled_from([0, 1, 2, 7, 100]).map(lambda v: struct.pack(NUMBERS[kind], v))
    )
)
odd_values = (
    texts.map(lambda data: struct.pack("<I", 8) + data)
    | numbers.map(lambda pair: struct.pack("<I", pair[0]) + pair[1])
    | st.lists(texts, max_size=4).map(lambda found: struct.pack("<IIQ", 9, 8, len(found)) + b"".join(found))
    | st.tuples(numbers, st.integers(0, 5)).map(
        lambda given: struct.pack("<IIQ", 9, given[0][0], given[1]) + given[0][1] * given[1]
    )
)


@quick
@given(st.dictionaries(st.sampled_from(sorted(FIELDS)), odd_values, min_size=1, max_size=3))
def test_odd_metadata(tmp_path: Path, good: bytes, changes: dict[str, bytes]) -> None:
    """Values of other types and sizes, in a file that is otherwise whole."""
    path = tmp_path / "model.gguf"
    path.write_bytes(_with_fields(good, changes))
    check(path)


def _with_fields(good: bytes, changes: dict[str, bytes]) -> bytes:
    """The file with other values; the tensors' data moves to the next multiple of the alignment."""
    source = io.BytesIO(good)
    magic, version, num_tensors, num_fields = struct.unpack("<4sIQQ", source.read(24))
    out = struct.pack("<4sIQQ", magic, version, num_tensors, num_fields)
    for _ in range(num_fields):
        (length,) = struct.unpack("<Q", source.read(8))
        key = source.read(length).decode()
        start = source.tell()
        _skip_value(source)
        out += struct.pack("<Q", length) + key.encode()
        out += changes.get(key, good[start : source.tell()])
    start = source.tell()
    for _ in range(num_tensors):
        source.read(struct.unpack("<Q", source.read(8))[0])
        source.read(8 * struct.unpack("<I", source.read(4))[0] + 12)
    out += good[start : source.tell()]
    return out + bytes(-len(out) % 32) + good[source.tell() + -source.tell() % 32 :]


def _skip_value(source: io.BytesIO) -> None:
    def skip(kind: int) -> None:
        source.read(struct.unpack("<Q", source.read(8))[0] if kind == 8 else struct.calcsize(NUMBERS[kind]))

    (kind,) = struct.unpack("<I", source.read(4))
    if kind != 9:
        return skip(kind)
    kind, length = struct.unpack("<IQ", source.read(12))
    for _ in range(length):
        skip(kind)
    return None
