"""Embeddings in the engine: the same bytes alone and in company, and every text whole."""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from seamount import LLM, SamplingParams, kernels
from seamount.core.embedding import EmbeddingFacts, EmbeddingParams, floats_of
from seamount.core.errors import ContextTooLongError, InvalidRequestError
from seamount.core.requests import Chunk, EngineStats, Request
from seamount.core.settings import EngineConfig
from seamount.engine.build import build_engine
from seamount.engine.engine import EngineCore
from seamount.engine.messages import CODEC, Stepped, Submit
from seamount.engine.pooling import Pool
from seamount.models.config import ModelConfig
from seamount.models.keymap import placements

VOCAB = 300
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "is_matryoshka": True,
}
MODES = {"last": "lasttoken", "mean": "mean", "first": "cls"}
FACTS = EmbeddingFacts(pooling="last", normalize=False, num_dimensions=3, shorter_dimensions=(), max_tokens=9)


def write_model(folder: Path, mode: str, *, head: bool = True) -> Path:
    """An embedding model with random weights, in sentence-transformers' layout."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for place in placements(ModelConfig.from_dict(CONFIG)):
        value = torch.randn(place.shape, generator=generator)
        scale = place.shape[-1] ** -0.5 if value.dim() == 2 else 0.2
        name = place.key if head else place.key.removeprefix("model.")
        tensors[name] = value * scale + (1 if name.endswith("norm.weight") else 0)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet()) + [f"filler{i}" for i in range(VOCAB - 256)]
    tokenizer = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": mode}))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("embedding-models")
    return {name: write_model(root / name, mode) for name, mode in MODES.items()}


@pytest.fixture(autouse=True, scope="module")
def _threads_as_they_were() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    kernels.set_threads(before)


def engine_of(folder: Path, **options: Any) -> EngineCore:
    given = {"num_threads": 1, "device": "cpu", "dtype": "float32", "cache_memory_bytes": 2**22, **options}
    return build_engine(EngineConfig(model=str(folder), **given))[0]


def wish(name: object, prompt: tuple[int, ...], dimensions: int | None = None, **more: Any) -> Request:
    return Request(id=f"{name}", prompt_token_ids=prompt, embedding=EmbeddingParams(dimensions=dimensions), **more)


def run(engine: EngineCore, requests: list[Request], arrivals: list[int] | None = None) -> dict[str, list[Chunk]]:
    """Add each request before the step that its arrival names, and step until all have ended."""
    found: dict[str, list[Chunk]] = {request.id: [] for request in requests}
    waiting = sorted(zip(arrivals or [0] * len(requests), requests, strict=True), key=lambda pair: pair[0])
    step = 0
    while waiting or not engine.idle:
        while waiting and waiting[0][0] <= step:
            engine.add(waiting.pop(0)[1])
        for chunk in engine.step():
            found[chunk.request_id].append(chunk)
        step += 1
    return found


def embeddings(found: dict[str, list[Chunk]]) -> dict[str, bytes | None]:
    return {name: chunks[-1].embedding for name, chunks in found.items()}


@pytest.mark.skipif(kernels.library() is None, reason="only compiled kernels give every row its own bits")
@pytest.mark.parametrize("pooling", MODES)
@settings(max_examples=6)
@given(data=st.data())
def test_company_changes_no_bit(pooling: str, folders: dict[str, Path], data: st.DataObject) -> None:
    chance = random.Random(data.draw(st.integers(0, 2**32), label="traffic"))
    beginnings = [tuple(chance.randrange(VOCAB) for _ in range(length)) for length in (0, 7, 70, 200)]
    requests = []
    for number in range(data.draw(st.integers(2, 16), label="requests")):
        prompt = chance.choice(beginnings) + tuple(chance.randrange(VOCAB) for _ in range(chance.randint(1, 90)))
        if chance.random() < 0.3:
            sampling = SamplingParams(temperature=0, max_tokens=chance.randint(1, 9), ignore_eos=True)
            requests.append(Request(id=f"{number}", prompt_token_ids=prompt, sampling=sampling))
        else:
            requests.append(wish(number, prompt, chance.choice([None, None, 20])))
    alone = engine_of(folders[pooling], enable_prefix_cache=False)
    expected = {request.id: embeddings(run(alone, [request]))[request.id] for request in requests}
    crowd = engine_of(
        folders[pooling],
        max_step_tokens=data.draw(st.sampled_from([16, 33, 200, 2048]), label="step"),
        block_size=data.draw(st.sampled_from([1, 4, 16]), label="block"),
        max_num_seqs=data.draw(st.sampled_from([2, 32]), label="side by side"),
        num_threads=data.draw(st.sampled_from([1, 2]), label="threads"),
        max_model_len=300,
        # Either room for all, or so little that sequences lose their blocks and begin again.
        cache_memory_bytes=data.draw(st.sampled_from([2**22, 340 * alone.facts.cache_bytes_per_token]), label="cache"),
    )
    assert embeddings(run(crowd, requests, [chance.randrange(20) for _ in requests])) == expected
    stats = crowd.stats()
    assert (stats.num_free_blocks, stats.num_running, stats.num_waiting) == (stats.num_blocks, 0, 0)


@pytest.mark.parametrize("pooling", MODES)
def test_a_text_that_loses_its_blocks_midway_begins_anew(pooling: str, folders: dict[str, Path]) -> None:
    text = wish("text", tuple(number % VOCAB for number in range(290)))
    alone = engine_of(folders[pooling])
    expected = run(alone, [text])["text"][0].embedding
    room = 304 * alone.facts.cache_bytes_per_token
    tight = engine_of(
        folders[pooling], max_model_len=300, max_step_tokens=16, block_size=4, cache_memory_bytes=room, max_num_seqs=2
    )
    chat = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    found = run(tight, [Request(id="chat", prompt_token_ids=(1,) * 8, sampling=chat), text])
    assert tight.stats().num_preemptions > 0
    assert len(found["chat"]) == 60
    assert floats_of(found["text"][0].embedding) == pytest.approx(floats_of(expected), abs=1e-6)


@pytest.mark.parametrize(("pooling", "may_skip"), [("last", True), ("mean", False), ("first", False)])
def test_only_the_last_tokens_pooling_takes_a_cached_prefix(pooling, may_skip, folders) -> None:
    engine = engine_of(folders[pooling], block_size=4)
    prompt = tuple(range(40))
    first, again = (run(engine, [wish(name, prompt)])[name][0] for name in ("a", "b"))
    assert first.num_cached_tokens == 0
    assert again.num_cached_tokens == (36 if may_skip else 0)
    # Plain torch may group a shorter product's sums differently; compiled kernels may not.
    assert floats_of(again.embedding) == pytest.approx(floats_of(first.embedding), abs=1e-6)


@pytest.mark.parametrize("pooling", MODES)
def test_an_embedding_is_one_chunk_without_tokens(pooling: str, folders: dict[str, Path]) -> None:
    engine = engine_of(folders[pooling], max_step_tokens=16)
    (chunk,) = run(engine, [wish("a", tuple(range(50)))])["a"]
    assert (chunk.finish_reason, chunk.token_ids, chunk.text, chunk.logprobs) == ("stop", (), "", ())
    assert chunk.queue_s is not None and chunk.prefill_s is not None
    numbers = floats_of(chunk.embedding)
    assert len(numbers) == 48
    assert math.fsum(value * value for value in numbers) == pytest.approx(1, abs=1e-6)
    assert (engine.stats().num_prompt_tokens, engine.stats().num_generated_tokens) == (50, 0)


def test_fewer_dimensions_are_the_leading_ones_scaled_again(folders: dict[str, Path]) -> None:
    engine = engine_of(folders["last"])
    whole, short = (
        floats_of(run(engine, [wish(name, (1, 2, 3), dimensions)])[name][0].embedding)
        for name, dimensions in (("a", None), ("b", 10))
    )
    length = math.sqrt(sum(value * value for value in whole[:10]))
    assert short == pytest.approx([value / length for value in whole[:10]], abs=1e-6)


def test_a_text_may_fill_the_context_and_not_exceed_it(folders: dict[str, Path]) -> None:
    engine = engine_of(folders["mean"], max_model_len=64)
    assert run(engine, [wish("a", (5,) * 64)])["a"][0].embedding is not None
    with pytest.raises(ContextTooLongError, match="65 tokens; this model embeds at most 64"):
        engine.add(wish("b", (5,) * 65))


def test_aborting_frees_everything(folders: dict[str, Path]) -> None:
    engine = engine_of(folders["mean"], max_step_tokens=16)
    engine.add(wish("a", (5,) * 100))
    engine.step()
    assert [chunk.finish_reason for chunk in engine.abort("a")] == ["abort"]
    assert engine.idle
    assert engine.stats().num_free_blocks == engine.stats().num_blocks


def test_llm_embeds_and_refuses_what_the_model_is_not_made_for(folders: dict[str, Path], tmp_path: Path) -> None:
    llm = LLM(str(folders["mean"]), num_threads=1, device="cpu", cache_memory_bytes=2**22)
    alone, ids = llm.embed("one text"), list(b"one text")
    assert len(alone) == 1
    texts = [f"text {number}" for number in range(100)]
    together = llm.embed([*texts, "one text"])
    assert len(together) == 101
    assert together[-1] == pytest.approx(alone[0], abs=1e-6)
    assert len(llm.embed([ids], dimensions=7)[0]) == 7
    assert llm.embed([]) == []
    with pytest.raises(InvalidRequestError, match="dimensions is 49; this model offers 1 to 48"):
        llm.embed("x", dimensions=49)
    # It has a head, since its table is one, and so it can continue text as well.
    assert llm.generate("x", SamplingParams(max_tokens=2, ignore_eos=True))[0].token_ids
    headless = LLM(str(write_model(tmp_path / "base", "mean", head=False)), num_threads=1, cache_memory_bytes=2**22)
    assert headless.embed("one text")[0] == pytest.approx(alone[0], abs=1e-6)
    with pytest.raises(InvalidRequestError, match="embeddings only") as refused:
        headless.generate("x")
    assert refused.value.code == "not_a_generative_model"


def test_a_model_for_text_makes_no_embeddings() -> None:
    with pytest.raises(InvalidRequestError, match="not made for embeddings") as refused:
        LLM("seamount-tiny", num_threads=1, cache_memory_bytes=2**22).embed("x")
    assert refused.value.code == "not_an_embedding_model"


def test_what_is_not_a_number_fails_its_own_request_only(folders: dict[str, Path]) -> None:
    engine = engine_of(folders["last"])
    ran = engine._runner.run

    def poisoned(work):
        result = ran(work)
        with torch.inference_mode():
            result.hidden[0] = float("nan")
        return result

    engine._runner.run = poisoned
    found = run(engine, [wish("a", (4,)), wish("b", (5,))])
    assert found["a"][0].error is not None and found["a"][0].embedding is None
    assert found["b"][0].embedding is not None
    assert "not a number" in found["a"][0].error["message"]


@given(rows=st.integers(1, 40), cuts=st.lists(st.integers(1, 39), max_size=6), mode=st.sampled_from(sorted(MODES)))
def test_a_mean_does_not_depend_on_how_a_prompt_was_cut(rows: int, cuts: list[int], mode: Any) -> None:
    states = torch.randn(rows, 5, generator=torch.Generator().manual_seed(rows)) * 10.0 ** torch.arange(5)
    facts = EmbeddingFacts(pooling=mode, normalize=True, num_dimensions=5, shorter_dimensions=None, max_tokens=99)
    whole, cut = Pool(facts, None), Pool(facts, None)
    cut.add(0, states[:1] * 3)  # what it had before it lost its blocks
    whole.add(0, states)
    ends = sorted({end for end in cuts if end < rows} | {rows})
    for start, end in zip([0, *ends], ends, strict=False):
        cut.add(start, states[start:end])
    assert cut.embedding() == whole.embedding()
    expected = {"last": states[-1], "first": states[0], "mean": states.double().mean(dim=0)}[mode]
    expected = torch.nn.functional.normalize(expected.double(), dim=0)
    assert floats_of(whole.embedding()) == pytest.approx(expected.tolist(), rel=1e-6)


def test_an_embedding_is_not_made_of_nothing() -> None:
    pool = Pool(FACTS, None)
    with pytest.raises(RuntimeError):
        pool.embedding()
    pool.add(0, torch.zeros(1, 3))
    assert floats_of(pool.embedding()) == [0, 0, 0]
    scaled = Pool(EmbeddingFacts(**{**vars(FACTS), "normalize": True}), None)
    scaled.add(0, torch.zeros(1, 3))
    assert scaled.embedding() is None


def test_embeddings_cross_the_process_boundary_unchanged() -> None:
    vector = struct.pack("<3f", 1.5, -0.1, 3e-38)
    request = wish("a", (1, 2), 2, cache_salt="s")
    assert CODEC.decode(CODEC.encode(Submit(request))).request == request
    sent = Stepped((Chunk(request_id="a", finish_reason="stop", embedding=vector),), EngineStats())
    assert CODEC.decode(CODEC.encode(sent)) == sent
