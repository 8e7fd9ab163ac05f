"""MPO trains as separate sequences would, on any number of processes, and resumes where it was stopped."""

import dataclasses
import json
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from keye.errors import CheckpointError, KeyeError, ManifestError
from rl.policy.scoring import continued_positions, score, vision_inputs
from rl.preference.losses import mpo_loss
from rl.preference.pairs import Pair, encode_answer, load_pairs, pair_group
from rl.preference.recipe import Mpo, Sampling
from rl.preference.references import pair_scores
from rl.preference.trainer import MpoTrainer
from rl.recipe import HeldOut, RlRecipe
from rl.rewards import Judgement, register
from stages.distributed import engine
from stages.distributed.activation_memory import apply_memory_options
from tests.distributed import run_distributed
from tests.rl.test_trainer import make_run

GUIDE = Path(__file__).resolve().parents[3] / "docs/post-training.md"
MPO = Mpo(
    steps=4, learning_rate=1e-2, start="annealing", pairs="pairs.jsonl", batch_size=5, micro_pairs=2, max_new_tokens=2,
    checkpoint_every=3,
)  # fmt: skip
RECIPE = RlRecipe(heldout=HeldOut(limit=4, samples=1), rewards={"format": 1.0}, mpo=MPO)


@register("brief_answer")
class Brief:
    """More for fewer characters."""

    def __call__(self, judgement: Judgement) -> float:
        return 1 / (1 + len(judgement.text))


def make_pairs_run(folder: Path) -> Path:
    """A run with nine pairs; the clip of one of them cannot be read."""
    run = make_run(folder)
    rows = [
        {"messages": [{"role": "user", "content": f"{i}?"}], "chosen": str(i), "rejected": f"{9 - i} flashes"}
        for i in range(9)
    ]
    rows[4]["messages"][0]["content"] = [{"type": "video", "video": "gone.mp4"}, {"type": "text", "text": "4?"}]
    (run / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def alone(model, group) -> list[torch.Tensor]:
    """Summed log-probabilities of the answers of a pair, each read in a forward pass of its own."""
    sums = []
    for answer in group.completions:
        sample = group.sample
        ids = torch.cat([sample.input_ids, answer])[None]
        positions = torch.cat([sample.position_ids, continued_positions(sample, len(answer))], 1)[:, None]
        logits = model(input_ids=ids, position_ids=positions, **vision_inputs([sample], "cpu")).logits[0].float()
        banned = [model.config.image_token_id, model.config.video_token_id]
        table = logits.index_fill(-1, torch.tensor(banned), float("-inf")).log_softmax(-1)
        rows = table[len(sample) - 1 : -1]
        sums.append(rows.gather(-1, answer[:, None]).sum())
    return sums


def test_a_pair_reads_its_video_once_and_has_the_gradients_of_separate_sequences(
    model, processor, prompts, monkeypatch
):
    texts = [("red", "green and red"), ("12", "3"), ("day", "night 0")]
    groups = [pair_group(processor, Pair(None, a, b), sample) for (a, b), sample in zip(texts, prompts, strict=True)]
    reference, seen = torch.tensor([[-5.0, -9.0]] * 3), []
    encode = model.model.encode_vision
    monkeypatch.setattr(model.model, "encode_vision", lambda p, *a: seen.append(len(p)) or encode(p, *a))
    log_probs, lengths = pair_scores(model, groups)
    assert seen == [sum(len(s.pixel_values_videos) for s in prompts if s.pixel_values_videos is not None)]
    mpo_loss(log_probs, lengths, reference, 0.1, 0.2).loss.sum().backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    separate = torch.stack([torch.stack(alone(model, group)) for group in groups])
    torch.testing.assert_close(log_probs, separate, atol=1e-4, rtol=1e-5)
    assert lengths.tolist() == [[len(c) for c in group.completions] for group in groups]
    mpo_loss(separate, lengths, reference, 0.1, 0.2).loss.sum().backward()
    assert ours and max(g.abs().max() for g in ours.values()) > 1e-3
    for name, parameter in model.named_parameters():
        if name in ours:
            torch.testing.assert_close(ours[name], parameter.grad, atol=1e-5, rtol=1e-3)
    assert score(model, groups).owner.max() == 5


@pytest.mark.parametrize("offload", [False, True])
def test_memory_options_change_no_gradient(model, processor, prompts, offload):
    pair = Pair(None, "red", "green and red")
    groups = [pair_group(processor, pair, sample) for sample in prompts]
    found = []
    for options in ((False,), (True, offload, 2)):
        apply_memory_options(model.train(), *options)
        model.zero_grad()
        log_probs, lengths = pair_scores(model, groups)
        mpo_loss(log_probs, lengths, torch.zeros(3, 2), 0.1, 0.2).loss.sum().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("text", ["red 12", "  two lines\nof text", "<think>\nflash\n</think><answer>3</answer>"])
def test_an_answer_has_the_tokens_that_training_on_the_chat_has(processor, text):
    chat = [{"role": "user", "content": "how many?"}, {"role": "assistant", "content": text}]
    sample = processor.sample(chat)
    assert torch.equal(encode_answer(processor, text), sample.input_ids[sample.labels != -100])


class Signalled(MpoTrainer):
    """Rank 1 gets SIGTERM while the second of four steps is computed."""

    def _loss(self, *args):
        if self.step == 1 and self.rank == self.world - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return super()._loss(*args)


def stopped_and_resumed(run: Path) -> dict:
    engine.start(threads=1)
    begun = Signalled(RECIPE, run)
    with pytest.raises(KeyeError) as caught:
        begun.train()
    (run / "mpo/reference/000000.npy").rename(run / "kept.npy") if begun.rank == 0 else None
    torch.distributed.barrier()
    result = MpoTrainer(RECIPE, run).train()
    again = MpoTrainer(RECIPE, run).train()
    return {"error": str(caught.value), "result": result, "again": again == result}


def whole(run: Path) -> dict:
    engine.start(threads=1)
    trainer = MpoTrainer(RECIPE, run)
    result = trainer.train()
    return {"result": result, "reference": trainer.reference, "rounds": trainer.rounds}


def weights(run: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(run / "mpo/model/model.safetensors")


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory) -> dict:
    """Four steps in one process, and in two that are stopped after two steps and resumed."""
    runs = [make_pairs_run(tmp_path_factory.mktemp(name)) for name in ("two", "one")]
    two, [one] = run_distributed(stopped_and_resumed, 2, 240, runs[0]), run_distributed(whole, 1, 240, runs[1])
    return {"runs": runs, "two": two, "one": one}


def test_two_processes_that_were_stopped_and_resumed_equal_one(two_runs):
    (two, one), runs = (two_runs["two"], two_runs["one"]), two_runs["runs"]
    assert two[0]["error"] == two[1]["error"] == "mpo: stopped at step 2; the same command resumes from it"
    assert two[0]["again"] and one["rounds"] == 3
    rows = [[json.loads(line) for line in (run / "mpo/metrics.jsonl").read_text().splitlines()] for run in runs]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]] == [1, 2, 3, 4]
    for ours, theirs in zip(*rows, strict=True):
        for key in ("loss", "preference", "quality", "generation", "reward_chosen", "margin", "shift", "grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], abs=2e-4, rel=2e-3), key
        assert ours["tokens"] == theirs["tokens"]
    first, *_, last = rows[1]
    # The policy is the start model before the first update, so that every implicit reward is 0, but for the rounding of
    # products of matrices of other shapes, which depends on the processor.
    assert all(abs(first[key]) < 1e-6 for key in ("reward_chosen", "reward_rejected", "shift"))
    assert first["preference"] == pytest.approx(np.log(2)) and first["quality"] == pytest.approx(2 * np.log(2))
    assert last["margin"] > 0 and last["generation"] < first["generation"] and last["shift"] != 0
    ours, theirs = map(weights, runs)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, atol=2e-3, rtol=2e-2)


def test_references_are_of_the_start_model_and_unreadable_pairs_are_left_out(two_runs):
    run, one = two_runs["runs"][1], two_runs["one"]
    assert np.flatnonzero(np.isnan(one["reference"]).any(1)).tolist() == [4]
    from keye.model.keye import KeyeForConditionalGeneration
    from keye.processor.processor import KeyeProcessor

    model = KeyeForConditionalGeneration.from_pretrained(run / "annealing/model")
    processor = KeyeProcessor.from_pretrained(run / "annealing/model")
    pair = load_pairs(run / "pairs.jsonl").pairs[7]
    sample = processor.sample(pair.prompt.messages, run, add_generation_prompt=True)
    expected = torch.stack(alone(model, pair_group(processor, pair, sample))).detach()
    torch.testing.assert_close(torch.from_numpy(one["reference"][7]), expected, atol=1e-4, rtol=1e-5)
    table = GUIDE.read_text(encoding="utf-8").partition("| in `mpo/metrics.jsonl`")[2].partition("\n\n")[0]
    written = json.loads((run / "mpo/metrics.jsonl").read_text().splitlines()[0]).keys()
    assert set(re.findall(r"`([\w/]+)`", table)) == written - {"step"}
    result = json.loads((run / "mpo/eval.json").read_text())
    assert result["pairs"] == 9 and "gone.mp4" in result["rejected"][f"{run / 'pairs.jsonl'}:5"]
    assert (run / "mpo/model/processor_config.json").is_file()


def refused(run: Path) -> list[str]:
    engine.start(threads=1)
    said = []
    changed = dataclasses.replace(RECIPE, mpo=dataclasses.replace(MPO, beta=0.2))
    with pytest.raises(CheckpointError) as caught:
        MpoTrainer(changed, run)
    said.append(str(caught.value))
    MpoTrainer(dataclasses.replace(RECIPE, mpo=dataclasses.replace(MPO, micro_pairs=3, keep_checkpoints=1)), run)
    shutil.copy(run / "pairs.jsonl", run / "other.jsonl")
    with (run / "pairs.jsonl").open("a") as file:
        file.write('{"messages": [{"role": "user", "content": "?"}], "chosen": "a", "rejected": "b"}\n')
    with pytest.raises(CheckpointError) as caught:
        MpoTrainer(RECIPE, run)
    shutil.move(run / "other.jsonl", run / "pairs.jsonl")
    return [*said, str(caught.value)]


@pytest.mark.slow
def test_a_phase_refuses_another_recipe_and_other_pairs(two_runs):
    [(beta, pairs)] = run_distributed(refused, 1, 120, two_runs["runs"][1])
    assert "mpo.beta = 0.1, but the recipe says 0.2; remove" in beta
    assert "pairs.jsonl has changed since" in pairs


def sampled(run: Path) -> list[dict]:
    """Pairs of the start model's own answers, which earn by their form."""
    engine.start(threads=1)
    wanted = Sampling(samples=24, method="ranking")  # an untrained model ends one answer in six
    mpo = dataclasses.replace(MPO, pairs="", sampling=wanted, max_new_tokens=24)
    recipe = dataclasses.replace(RECIPE, mpo=mpo, rewards={"brief_answer": 1.0})
    trainer = MpoTrainer(recipe, run)
    return [dataclasses.asdict(pair) for pair in trainer.found.pairs]


@pytest.mark.slow
def test_pairs_of_the_start_models_answers_do_not_depend_on_the_number_of_processes(tmp_path):
    runs = [make_run(tmp_path / name) for name in ("one", "two")]
    [one], two = run_distributed(sampled, 1, 120, runs[0]), run_distributed(sampled, 2, 120, runs[1])
    texts = [[(p["chosen"], p["rejected"]) for p in found] for found in (one, *two)]
    assert texts[0] == texts[1] == texts[2] and len(texts[0]) >= 2
    counts = json.loads((runs[0] / "mpo/pairs.json").read_text())
    assert counts["questions"] == 9 and counts["pairs"] == len(one)


def losses(run: Path, zero: int) -> list[float]:
    engine.start(threads=1)
    MpoTrainer(dataclasses.replace(RECIPE, mpo=dataclasses.replace(MPO, steps=2, zero=zero)), run).train()
    return [json.loads(line)["loss"] for line in (run / "mpo/metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_zero_3_on_two_processes_equals_zero_2_on_one(tmp_path):
    """The ranks have different numbers of pairs, and one pair cannot be read."""
    runs = [make_pairs_run(tmp_path / name) for name in ("three", "two")]
    three, [two] = run_distributed(losses, 2, 240, runs[0], 3), run_distributed(losses, 1, 240, runs[1], 2)
    assert three[0] == three[1] == pytest.approx(two, abs=1e-4)
    ours, theirs = map(weights, runs)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, atol=2e-3, rtol=2e-2)


def test_lines_that_are_no_pairs_are_named(tmp_path):
    good = {"messages": [{"role": "user", "content": "?"}], "chosen": "a", "rejected": "b"}
    thought = {"role": "assistant", "reasoning_content": "2 flashes", "content": "2"}
    rows = [good | {"rejected": "a"}, good | {"chosen": " "}, good | {"chosen": thought}]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = load_pairs(path)
    assert "2 flashes" in found.pairs[0].chosen and "2" in found.pairs[0].chosen and len(found.pairs) == 1
    assert "chosen and rejected are the same" in found.rejected[f"{path}:1"]
    assert "chosen is ' '" in found.rejected[f"{path}:2"]
    path.write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(ManifestError, match="has no pair"):
        load_pairs(path)
