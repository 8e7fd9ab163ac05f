"""MFU's operations against torch's counter of what a step runs; what is logged, and where."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from keye.errors import CheckpointError, RecipeError
from stages import metrics as watch
from stages.alignment import Alignment
from stages.data.collate import pack
from stages.distributed.parallel import ParallelDims
from stages.metrics import MetricsLogger, duration, find_peak, open_tracker, operations, step_summary
from stages.multitask import Multitask
from stages.recipe import StageRecipe, VisionRecipe
from stages.vision import Vision
from tests.distributed import run_distributed
from tests.stages import small

ALONE = ParallelDims(0, 1, 1, None)


@pytest.fixture
def group():
    """A process group of this process alone, which a test before may have started."""
    started = not dist.is_initialized()
    if started:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    if started:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    made, manifest = small.processor(), small.world(tmp_path_factory.mktemp("world"))
    return made, [made.sample(line["messages"], manifest.parent) for line in small.lines(manifest)]


def counted(loss) -> int:
    """Operations of the products that run forward and backward."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("kind", [Multitask, Alignment])
def test_operations_of_a_language_step_are_those_that_run(samples, kind):
    made, chats = samples
    model = kind(StageRecipe(steps=1, learning_rate=1.0), made).prepare(small.model(made)).train()
    row = pack(chats[:6])
    text, lengths = model.config.text_config, row["cu_seqlens"].diff()
    pairs = int((lengths * (lengths - 1) // 2).sum())  # that causality hides, and the counter sees
    hidden = 3 * 4 * text.num_attention_heads * text.head_dim * pairs * text.num_hidden_layers
    # The counter sees no gradients of the patches themselves.
    known = operations(model, row) + hidden
    assert known == pytest.approx(counted(lambda: model(**row, num_items_in_batch=1.0).loss), rel=0.03)


def test_operations_of_a_vision_step_are_those_that_run(samples):
    processor, _ = samples
    made = Vision(VisionRecipe(steps=1, learning_rate=1.0), processor)
    module = made.prepare(small.model(processor)).train()
    grids = torch.tensor([[1, 4, 6], [1, 8, 8], [1, 6, 6]])
    batch = {"pixels": torch.randn(124, 3, 14, 14), "grids": grids, "owners": torch.tensor([0, 0, 1])}
    batch["captions"] = torch.randint(5, 50, (2, 48))
    # Pooling and the pairs' logits are left out.
    assert operations(module, batch) == pytest.approx(counted(lambda: made.loss(module, batch, ALONE)), rel=0.15)


def test_peak_of_a_cpu_is_measured_and_says_so():
    peak = find_peak("fp32")
    assert peak.flops > 1e8 and "measured" in peak.source


def values(step: int) -> dict[str, object]:
    return {
        "step": step, "loss": 2.0, "tokens_per_second": 10.0, "mfu": 0.5, "stall_share": 0.0, "seconds": float(step),
        "grad_norm": None, "skipped": "loss 9 is 4.5 times its running median" if step == 3 else "",
    }  # fmt: skip


def test_steps_are_told_once_and_a_resume_takes_them_up(group, tmp_path, capsys):
    def lines() -> list[dict[str, object]]:
        return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]

    with MetricsLogger("stage", 6, tmp_path, 0, main=True, summary=step_summary) as metrics_logger:
        for step in (1, 2, 3):
            metrics_logger.log(values(step))
        metrics_logger.note("step skipped: loss 9 is 4.5 times its running median")
        metrics_logger.note("")
    assert [line["eta_seconds"] for line in lines()] == [5 * 1.0, 4 * 1.5, 3 * 2.0]
    assert "stage 3/6  step skipped: loss 9 is 4.5 times its running median" in capsys.readouterr().out
    with (tmp_path / "metrics.jsonl").open("a") as out:
        out.write('{"step": 4, "lo')  # killed while it wrote
    with MetricsLogger("stage", 6, tmp_path, 2, main=True, summary=step_summary) as metrics_logger:
        metrics_logger.log(values(3))
    assert [line["step"] for line in lines()] == [1, 2, 3]
    with MetricsLogger("stage", 6, tmp_path / "other", 0, main=False, summary=step_summary) as metrics_logger:
        metrics_logger.log(values(1))
    assert not (tmp_path / "other").exists()


def test_tracker_that_is_not_installed_is_named_with_the_mend(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "trackio", None)  # Python's own way to say that there is none
    with pytest.raises(RecipeError, match="trackers names trackio, which is not installed here .*pip install trackio"):
        open_tracker("trackio")


def test_durations_read_well():
    assert [duration(s) for s in (0.4, 59, 61, 3599, 12_000, 190_000)] == [
        "0 s", "59 s", "1 min", "1 h 0 min", "3 h 20 min", "2 d 4 h",
    ]  # fmt: skip


def test_only_numbers_go_to_trackers(group, tmp_path, monkeypatch):
    heard = []

    class Heard:
        __name__ = "heard"

        def init(self, **settings):
            heard.append(settings["name"])

        def log(self, numbers, step):
            heard.append((step, sorted(numbers)))

        def finish(self):
            heard.append("finished")

    monkeypatch.setattr(watch, "open_tracker", lambda name: Heard())
    with MetricsLogger(
        "stage", 6, tmp_path / "run" / "stage", 0, True, step_summary, ("heard",), {"seed": 1}
    ) as metrics_logger:
        metrics_logger.log(values(1))
    numbers = sorted(["step", "loss", "tokens_per_second", "mfu", "stall_share", "seconds", "eta_seconds"])
    assert heard == ["run-stage", (1, numbers), "finished"]


def logger_that_fails(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        with MetricsLogger("stage", 6, folder, 0, dist.get_rank() == 0, step_summary):
            dist.barrier()  # where the other rank would wait
    return str(caught.value)


def test_metrics_that_cannot_be_opened_end_all_ranks(tmp_path):
    (tmp_path / "run").write_text("a file where the folder of the run should be")
    first, second = run_distributed(logger_that_fails, 2, 60, tmp_path / "run" / "stage")
    assert first == second and f"the metrics cannot be written to {tmp_path / 'run' / 'stage'} (" in first


def tracker_without_login(folder: Path) -> str:
    def init(**settings: object) -> None:
        raise ValueError("no API key")

    sys.modules["trackio"] = SimpleNamespace(__name__="trackio", init=init)
    with pytest.raises(RecipeError) as caught:
        with MetricsLogger("stage", 6, folder, 0, dist.get_rank() == 0, step_summary, ("trackio",)):
            dist.barrier()
    return str(caught.value)


def test_a_tracker_that_does_not_start_ends_all_ranks(tmp_path):
    first, second = run_distributed(tracker_without_login, 2, 60, tmp_path)
    assert first == second and "trackers: trackio does not start (no API key)" in first
