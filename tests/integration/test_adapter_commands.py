"""Adapters as a person uses them: `--adapter` of generate and serve, `seamount merge`, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch

from seamount import LLM, SamplingParams
from seamount.cli.main import main
from seamount.core.settings import EngineConfig
from seamount.engine.client import WorkerEngine
from seamount.models.batch import Batch
from seamount.models.config import ModelConfig
from seamount.models.loading import load_model
from seamount.models.locate import locate_model
from seamount.models.network import CausalLM
from seamount.models.prompt import PromptEncoder
from seamount.training.adapters.files import save_adapter
from seamount.training.adapters.lora import add_adapters

EVERY = ("attention", "dense", "shared", "experts")
PROMPT = "Once upon a time"


def tuned(name: str, folder: Path, output: Path, *, targets: tuple[str, ...]) -> CausalLM:
    """A network with an adapter that changes its answers, and the adapter's folder."""
    config = ModelConfig.from_folder(folder)
    model = load_model(folder, config, dtype=torch.bfloat16, device=torch.device("cpu"), packed=False)
    section: Any = SimpleNamespace(method="lora", rank=4, alpha=8.0, dropout=0.0, targets=targets, use_rslora=False)
    add_adapters(model, section, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    save_adapter(model, output, section, name)
    return model


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> tuple[CausalLM, Path]:
    """The embedded model: latent attention, routed experts, a block for multi-token prediction, bf16."""
    adapter = tmp_path_factory.mktemp("adapters") / "mine"
    return tuned("seamount-tiny", locate_model("seamount-tiny"), adapter, targets=EVERY), adapter


def test_the_served_model_answers_as_the_trained_network(embedded: Any) -> None:
    model, adapter = embedded
    llm = LLM("seamount-tiny", adapter=adapter)
    prompt = llm.prompt_encoder.encode_text(PROMPT)
    sampling = SamplingParams(temperature=0.0, max_tokens=12, logprobs=5, ignore_eos=True)
    (answer,) = llm.generate([prompt], sampling)
    assert llm.facts.name == "seamount-tiny"
    base = LLM("seamount-tiny").generate([prompt], sampling)[0]
    assert base.token_ids != answer.token_ids
    with torch.no_grad():
        batch = Batch.without_cache(torch.tensor([[*prompt, *answer.token_ids]]))
        expected = model.logits(model(batch, None)).log_softmax(-1)
    assert answer.logprobs is not None
    for place, (token, told) in enumerate(zip(answer.token_ids, answer.logprobs, strict=True), len(prompt) - 1):
        # The network that trains computes in bf16, the served one in fp32 over bf16 weights.
        assert abs(float(expected[place, token]) - told.chosen.logprob) < 0.15
        assert float(expected[place].max() - expected[place, token]) < 0.15


def test_generate_with_an_adapter_and_with_the_merged_checkpoint_are_the_same(
    embedded: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, adapter = embedded
    merged = tmp_path / "merged"
    assert main(["merge", "seamount-tiny", str(adapter), "--output", str(merged)]) == 0
    told = capsys.readouterr().err
    assert "Merging seamount-tiny" in told and "weights: 100%" in told and str(merged) in told
    answers = []
    flags = ["--prompt", PROMPT, "--temperature", "0", "--max-tokens", "16", "--ignore-eos", "--json"]
    for words in (["seamount-tiny", "--adapter", str(adapter)], [str(merged)], ["seamount-tiny"]):
        assert main(["generate", *words, *flags]) == 0
        shown = capsys.readouterr()
        answers.append(json.loads(shown.out)["text"])
        assert ("adapter mine: LoRA of rank 4 on" in shown.err) == ("--adapter" in words)
    assert answers[0] == answers[1] != answers[2]


async def test_a_server_answers_with_the_adapter_under_the_models_name(embedded: Any, serve: Any) -> None:
    _, adapter = embedded
    expected = LLM("seamount-tiny", adapter=adapter).generate(
        [PROMPT], SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    )[0]
    engine = WorkerEngine(EngineConfig(adapter=adapter))
    from seamount.models.locate import locate_model

    running = await serve(engine, PromptEncoder.from_folder(locate_model("seamount-tiny")))
    async with httpx.AsyncClient(base_url=running.url, timeout=60, trust_env=False) as client:
        models = (await client.get("/v1/models")).json()
        assert [model["id"] for model in models["data"]] == ["seamount-tiny"]
        body = {"model": "seamount-tiny", "prompt": PROMPT, "temperature": 0, "max_tokens": 8, "ignore_eos": True}
        answer = (await client.post("/v1/completions", json=body)).json()
    assert answer["choices"][0]["text"] == expected.text


def test_an_adapter_of_another_model_is_refused(
    embedded: Any, small_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, adapter = embedded
    for words in (
        ["generate", str(small_checkpoint), "--adapter", str(adapter), "--prompt", "x"],
        ["merge", str(small_checkpoint), str(adapter), "--output", str(tmp_path / "out")],
    ):
        assert main(words) == 2
        told = capsys.readouterr().err
        assert "adapter_model.safetensors" in told and "belongs to another model" in told
    assert main(["generate", "--adapter", str(tmp_path), "--prompt", "x"]) == 2
    assert "no adapter_config.json" in capsys.readouterr().err
    assert main(["generate", str(adapter), "--prompt", "x"]) == 2
    assert "--adapter" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_chat_with_a_server_takes_no_adapter(embedded: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "--url", "http://127.0.0.1:1", "--adapter", str(embedded[1])]) == 2
    assert "--adapter is for a model in this process" in capsys.readouterr().err
