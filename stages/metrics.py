"""What is logged of a run while it trains: metrics, progress, and its speed as a share of the device's (MFU).

MFU is the share of the device's peak that the step's own operations make up (`keye.model.flops`; what is recomputed
does not count). A GPU's peak is the data-sheet value (`stages.cost.gpus`). The peak of a CPU, or of a GPU that is not
in that table, is what a large matrix product reaches here, which is measured when the run starts.
"""

import importlib
import json
import math
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from torch import Tensor, nn

from keye.errors import CheckpointError, RecipeError, writing
from keye.files import write_atomically
from keye.model import flops
from stages.cost.gpus import GPUS
from stages.data.packing.balance import rank_operations
from stages.distributed.engine import device, resolve_precision
from stages.distributed.parallel import ParallelDims, sum_over_ranks, vision_shares
from stages.distributed.ranks import first_rank

RECENT = 50  # steps that the remaining time is estimated from


@dataclass(frozen=True)
class Peak:
    """Floating-point operations a second that all processes together could reach, and where the figure is from."""

    flops: float
    source: str


def find_peak(precision: str) -> Peak:
    """The peak of all processes' devices; collective."""
    kind = resolve_precision(precision)
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name().lower()
        # The longer name first: "h200" before "h20".
        known = [gpu for gpu in GPUS.values() if gpu.name.partition("-")[0] in name]
        if known and kind == "bf16":
            mine, source = known[0].peak, f"the maker's figure for {torch.cuda.get_device_name()} in bf16"
        else:
            mine, source = _measured(kind), f"a measured matrix product in {kind} on this GPU"
    else:
        mine, source = _measured(kind), f"a measured matrix product in {kind} on this CPU, not a maker's figure"
    return Peak(float(sum_over_ranks(torch.tensor(mine, dtype=torch.float64, device=device()))), source)


def _measured(kind: str) -> float:
    """Operations a second of the best of some square products; all processes measure at the same time."""
    cuda = torch.cuda.is_available()
    size, dtype = (8192 if cuda else 768), (torch.bfloat16 if kind == "bf16" else torch.float32)
    a, best = torch.ones(size, size, dtype=dtype, device=device()), float("inf")
    for _ in range(6):
        started = time.perf_counter()
        a @ a
        if cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def operations(module: nn.Module, batch: dict[str, Any]) -> int:
    """Operations of a training step on one batch: a row of a language stage, or the pairs of the vision stage."""
    if "captions" in batch:
        frames = _sizes(batch["grids"])
        vision, text = module.visual.config, module.text.config
        words = flops.tower_layers(text, [batch["captions"].shape[1]] * len(batch["captions"]))
        return flops.TRAINING * (flops.tower(vision, frames) + words).total
    grids = [batch[name] for name in ("image_grid_thw", "video_grid_thw") if name in batch]
    frames = [size for grid in grids for size in _sizes(grid)]
    lengths = batch["cu_seqlens"].diff().tolist()
    rows = int((batch["shift_labels"] != -100).sum())
    tower, decoder = _trains(module.visual), _trains(module.language_model)
    return flops.training_step(module.config, frames, lengths, rows, tower_trains=tower, decoder_trains=decoder)


def own_operations(module: nn.Module, batch: dict[str, Any], grid: ParallelDims) -> float:
    """Operations of this rank alone: of a pack that a sequence group shares, what falls to it."""
    if grid.sequence == 1:
        return operations(module, batch)
    grids = [batch[name] for name in ("image_grid_thw", "video_grid_thw") if name in batch]
    share = vision_shares(torch.cat(grids), grid.sequence)[grid.sequence_rank] if grids else []
    labels = batch["shift_labels"].chunk(grid.sequence, dim=-1)[grid.sequence_rank]
    return rank_operations(
        module.config, share, [size for part in grids for size in _sizes(part)], batch["cu_seqlens"].diff().tolist(),
        int((labels != -100).sum()), grid.sequence, _trains(module.visual), _trains(module.language_model),
    )  # fmt: skip


def _sizes(grids: Tensor) -> list[tuple[int, int]]:
    return [(height, width) for _, height, width in grids.tolist()]


def _trains(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


# --- trackers


def open_tracker(name: str) -> ModuleType:
    """The module of "wandb" or "trackio", which have the same functions.

    Raises:
        RecipeError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RecipeError(
            f"trackers names {name}, which is not installed here ({error}); pip install {name}, or remove it"
        ) from None


class MetricsLogger:
    """Writes the metrics of one stage of training: metrics.jsonl, TensorBoard, trackers, and the progress on screen.

    Only the first rank's writes; those of other ranks compute `eta_seconds` and do nothing else. Used as a context
    that all ranks enter together.

    Args:
        name: of the stage. steps: that it has. folder: `runs/<name>/<stage>`. step: the last one that is done.
        main: whether this is the first rank. summary: a step's values → a line for the screen.
        trackers: "wandb", "trackio". config: the recipe as plain values, for the trackers.

    Raises:
        CheckpointError: on all ranks that enter the context, when the first cannot write the files.
        RecipeError: on all ranks, when a tracker does not start.
        OSError: a later line cannot be written to metrics.jsonl; on the first rank only.
    """

    def __init__(
        self, name: str, steps: int, folder: Path, step: int, main: bool, summary: Callable[[dict[str, Any]], str],
        trackers: tuple[str, ...] = (), config: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.name, self.steps, self.folder, self.step, self.main = name, steps, folder, step, main
        self.summary, self.tracker_names, self.config = summary, trackers, config or {}
        self.file = folder / "metrics.jsonl"
        self.recent: deque[float] = deque(maxlen=RECENT)
        self.live = main and sys.stdout.isatty()
        self.closing: list[Callable[[], Any]] = []
        texts = [TextColumn("{task.description:10}"), TextColumn("{task.fields[state]}")]
        self.bar = Progress(texts[0], BarColumn(), MofNCompleteColumn(), texts[1], disable=not self.live)

    def __enter__(self) -> "MetricsLogger":
        first_rank(self._open)
        self.bar.start()
        self.task = self.bar.add_task(self.name, total=self.steps, completed=self.step, state="")
        return self

    def _open(self) -> None:
        """Open all that is written to."""
        if not self.main:
            return
        from torch.utils.tensorboard import SummaryWriter

        with writing(self.folder, "the metrics", CheckpointError):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._cut()
            self.board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.step + 1)
        self.closing.append(self.board.close)
        self.trackers = [self._start(open_tracker(name)) for name in self.tracker_names]

    def _cut(self) -> None:
        """Drop the lines of later steps, which a resumed run takes again, and a line that was not finished."""
        if self.file.exists():
            rows = read_metrics(self.file, self.step)
            write_atomically(self.file, "".join(json.dumps(row) + "\n" for row in rows))

    def _start(self, tracker: ModuleType) -> Any:
        """One run of the tracker a stage, grouped by the run's folder; a resumed stage continues it."""
        run = f"{self.folder.parent.name}-{self.name}"
        more = {"dir": str(self.folder), "id": run} if tracker.__name__ == "wandb" else {}
        group = self.folder.parent.name
        try:
            tracker.init(project="keye", name=run, group=group, config=self.config, resume="allow", **more)
        except Exception as error:  # noqa: BLE001 - trackers raise errors of their own, such as for a missing login
            name = tracker.__name__
            raise RecipeError(f"trackers: {name} does not start ({error}); set it up, or remove it") from error
        self.closing.append(tracker.finish)
        return tracker

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()
        for close in self.closing:
            close()

    def log(self, values: dict[str, Any]) -> None:
        """Write one step's values, `step` and `seconds` among them; `eta_seconds` is added to them."""
        self.step = values["step"]
        self.recent.append(values["seconds"])
        values["eta_seconds"] = sum(self.recent) / len(self.recent) * (self.steps - self.step)
        if not self.main:
            return
        with self.file.open("a") as out:
            out.write(json.dumps(values) + "\n")
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        for name, value in numbers.items():
            self.board.add_scalar(name, value, self.step)
        for tracker in self.trackers:
            tracker.log(numbers, step=self.step)
        state = self.summary(values)
        self.bar.update(self.task, completed=self.step, state=state)
        every = max(1, self.steps // 10)
        if not self.live and (self.step % every == 0 or self.step == 1):
            print(f"{self.name} {self.step}/{self.steps}  {state}", flush=True)

    def note(self, text: str) -> None:
        """Print a sentence about the present step; an empty one is not printed."""
        if self.main and text:
            line = f"{self.name} {self.step}/{self.steps}  {text}"
            self.bar.console.print(line, markup=False, highlight=False, soft_wrap=True)


def read_metrics(path: Path, until: float = math.inf) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl up to step `until`; empty without the file.

    Lines that a killed process left unfinished are skipped.
    """
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int) and row["step"] <= until:
            rows.append(row)
    return rows


def step_summary(values: dict[str, Any]) -> str:
    """A pre-training step's values as a line."""
    smaller = f"{values['thinned']:,} thinned  " if values.get("thinned") else ""
    held = f"held-out {values['heldout_loss']:.3f}  " if "heldout_loss" in values else ""
    return (
        f"loss {values['loss']:.3f}  {held}{values['tokens_per_second']:,.0f} tokens/s  "
        f"MFU {values['mfu'] * 100:.1f} %  stall {values['stall_share'] * 100:.0f} %  {smaller}"
        f"{duration(values['eta_seconds'])} left"
    )


def duration(seconds: float) -> str:
    """59 s, 12 min, 3 h 20 min, 2 d 4 h."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours = minutes // 60
    return f"{hours} h {minutes % 60} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"
