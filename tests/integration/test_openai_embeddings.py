"""The official client against a real server, over a scripted engine and over a real worker with a small model."""

from __future__ import annotations

import asyncio
import dataclasses
import math

import openai
import pytest

from seamount.core.embedding import EmbeddingFacts
from seamount.core.settings import EngineConfig
from seamount.engine.client import WorkerEngine
from seamount.engine.fake import FAKE_FACTS, FakeEngine
from seamount.models.prompt import PromptEncoder

HOW = EmbeddingFacts(pooling="mean", normalize=False, num_dimensions=3, shorter_dimensions=None, max_tokens=4096)
FACTS = dataclasses.replace(FAKE_FACTS, embedding=HOW)


def client(url: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


async def test_the_client_reads_both_forms(serve):
    running = await serve(FakeEngine(facts=FACTS, embed=lambda request: [0.1, -7.0, 1e-3]))
    async with client(running.url) as api:
        # Asked for nothing, this client asks for base64 and unpacks it.
        packed = await api.embeddings.create(model="fake", input=["a", "b"])
        plain = await api.embeddings.create(model="fake", input=["a", "b"], encoding_format="float")
    assert [list(item.embedding) for item in packed.data] == [item.embedding for item in plain.data]
    assert plain.data[0].embedding == pytest.approx([0.1, -7.0, 1e-3])
    assert [item.index for item in packed.data] == [0, 1]
    assert packed.usage.prompt_tokens == packed.usage.total_tokens == 4


async def test_refusals_reach_the_caller_as_bad_requests(serve):
    running = await serve(FakeEngine())
    async with client(running.url) as api:
        with pytest.raises(openai.BadRequestError) as refused:
            await api.embeddings.create(model="fake", input="a")
    assert refused.value.code == "not_an_embedding_model"


async def test_a_client_that_leaves_ends_the_work(serve):
    begun = asyncio.Event()

    async def pause() -> None:
        begun.set()
        await asyncio.Event().wait()

    engine = FakeEngine(facts=FACTS, pause=pause)
    running = await serve(engine)
    async with client(running.url) as api:
        asking = asyncio.create_task(api.embeddings.create(model="fake", input=["a"] * 64))
        await begun.wait()
        asking.cancel()
        await asyncio.wait((asking,))
        async with asyncio.timeout(10):
            while (await engine.stats()).num_running:
                await asyncio.sleep(0.01)
    assert running.service.num_active <= 1


async def test_a_real_model_of_embeddings_only(serve, small_checkpoint, embedding_folder):
    engine = WorkerEngine(EngineConfig(model=str(embedding_folder), num_threads=1, cache_memory_bytes=2**20))
    running = await serve(engine, PromptEncoder.from_folder(embedding_folder))
    await running.service.started
    async with client(running.url) as api:
        found = await api.embeddings.create(model=embedding_folder.name, input=["one", "two", "one"])
        first, second, third = (list(item.embedding) for item in found.data)
        assert first == third != second
        assert math.fsum(value * value for value in first) == pytest.approx(1, abs=1e-5)
        with pytest.raises(openai.BadRequestError) as refused:
            await api.completions.create(model=embedding_folder.name, prompt="one")
        assert refused.value.code == "not_a_generative_model"
        many = await api.embeddings.create(model=embedding_folder.name, input=[f"text {n}" for n in range(200)])
    assert len(many.data) == 200
    stats = await engine.stats()
    assert stats.num_running == stats.num_waiting == 0


@pytest.fixture
def embedding_folder(small_checkpoint, tmp_path):
    """The small checkpoint as its base model alone, which can make embeddings and nothing else."""
    import json
    import shutil

    from safetensors.numpy import load_file, save_file

    folder = tmp_path / "small-embedding"
    shutil.copytree(small_checkpoint, folder)
    weights = load_file(folder / "model.safetensors")
    save_file({name.removeprefix("model."): value for name, value in weights.items()}, folder / "model.safetensors")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "architectures": ["Qwen2Model"]}))
    return folder
