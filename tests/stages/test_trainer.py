"""The step is the same however it is spread; a resumed run is the uninterrupted one; what is bad is passed over."""

import io
import json
import os
import signal
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from keye.errors import KeyeError
from keye.model import flops
from stages import recipe as recipes
from stages.data.collate import pack
from stages.data.items import Cache
from stages.data.loader import Loader
from stages.data.quarantine import Quarantine
from stages.distributed import engine as deep
from stages.distributed.parallel import ParallelDims, build_parallel_dims, share_frames
from stages.multitask import Multitask
from stages.optimizer import learning_rate_factor
from stages.recipe import StageRecipe
from stages.stage import open_mixture
from stages.trainer import Trainer, micro_batches
from tests.distributed import run_distributed
from tests.stages import small

RECIPE = StageRecipe(
    steps=6, learning_rate=1e-3, context=160, global_batch_size=2, warmup=1, weight_decay=0.1, max_grad_norm=0.5,
    checkpoint_every=2,
    mixture={"video": 0.6, "image": 0.3, "text": 0.1},
)  # fmt: skip


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    return small.world(tmp_path_factory.mktemp("world"))


class BalancedPacker:
    """A stream of given packs; rank r of n takes every n-th, beginning with the r-th."""

    def __init__(self, rows: list[dict[str, Any]], grid: ParallelDims) -> None:
        self.rows, self.at, self.size = rows, grid.data_rank, grid.data_size

    def next(self) -> dict[str, Any]:
        self.at += self.size
        return self.rows[self.at - self.size]

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]

    def close(self) -> None:
        """Nothing runs."""


def parameters(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def read(folder: Path, key: str = "loss") -> list[float]:
    return [json.loads(line)[key] for line in (folder / "metrics.jsonl").read_text().splitlines()]


# --- the same global batch on one process, on two with a pack each, on two that share each pack


def three_steps(manifest: Path, folder: Path, sequence: int, zero: int) -> tuple[list[float], dict[str, Tensor]]:
    """Three steps of two packs each, whatever the grid; losses and parameters."""
    deep.start(threads=1)
    made, grid = small.processor(), build_parallel_dims(sequence)
    samples = [made.sample(line["messages"], manifest.parent) for line in small.lines(manifest)]
    # Packs of very unequal numbers of labels, so that a mean of means would show.
    parts = [samples[0:1], samples[4:12], samples[1:3], samples[5:6], samples[3:7], samples[8:9]]
    rows = [{**pack(part, 2), "kinds": {"video": 1}} for part in parts]
    stage, model = Multitask(RECIPE, made), small.model(made).train()
    loader = Loader(BalancedPacker(rows, grid), grid)
    recipe = replace(RECIPE, zero=zero, sequence_parallel=sequence)
    count = micro_batches("multitask", RECIPE.global_batch_size, grid)
    trainer = Trainer(stage, model, loader, grid, recipe, folder, count, "fp32")
    steps = [trainer.train_step() for _ in range(3)]
    assert [step["imbalance"] for step in steps] == pytest.approx(imbalances(rows, grid, model.config), rel=1e-4)
    losses = [step["loss"] for step in steps]
    loader.close()
    return losses, parameters(model)


def imbalances(rows: list[dict[str, Any]], grid: ParallelDims, config: Any) -> list[float]:
    """Of steps of two packs each; a rank alone waits for none."""
    if grid.world == 1:
        return [0.0] * 3
    costs = []
    for row in rows:
        lengths, labels = row["cu_seqlens"].diff().tolist(), row["shift_labels"][0] != -100
        grids = [row[name][:, 1:].tolist() for name in ("image_grid_thw", "video_grid_thw") if name in row]
        frames = [(height, width) for both in grids for height, width in both]
        whole = flops.training_step(config, frames, lengths, int(labels.sum()))
        if grid.sequence == 1:
            costs.append([whole])
            continue
        text, half = config.text_config, len(labels) // 2
        words, shares = flops.decoder(text, lengths), share_frames([h * w + (h * w) ** 2 / 6800 for h, w in frames], 2)
        costs.append(
            [
                3 * (words.total / 2 + flops.head(text, int(part.sum())).total)
                + sum(flops.training_step(config, [frames[i]], [], 0) for i in mine)
                for part, mine in zip(labels.split(half), shares, strict=True)
            ]
        )
    rounds = costs if grid.sequence == 2 else [[*a, *b] for a, b in zip(costs[::2], costs[1::2], strict=True)]
    steps = [rounds[i : i + len(rounds) // 3] for i in range(0, len(rounds), len(rounds) // 3)]
    return [sum(map(max, step)) / sum(sum(r) / 2 for r in step) - 1 for step in steps]


def three_steps_of_each(manifest: Path, folder: Path) -> list[tuple[list[float], dict[str, Tensor]]]:
    return [three_steps(manifest, folder / str(sequence), sequence, zero) for sequence, zero in ((1, 2), (2, 1))]


@pytest.fixture(scope="module")
def alone(manifest, tmp_path_factory) -> tuple[list[float], dict[str, Tensor]]:
    return run_distributed(three_steps, 1, 300, manifest, tmp_path_factory.mktemp("alone"), 1, 2)[0]


@pytest.fixture(scope="module")
def in_two(manifest, tmp_path_factory) -> list[list[tuple[list[float], dict[str, Tensor]]]]:
    return run_distributed(three_steps_of_each, 2, 300, manifest, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize(("way", "rank"), [(0, 0), (0, 1), (1, 0), (1, 1)], ids=["dp-0", "dp-1", "sp-0", "sp-1"])
def test_two_processes_equal_one_after_three_steps(alone, in_two, way, rank):
    losses, wanted = alone
    got_losses, got = in_two[rank][way]
    assert got_losses == pytest.approx(losses, rel=1e-5) and losses[2] < losses[0]
    for name, value in wanted.items():
        # Softmax does not see a key's bias: its gradient is rounding noise, which Adam blows up to a whole step.
        if not name.endswith("k_proj.bias"):
            torch.testing.assert_close(got[name], value, atol=2e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


# --- stopping, resuming, torn checkpoints


class Stopped(Multitask):
    """Gets SIGTERM while it computes its third step."""

    calls = 0

    def loss(self, module: nn.Module, batch: dict[str, Any], grid: ParallelDims) -> Tensor:
        self.calls += 1
        if self.calls == 2 * RECIPE.global_batch_size + 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().loss(module, batch, grid)


def trainer_of(kind: type[Multitask], manifest: Path, folder: Path, seed: int = 0) -> tuple[Trainer, nn.Module]:
    made, grid = small.processor(), build_parallel_dims(1)
    sources = tuple(recipes.SourceRecipe(str(manifest), k) for k in ("video", "image", "text"))
    whole = recipes.Recipe("test", recipes.DataRecipe(sources), multitask=RECIPE)
    mixture = open_mixture("multitask", whole, made, grid, Cache(1 << 24), Quarantine(), "")
    stage, model = kind(RECIPE, made), small.model(made, seed).train()
    loader = stage.loader(mixture, grid, model, 1)
    return Trainer(stage, model, loader, grid, RECIPE, folder, RECIPE.global_batch_size, "fp32"), model


def interrupted(manifest: Path, folder: Path) -> dict[str, Any]:
    deep.start(threads=1)
    found: dict[str, Any] = {}
    whole, model = trainer_of(Multitask, manifest, folder / "whole")
    whole.run()
    found["whole"] = parameters(model)
    begun, _ = trainer_of(Stopped, manifest, folder / "begun")
    try:
        begun.run()
    except KeyeError as error:
        found["said"] = str(error)
    found["saved"] = [path.name for path in small.complete_checkpoints(folder / "begun" / "checkpoints")]
    # Another beginning, to see that all of it is put back.
    resumed, model = trainer_of(Multitask, manifest, folder / "begun", seed=1)
    found["from"] = resumed.step
    resumed.run()
    found["resumed"] = parameters(model)
    newest = folder / "whole" / "checkpoints" / "step-6"
    with (newest / "state-0.pt").open("ab") as out:
        out.write(b"!")
    passed_over, model = trainer_of(Multitask, manifest, folder / "whole", seed=1)
    found["after a torn one"] = passed_over.step
    passed_over.run()
    found["repeated"] = parameters(model)
    return found


@pytest.fixture(scope="module")
def stopped(manifest, tmp_path_factory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("stopped")
    return run_distributed(interrupted, 1, 300, manifest, folder)[0], folder


def test_sigterm_saves_at_the_end_of_the_step_and_says_so(stopped):
    found, _ = stopped
    assert found["said"] == "multitask: stopped at step 3; the same command resumes from it"
    assert found["saved"] == ["step-2", "step-3"] and found["from"] == 3


def test_resumed_run_is_the_uninterrupted_one_bit_for_bit(stopped):
    found, folder = stopped
    for key in ("loss", "step", "tokens", "lr", "grad_norm", "tokens_video"):
        assert read(folder / "begun", key) == read(folder / "whole", key), key
    assert read(folder / "begun", "step") == list(range(1, RECIPE.steps + 1))
    assert all(torch.equal(found["resumed"][name], value) for name, value in found["whole"].items())


def test_torn_checkpoint_is_passed_over_for_the_one_before(stopped):
    found, _ = stopped
    assert found["after a torn one"] == 4
    assert all(torch.equal(found["repeated"][name], value) for name, value in found["whole"].items())


# --- losses that are not finite


class NotFinite(Multitask):
    """The loss of some calls (from 0) is not a number."""

    bad: tuple[int, ...] | range = ()
    calls = -1

    def loss(self, module: nn.Module, batch: dict[str, Any], grid: ParallelDims) -> Tensor:
        self.calls += 1
        loss = super().loss(module, batch, grid)
        return loss * float("nan") if self.calls in self.bad else loss


class Explodes(NotFinite):
    """The loss is finite, but the gradient of some calls is not: that of a root at 0."""

    def loss(self, module: nn.Module, batch: dict[str, Any], grid: ParallelDims) -> Tensor:
        self.calls += 1
        loss = Multitask.loss(self, module, batch, grid)
        return loss + (loss * 0).sqrt() if self.calls in self.bad else loss


def explodes(manifest: Path, folder: Path) -> tuple[list[dict[str, Any]], bool, bool, str]:
    deep.start(threads=1)
    trainer, model = trainer_of(Explodes, manifest, folder)
    trainer.stage.bad = (3,)  # the second batch of step 2
    values, before = [trainer.train_step()], parameters(model)
    values.append(trainer.train_step())
    same = all(torch.equal(value, before[name]) for name, value in parameters(model).items())
    values.append(trainer.train_step())
    trainer.loader.close()
    with redirect_stdout(io.StringIO()) as out, trainer.metrics_logger:
        for one in values:
            trainer._log(one)
    return values, same, all(bool(torch.isfinite(p).all()) for p in model.parameters()), out.getvalue()


def test_step_with_a_gradient_that_is_not_finite_is_skipped_and_counted(manifest, tmp_path):
    values, same, finite, printed = run_distributed(explodes, 1, 300, manifest, tmp_path / "run")[0]
    assert [value["not_finite"] for value in values] == [0, 1, 0] and same and finite
    assert all(torch.isfinite(torch.tensor(value["loss"])) for value in values)
    steps = [values[i + 1]["lr"] != values[i]["lr"] for i in range(2)]
    assert steps == [True, True]  # the schedule goes on
    assert printed.count("step skipped") == 1 and "multitask 2/6  step skipped: not finite\n" in printed


def not_finite(manifest: Path, folder: Path) -> dict[str, Any]:
    deep.start(threads=1)
    trainer, model = trainer_of(NotFinite, manifest, folder)
    trainer.stage.bad = (3, 4, 5)  # the second batch of step 2, both of step 3
    values, states = [], []
    for _ in range(4):
        values.append(trainer.train_step())
        states.append(parameters(model))
    said, trainer.stage.bad = "", range(1000)
    try:
        for _ in range(30):
            trainer.train_step()
    except KeyeError as error:
        said = str(error)
    trainer.loader.close()
    same = [all(torch.equal(a[n], b[n]) for n in a) for a, b in zip(states, states[1:], strict=False)]
    finite = all(bool(torch.isfinite(p).all()) for p in model.parameters())
    return {"values": values, "same": same, "said": said, "finite": finite}


@pytest.fixture(scope="module")
def skipped(manifest, tmp_path_factory) -> dict[str, Any]:
    return run_distributed(not_finite, 1, 300, manifest, tmp_path_factory.mktemp("nan"))[0]


def test_step_with_a_loss_that_is_not_finite_is_skipped_and_counted(skipped):
    assert [value["not_finite"] for value in skipped["values"]] == [0, 1, 2, 0]
    assert skipped["same"] == [True, True, False] and skipped["finite"]
    assert all(value["lr"] > 0 for value in skipped["values"])


def test_run_is_given_up_when_no_loss_is_finite_any_more(skipped):
    assert skipped["said"] == "multitask: the loss was not finite 21 times in a row; lower its learning_rate"


# --- small pieces


def test_learning_rate_rises_and_falls():
    rates = [learning_rate_factor(step, 10, 2, "cosine") for step in range(11)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1.0]) and rates[10] == pytest.approx(0)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert [learning_rate_factor(step, 10, 2, "constant") for step in (2, 9)] == [1.0, 1.0]


def test_packs_that_the_ranks_cannot_share_are_named():
    with pytest.raises(KeyeError, match=r"multitask: the 3 packs of global_batch_size cannot be shared by 2 ranks"):
        micro_batches("multitask", 3, ParallelDims(0, 2, 1, None))
    assert micro_batches("multitask", 6, ParallelDims(0, 4, 2, None)) == 3
