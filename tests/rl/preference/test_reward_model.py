"""The reward model: Bradley-Terry by hand, what it learns, how it is saved, stopped and read again."""

import json
import math
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from keye.errors import CheckpointError, KeyeError, RecipeError
from rl.commands import posttrain
from rl.policy.scoring import Group, continued_positions, vision_inputs
from rl.preference.pairs import encode_answer, load_pairs
from rl.preference.reward_model import HEAD, RewardModel, RewardScorer, pair_loss
from rl.preference.reward_training import RewardTrainer, RewardTraining, settings_of
from stages.distributed import engine
from tests.distributed import run_distributed
from tests.rl.test_trainer import make_run


def test_the_loss_is_that_of_bradley_and_terry():
    scores = torch.tensor([[1.5, -0.5], [0.0, 0.7]], requires_grad=True)
    loss = pair_loss(scores)
    expected = [-math.log(1 / (1 + math.exp(-2.0))), -math.log(1 / (1 + math.exp(0.7)))]
    torch.testing.assert_close(loss.detach(), torch.tensor(expected), atol=1e-6, rtol=1e-6)
    loss.sum().backward()
    slope = torch.tensor([-(1 - 1 / (1 + math.exp(-2.0))), -(1 - 1 / (1 + math.exp(0.7)))])
    torch.testing.assert_close(scores.grad, torch.stack([slope, -slope], 1), atol=1e-6, rtol=1e-6)
    assert pair_loss(scores.bfloat16()).dtype == torch.float32


def test_the_number_of_steps_may_change_only_where_the_learning_rate_does_not_depend_on_it():
    constant, cosine = (
        [settings_of(RewardTraining(steps=steps, learning_rate=1e-3, schedule=name)) for steps in (5, 9)]
        for name in ("constant", "cosine")
    )
    assert constant[0] == constant[1] and cosine[0] != cosine[1]


def test_scores_and_gradients_equal_those_of_separate_sequences(model, processor, prompts):
    texts = [("red", "green and red"), ("12", "3"), ("day", "night 0")]
    scorer = RewardModel(model)
    torch.nn.init.normal_(scorer.head.weight, std=0.1)
    groups = [
        Group(sample, [encode_answer(processor, text) for text in pair], [], [True, True], list(pair))
        for pair, sample in zip(texts, prompts, strict=True)
    ]
    scores = scorer(groups).view(-1, 2)
    pair_loss(scores).sum().backward()
    ours = {name: p.grad.clone() for name, p in scorer.named_parameters() if p.grad is not None}
    scorer.zero_grad()
    separate = []
    for group in groups:
        for answer in group.completions:
            sample = group.sample
            positions = torch.cat([sample.position_ids, continued_positions(sample, len(answer))], 1)[:, None]
            ids = torch.cat([sample.input_ids, answer])[None]
            hidden = model.model(input_ids=ids, position_ids=positions, **vision_inputs([sample], torch.device("cpu")))
            separate.append(scorer.head(hidden.last_hidden_state[0, -1].float())[0])
    separate = torch.stack(separate).view(-1, 2)
    torch.testing.assert_close(scores, separate, atol=1e-4, rtol=1e-5)
    pair_loss(separate).sum().backward()
    assert max(g.abs().max() for g in ours.values()) > 1e-3
    for name, parameter in scorer.named_parameters():
        if name in ours:
            torch.testing.assert_close(ours[name], parameter.grad, atol=1e-5, rtol=1e-3)


def make_pairs_run(folder: Path) -> Path:
    """A run with 24 pairs in which the answer with a digit is better."""
    run = make_run(folder)
    rows = [
        {"messages": [{"role": "user", "content": f"{i}?"}], "chosen": str(i % 10), "rejected": "user how"}
        for i in range(24)
    ]
    (run / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


CONFIG = RewardTraining(
    steps=6, learning_rate=1e-2, heldout=0.25, batch_size=5, micro_pairs=2, checkpoint_every=4, precision="fp32"
)


class Signalled(RewardTrainer):
    """Rank 1 gets SIGTERM while the third of six steps is computed."""

    def train_step(self) -> dict:
        if self.step == 2 and self.rank == self.world - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().train_step()


def trained(run: Path, stopped: bool) -> list[str]:
    engine.start(threads=1)
    said = []
    paths = (run / "annealing/model", run / "pairs.jsonl", run / "reward")
    if stopped:
        with pytest.raises(KeyeError) as caught:
            Signalled(CONFIG, *paths).train()
        said.append(str(caught.value))
    record = RewardTrainer(CONFIG, *paths).train()
    assert record.accuracy == 1.0 and record.heldout_pairs == 6 and record.pairs == 18
    return said


@pytest.mark.slow
def test_two_processes_that_were_stopped_and_resumed_equal_one(tmp_path):
    runs = [make_pairs_run(tmp_path / name) for name in ("two", "one")]
    said = run_distributed(trained, 2, 240, runs[0], True)
    assert said == [["reward: stopped at step 3; the same command resumes from it"]] * 2
    run_distributed(trained, 1, 240, runs[1], False)
    rows = [
        [json.loads(line) for line in (run / "reward.training/metrics.jsonl").read_text().splitlines()] for run in runs
    ]
    for ours, theirs in zip(*rows, strict=True):
        assert ours["step"] == theirs["step"] and ours["loss"] == pytest.approx(theirs["loss"], abs=1e-3)
    assert rows[1][0]["loss"] == pytest.approx(math.log(2)) and rows[1][-1]["loss"] < 0.3
    two, one = (load_file(run / "reward" / HEAD)["weight"] for run in runs)
    torch.testing.assert_close(two, one, atol=2e-3, rtol=2e-2)
    check_saved(runs[1])


def check_saved(run: Path) -> None:
    """The directory is a model of transformers, and its scores tell the answers apart."""
    from keye.model.keye import KeyeForConditionalGeneration

    KeyeForConditionalGeneration.from_pretrained(run / "reward")
    scorer = RewardScorer(run / "reward", "fp32")
    pair = load_pairs(run / "pairs.jsonl").pairs[-1]
    texts = [pair.chosen, pair.rejected]
    good, bad = scorer.scores(pair.prompt.messages, pair.prompt.base_dir, texts)
    assert good > bad and 0 < scorer.standard(bad) < scorer.standard(good) < 1
    alone = [scorer.scores(pair.prompt.messages, run, [text])[0] for text in texts]
    assert alone == pytest.approx([good, bad], abs=1e-4)
    (run / "reward/reward.json").unlink()
    with pytest.raises(CheckpointError, match="has no reward_head.safetensors and reward.json"):
        RewardScorer(run / "reward")


def test_the_command_trains_the_head_alone_and_refuses_other_pairs(tmp_path, monkeypatch, capsys):
    engine.start(threads=1)
    monkeypatch.setattr(engine, "stop", lambda: None)
    run = make_pairs_run(tmp_path)
    arguments = ["--out", str(run / "reward"), "--steps", "3", "--train", "head", "--learning-rate", "0.01"]
    command = ["keye posttrain", "reward-model", str(run / "annealing/model"), str(run / "pairs.jsonl"), *arguments]
    monkeypatch.setattr(sys, "argv", command)
    posttrain.main()
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["trained"] == "head" and record["heldout_pairs"] == 2 and record["deviation"] > 0
    before, after = (load_file(run / name / "model.safetensors") for name in ("annealing/model", "reward"))
    assert all(torch.equal(after[name], value) for name, value in before.items())
    with (run / "pairs.jsonl").open("a") as file:
        file.write("\n")
    monkeypatch.setattr(sys, "argv", list(command))
    with pytest.raises(CheckpointError, match="was begun with another pairs"):
        posttrain.main()
    monkeypatch.setattr(sys, "argv", [*command, "--heldout", "1"])
    with pytest.raises(RecipeError, match="--heldout must be above 0"):
        posttrain.main()
