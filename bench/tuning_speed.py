"""LoRA tuning beside transformers' Trainer with peft: the same model, data, precision and optimizer, tokens/s of both.

    python bench/tuning_speed.py [MODEL] --lengths short|long

Both tune the same projections (`--targets`) at the same rank over the same random examples, of whose tokens a part is
trained, as many examples a step. Each runs in a process of its own, in turn, with all cores; the first steps warm up
and do not count. Tokens are those of the examples; padding counts for nobody. Transformers gets what makes it quick:
its fused attention and optimizer, examples grouped by length. `--json` prints all rounds. It measures and never fails
on a number.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

# Tokens of the examples: what short answers, and what chats with reasoning look like.
LENGTHS = {"short": (20, 200), "long": (200, 1500)}
WARM_UP = 2


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="seamount-tiny")
    parser.add_argument("--lengths", choices=LENGTHS, default="short")
    parser.add_argument("--batch", type=int, default=16, help="examples of a step")
    parser.add_argument("--micro-batch", type=int, default=8, help="examples that transformers takes at once")
    parser.add_argument("--micro-tokens", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--targets", default="linear")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arm", choices=("seamount", "transformers"), help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(run_seamount(args) if args.arm == "seamount" else run_transformers(args)))
        return
    rounds = []
    for _ in range(args.rounds):
        told = {}
        for arm in ("seamount", "transformers"):
            done = subprocess.run(
                [sys.executable, *sys.argv, "--arm", arm], capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise SystemExit(done.stderr[-3000:])
            told[arm] = json.loads(done.stdout.splitlines()[-1])
        rounds.append(told)
    report(rounds, as_json=args.json)


def report(rounds: list[dict[str, Any]], *, as_json: bool) -> None:
    """Print what was measured."""
    if as_json:
        print(json.dumps(rounds, indent=1))
        return
    for arm in rounds[0]:
        rates = [told[arm]["tokens_per_s"] for told in rounds]
        peak = max(told[arm]["peak_bytes"] for told in rounds) / 1e9
        print(
            f"{arm:13} {statistics.median(rates):8.0f} tokens/s ({min(rates):.0f} to {max(rates):.0f}), {peak:.2f} GB"
        )
    ratios = [told["seamount"]["tokens_per_s"] / told["transformers"]["tokens_per_s"] for told in rounds]
    print(f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    print("first loss", {arm: round(told["first_loss"], 4) for arm, told in rounds[0].items()})


def rows(args: argparse.Namespace, vocab_size: int) -> list[tuple[np.ndarray, int]]:
    """The examples: tokens, and from where on they are trained."""
    chance = np.random.default_rng(7)
    low, high = LENGTHS[args.lengths]
    made = []
    for _ in range(args.batch * (args.steps + WARM_UP)):
        # Many short, few long: the logarithm of the length is even.
        length = int(np.exp(chance.uniform(np.log(low), np.log(high))))
        made.append((chance.integers(10, vocab_size - 10, length).astype(np.int32), length // 3))
    return made


def peak_bytes() -> int:
    """Most memory that this process has held."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_seamount(args: argparse.Namespace) -> dict[str, float]:
    """Tune with Seamount; return tokens/s, memory, and the loss of the first step."""
    from seamount.models.config import ModelConfig
    from seamount.models.locate import locate_model
    from seamount.training.examples.example import Example
    from seamount.training.shards.dataset import ExampleList
    from seamount.training.tuning.distributed import World
    from seamount.training.tuning.network import open_network
    from seamount.training.tuning.recipe import TuneRecipe
    from seamount.training.tuning.trainer import Trainer

    config = ModelConfig.from_folder(locate_model(args.model))
    examples = []
    for tokens, start in rows(args, config.vocab_size):
        trained = np.zeros(len(tokens), bool)
        trained[start:] = True
        examples.append(Example(tokens, trained))
    longest = max(len(example.token_ids) for example in examples)
    recipe = TuneRecipe.checked(
        {
            "model": args.model,
            "output": "unused",
            "data": {"max_length": longest},
            "batch": {"examples": args.batch, "micro_tokens": max(args.micro_tokens, longest)},
            "schedule": {"steps": args.steps + WARM_UP, "kind": "constant", "warmup_share": 0.0},
            "adapter": {"rank": args.rank, "alpha": args.rank, "targets": args.targets.split(",")},
            "precision": args.precision,
            "activation_checkpointing": args.checkpointing,
        },
        where="bench",
    )
    world = World.join("cpu")
    tuned = open_network(recipe, world.device)
    records: list[Any] = []
    trainer = Trainer(recipe, tuned.model, ExampleList(examples), world=world, on_step=records.append)
    trainer.run()
    counted = records[WARM_UP:]
    rate = sum(record.num_tokens for record in counted) / sum(record.seconds for record in counted)
    return {"tokens_per_s": rate, "peak_bytes": peak_bytes(), "first_loss": records[0].loss}


def run_transformers(args: argparse.Namespace) -> dict[str, float]:
    """Tune with transformers' Trainer and peft; return the same."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    from seamount.models.config import ModelConfig
    from seamount.models.locate import locate_model
    from seamount.training.adapters.targets import chosen_modules

    torch.manual_seed(0)
    folder = locate_model(args.model)
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    names = chosen_modules(ModelConfig.from_folder(folder), tuple(args.targets.split(",")))
    config = LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=list(names), task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    if args.checkpointing:
        model.enable_input_require_grads()
    examples = [
        {"input_ids": tokens.tolist(), "labels": [-100] * start + tokens[start:].tolist()}
        for tokens, start in rows(args, model.config.vocab_size)
    ]
    ends: list[float] = []
    losses: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

        def on_log(self, _a: Any, _s: Any, _c: Any, logs: dict[str, float], **__: Any) -> None:
            losses.extend(value for name, value in logs.items() if name == "loss")

    def collate(chosen: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        width = max(len(one["input_ids"]) for one in chosen)
        counted.append(sum(len(one["input_ids"]) for one in chosen))
        padded = {
            name: torch.tensor([one[name] + [fill] * (width - len(one[name])) for one in chosen])
            for name, fill in (("input_ids", 0), ("labels", -100))
        }
        mask = torch.tensor([[1] * len(one["input_ids"]) + [0] * (width - len(one["input_ids"])) for one in chosen])
        return padded | {"attention_mask": mask}

    counted: list[int] = []
    with tempfile.TemporaryDirectory() as output:
        arguments = transformers.TrainingArguments(
            output_dir=output,
            per_device_train_batch_size=args.micro_batch,
            gradient_accumulation_steps=args.batch // args.micro_batch,
            max_steps=args.steps + WARM_UP,
            learning_rate=2e-4,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            bf16=False,  # the weights are bf16 already; autocast on top makes it slower
            train_sampling_strategy="group_by_length",
            gradient_checkpointing=args.checkpointing,
            remove_unused_columns=False,
            report_to=[],
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_num_workers=0,
        )
        trainer = transformers.Trainer(
            model=model, args=arguments, train_dataset=examples, data_collator=collate, callbacks=[Clock()]
        )
        trainer.train()
    per_step = args.batch // args.micro_batch
    tokens = sum(counted[per_step * WARM_UP : per_step * (WARM_UP + args.steps)])
    rate = tokens / (ends[-1] - ends[WARM_UP - 1])
    return {"tokens_per_s": rate, "peak_bytes": peak_bytes(), "first_loss": losses[0]}


if __name__ == "__main__":
    main()
