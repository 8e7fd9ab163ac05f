"""ZeRO-3, recomputation, offload and LoRA: a run trains the same policy, or the adapter alone."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from keye.checkpoint.shards import open_checkpoint
from keye.model.keye import KeyeForConditionalGeneration
from rl.trainer import GspoTrainer
from stages.distributed import engine
from tests.distributed import run_distributed
from tests.rl.test_identity import recipe_of
from tests.rl.test_trainer import make_run

PLAIN = {"learning_rate": 1e-4, "max_grad_norm": 0.0}
SAVING = PLAIN | {"checkpointing": True, "micro_batch_tokens": 40, "mlp_tiles": 2}
RUNS: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "zero3": SAVING | {"zero": 3},
    "offload": SAVING | {"offload": True, "offload_optimizer": True},
    "shared rows": SAVING | {"zero": 3, "sequence_parallel": 2},
}


def train_all(runs: dict[str, Path]) -> None:
    engine.start(threads=1)
    for name, run in runs.items():
        GspoTrainer(recipe_of(1, "variety", **RUNS[name]), run).train()


def test_options_that_save_memory_train_the_same_policy(tmp_path):
    """Two processes sample the same answers, and two optimizer steps end at the same weights."""
    runs = {name: make_run(tmp_path / name) for name in RUNS}
    run_distributed(train_all, 2, 300, runs)
    start = open_checkpoint(runs["plain"] / "annealing/model")
    plain = open_checkpoint(runs["plain"] / "gspo/model")
    lines = [json.loads((run / "gspo/metrics.jsonl").read_text().splitlines()[0]) for run in runs.values()]
    assert lines[0]["grad_norm"] > 1e-2 and lines[0]["informative"] > 0.5
    for name, line in zip(RUNS, lines, strict=True):
        for key in ("reward_mean", "response_length", "entropy", "loss", "grad_norm", "tokens"):
            assert line[key] == pytest.approx(lines[0][key], rel=1e-4, abs=1e-6), (name, key)
        found = open_checkpoint(runs[name] / "gspo/model")
        for tensor in plain:
            before, one, other = (part[tensor].read().double() for part in (start, plain, found))
            moved = (one - before).norm()
            # Adam divides by the gradient's size, which for a gradient near zero is that of its rounding.
            assert (one - other).norm() <= 0.05 * moved + 1e-9, (name, tensor)


def train_lora(run: Path, zero: int) -> None:
    engine.start(threads=1)
    settings = PLAIN | {"zero": zero, "lora_rank": 2, "lora_alpha": 4.0, "learning_rate": 1e-2, "kl": 0.01}
    recipe = recipe_of(1, "variety", checkpointing=True, **settings)
    trainer = GspoTrainer(recipe, run)
    assert trainer.update.reference is None  # KL compares with the policy without LoRA
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained and all(".lora_" in name for name in trained)
    trainer.train()
    longer = dataclasses.replace(recipe, gspo=dataclasses.replace(recipe.gspo, steps=2))
    resumed = GspoTrainer(longer, run)
    resumed.train()
    assert resumed.step == 2


@pytest.mark.parametrize(("zero", "world"), [(2, 1), pytest.param(3, 2, marks=pytest.mark.slow)])
def test_lora_trains_alone_and_is_written_merged_and_as_an_adapter(tmp_path, zero, world):
    run = make_run(tmp_path)
    run_distributed(train_lora, world, 300, run, zero)
    start, end = (open_checkpoint(run / name / "model") for name in ("annealing", "gspo"))
    adapter = load_file(run / "gspo/model/adapter/adapter_model.safetensors")
    changed = 0
    for name in start:
        before, after = start[name].read().float(), end[name].read()
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" in adapter:
            change = 2.0 * adapter[f"{stem}.lora_B.weight"] @ adapter[f"{stem}.lora_A.weight"]
            torch.testing.assert_close(after, before + change)
            changed += int(change.abs().max() > 1e-4)
        else:
            assert torch.equal(after, before), name
    assert changed == len(adapter) // 2 == 7  # q, k, v, o, gate, up and down of one layer
    merged = KeyeForConditionalGeneration.from_pretrained(run / "gspo/model")
    base = KeyeForConditionalGeneration.from_pretrained(run / "annealing/model")
    adapted = peft.PeftModel.from_pretrained(base, run / "gspo/model/adapter")
    ids = torch.arange(40, 60)[None]
    with torch.no_grad():
        torch.testing.assert_close(adapted(input_ids=ids).logits, merged(input_ids=ids).logits, atol=1e-5, rtol=1e-4)
