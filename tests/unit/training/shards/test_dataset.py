"""Data sets: the same examples in memory and on disk, and what is told of a folder that is not whole."""

import json

import numpy as np
import pytest

from seamount.core.errors import ConfigError, IntegrityError
from seamount.training.examples.example import Example
from seamount.training.shards import store
from seamount.training.shards.dataset import ExampleList, TokenShards


def random_examples(count, seed=0, vocabulary=4096):
    rng = np.random.default_rng(seed)
    found = []
    for length in rng.integers(2, 40, count):
        trained = rng.random(length) < 0.5
        trained[0], trained[-1] = False, True
        found.append(Example(rng.integers(0, vocabulary, length).astype(np.int32), trained))
    return found


def write_folder(folder, examples, *, vocabulary=4096, per_shard=7):
    folder.mkdir(exist_ok=True)
    shards = []
    with store.ShardWriter(folder, store.token_type(vocabulary), []) as writer:
        for first in range(0, len(examples), per_shard):
            writer.write(examples[first : first + 3])
            writer.write(examples[first + 3 : first + per_shard])
            shards.append(writer.end_shard())
    origin = store.Origin(
        sources=(),
        renderer="of-a-test",
        vocab_size=vocabulary,
        overlong="error",
        duplicates="keep",
        invalid="error",
        shard_tokens=1,
    )
    manifest = store.Manifest(
        num_examples=len(examples),
        num_tokens=sum(shard.num_tokens for shard in shards),
        num_trained=sum(shard.num_trained for shard in shards),
        counts=store.Counts(num_records=len(examples)),
        token_type=store.token_type(vocabulary),
        digest=shards[-1].digest,
        origin=origin,
        shards=tuple(shards),
    )
    (folder / store.MANIFEST).write_text(manifest.model_dump_json())
    return folder


@pytest.mark.parametrize("vocabulary", [4096, 2**16, 2**16 + 1, 2**31])
def test_shards_give_the_examples_that_were_written(tmp_path, vocabulary):
    examples = random_examples(50, vocabulary=vocabulary)
    kept, wanted = TokenShards.open(write_folder(tmp_path, examples, vocabulary=vocabulary)), ExampleList(examples)
    assert len(kept) == len(wanted) == 50
    for index in [*range(50), 3, 49, 0]:
        found = kept.example(index)
        assert found.token_ids.dtype == np.int32
        assert np.array_equal(found.token_ids, examples[index].token_ids)
        assert np.array_equal(found.trained, examples[index].trained)
    assert np.array_equal(kept.lengths, wanted.lengths)
    assert np.array_equal(kept.num_trained, wanted.num_trained)
    assert kept.lengths.dtype == wanted.lengths.dtype == np.int32
    kept.verify()


def test_the_digest_is_of_the_examples_however_they_are_kept(tmp_path):
    examples = random_examples(20)
    digest = ExampleList(examples).digest
    assert TokenShards.open(write_folder(tmp_path / "a", examples, per_shard=4)).digest == digest
    assert TokenShards.open(write_folder(tmp_path / "b", examples, vocabulary=2**20)).digest == digest
    assert ExampleList(examples[::-1]).digest != digest
    assert ExampleList(examples[:-1]).digest != digest
    flags = [Example(e.token_ids, e.trained if i else ~e.trained) for i, e in enumerate(examples)]
    assert ExampleList(flags).digest != digest


def test_numbers_outside_are_refused(tmp_path):
    examples = random_examples(5)
    for data in (ExampleList(examples), TokenShards.open(write_folder(tmp_path, examples))):
        for index in (-1, 5):
            with pytest.raises(IndexError, match="of 5"):
                data.example(index)


def test_a_writer_goes_on_after_the_last_whole_shard(tmp_path):
    examples = random_examples(30)
    whole = write_folder(tmp_path / "whole", examples, per_shard=10)
    folder = tmp_path / "killed"
    folder.mkdir()
    with store.ShardWriter(folder, "uint16", []) as writer:
        writer.write(examples[:10])
        shards = [writer.end_shard()]
        writer.write(examples[10:17])  # never ended: as good as not written
    with store.ShardWriter(folder, "uint16", shards) as writer:
        for first in (10, 20):
            writer.write(examples[first : first + 10])
            shards.append(writer.end_shard())
    for path in whole.glob("*-0000[012].bin"):
        assert (folder / path.name).read_bytes() == path.read_bytes()
    for name in store.INDEX:
        assert (folder / f"{name}.bin").read_bytes() == (whole / f"{name}.bin").read_bytes()


def test_a_folder_without_shards_or_with_unfinished_ones_is_told_apart(tmp_path):
    with pytest.raises(ConfigError, match="holds no token shards"):
        TokenShards.open(tmp_path)
    (tmp_path / store.UNFINISHED).write_text("{}")
    with pytest.raises(ConfigError, match="not finished"):
        TokenShards.open(tmp_path)


def test_shards_of_another_tokenizer_or_template_are_refused(tmp_path):
    folder = write_folder(tmp_path, random_examples(5))
    assert len(TokenShards.open(folder, renderer="of-a-test")) == 5
    with pytest.raises(ConfigError, match="another tokenizer, chat template"):
        TokenShards.open(folder, renderer="another")


@pytest.mark.parametrize("name", ["tokens-00001.bin", "trained-00000.bin", "lengths.bin", "starts.bin"])
def test_a_short_or_missing_file_is_named(tmp_path, name):
    path = write_folder(tmp_path, random_examples(20)) / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match=name):
        TokenShards.open(tmp_path)
    path.unlink()
    with pytest.raises(IntegrityError, match=f"{name} is missing"):
        TokenShards.open(tmp_path)


@pytest.mark.parametrize("name", ["tokens-00001.bin", "trained-00001.bin"])
def test_a_flipped_bit_is_found_and_its_shard_named(tmp_path, name):
    path = write_folder(tmp_path, random_examples(20)) / name
    data = bytearray(path.read_bytes())
    data[5] ^= 4
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"tokens-00001\.bin"):
        TokenShards.open(tmp_path).verify()


@pytest.mark.parametrize("change", [{"version": 2}, {"format": "other"}, {"surprise": 1}, {"num_examples": "many"}])
def test_a_manifest_of_another_version_is_told(tmp_path, change):
    path = write_folder(tmp_path, random_examples(5)) / store.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match="not a manifest of this version"):
        TokenShards.open(tmp_path)


def test_a_token_beyond_the_type_is_refused(tmp_path):
    example = Example(np.array([1, 70_000], dtype=np.int32), np.array([False, True]))
    with store.ShardWriter(tmp_path, "uint16", []) as writer, pytest.raises(ValueError, match="do not fit"):
        writer.write([example])
