"""The command: a recipe is trained, gone on with, exported; and answers of a network in training are greedy."""

import signal
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import Tokenizer

import seamount.models
from seamount.models.batch import Batch
from seamount.models.config import ModelConfig
from seamount.models.loading import load_model
from seamount.training.pretraining import checkpoint, tiny
from seamount.training.pretraining.loop import initial_network
from seamount.training.pretraining.probe import greedy, probe

EMBEDDED = Path(seamount.models.__file__).parent / "embedded" / "seamount-tiny"


@pytest.fixture
def recipe(make_recipe, tmp_path):
    """Three steps on real samples."""
    plain = make_recipe(tmp_path / "run")
    data = plain.data.model_dump() | {
        "tokenizer": EMBEDDED,
        "buckets": [128],
        "batch_tokens": 512,
        "stages": [{"from_step": 0, "samples": 60, "weights": {"commands": 1.0, "unknown": 1.0}}],
    }
    schedule = {"warmup_steps": 1, "total_steps": 3, "decay_steps": 1}
    model = {**plain.model, "vocab_size": 4096}
    return make_recipe(tmp_path / "run", data=data, schedule=schedule, model=model, mtp=None, probe_items=0)


def written(recipe, folder):
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")), encoding="utf-8")
    return str(path)


def test_train_then_export_gives_a_folder_that_loads(recipe, tmp_path, capsys):
    path = written(recipe, tmp_path)
    assert tiny.main([path]) == 0
    assert tiny.main([path]) == 0  # nothing is left to do, and that is no error
    assert tiny.main([path, "--export", str(tmp_path / "out"), "--curve", str(tmp_path / "curve.svg")]) == 0
    config = ModelConfig.from_folder(tmp_path / "out")
    model = load_model(tmp_path / "out", config, dtype=torch.bfloat16, device=torch.device("cpu"), packed=False)
    assert model.config.num_mtp_layers == 1
    assert (tmp_path / "curve.svg").read_text(encoding="utf-8").startswith("<svg")
    assert "step 3/3" in capsys.readouterr().out


def test_sigterm_ends_the_run_after_its_step_with_a_checkpoint(recipe, tmp_path, monkeypatch):
    step = tiny.RunLog.step

    def terminate_at_2(log, record, progress):
        step(log, record, progress)
        if record.step == 2:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(tiny.RunLog, "step", terminate_at_2)
    handler = signal.getsignal(signal.SIGTERM)
    assert tiny.main([written(recipe, tmp_path)]) == 0
    assert checkpoint.latest(recipe.run_folder / "checkpoints").name == "step-2"
    assert signal.getsignal(signal.SIGTERM) is handler


def test_what_is_wrong_is_one_line_and_exit_code_1(recipe, tmp_path, capsys):
    assert tiny.main([str(tmp_path / "absent.yaml")]) == 1
    assert tiny.main([written(recipe, tmp_path), "--export", str(tmp_path / "out")]) == 1
    assert "no checkpoint" in capsys.readouterr().err


def test_greedy_answers_equal_those_computed_without_a_cache(make_recipe, tmp_path):
    model = initial_network(make_recipe(tmp_path), torch.device("cpu")).float().eval()
    prompts = [[5, 6, 7], [8] * 40, [9]]
    answers = greedy(model, prompts, end=-1, max_new_tokens=6)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = list(prompt)
        with torch.inference_mode():
            for _ in range(6):
                hidden = model(Batch.without_cache(torch.tensor([ids])), None)
                ids.append(int(model.logits(hidden[-1:]).argmax()))
        assert answer == ids[len(prompt) :]


def test_a_sequence_ends_at_the_end_token_and_the_others_go_on(make_recipe, tmp_path):
    model = initial_network(make_recipe(tmp_path), torch.device("cpu")).float().eval()
    prompts = [[5, 6, 7], [8] * 40]
    free = greedy(model, prompts, end=-1, max_new_tokens=6)
    end = free[0][2]
    stopped = greedy(model, prompts, end=end, max_new_tokens=6)
    assert stopped == [tokens[: tokens.index(end)] if end in tokens else tokens for tokens in free]


def test_a_probe_scores_every_skill_in_both_languages(recipe):
    model = initial_network(recipe, torch.device("cpu")).eval()
    cells = probe(model, Tokenizer.from_file(str(EMBEDDED / "tokenizer.json")), 1, max_new_tokens=2)
    assert len(cells) == 12
    assert all(cell.num_items == 1 for cell in cells)
