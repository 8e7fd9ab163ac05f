"""Compares the estimate of stages/cost/host_memory.py with the memory of processes that run on this machine.

Two gloo processes draw a model, fill the loader and its cache, read weights, train, and write checkpoints (in the
foreground and in the background) and the stage's model, with ZeRO-1, 2 and 3. Around each of these events a process
reads its anonymous memory (RssAnon of /proc/self/status); pages of files, which the system can reclaim, are not part
of it. The memory that an event adds is compared with the component of the estimate. On the CPU, weights and optimizer
are host memory as well; the part `cost` compares these. A checkpoint in the foreground needs no copy of them here, so
that component cannot be measured without a GPU.
"""

import argparse
import gc
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from keye.errors import KeyeError, run
from keye.model.config import KeyeConfig
from scripts.bench.common.process import resident
from scripts.bench.common.record import ROOT, Claim, Table, arguments, forget_other_code, out_of, save
from stages.cost.estimate import parameters_of
from stages.cost.footprint import Plan, Share
from stages.cost.host_memory import Node, host_footprint

MB = 1e6
LIMIT = 0.15
RANKS = 2
CACHE = 48  # MiB of a process
SCRATCH = ROOT / ".cache" / "bench" / "host"
MODEL = SCRATCH / "model"
EXAMPLES = """examples:
  python -m scripts.bench.stages.host           about five minutes on a quiet machine
  python -m scripts.bench.stages.host --quick   the loader and ZeRO-2
"""
RECIPE = """
name = "host"
precision = "PRECISION"
[model]
MODEL
[processor.encoder]
max_tokens = 256
[processor.image]
min_tokens = 256
max_tokens = 256
[data.world.settings]
size = [448, 448]
duration = 3.0
[data.world.counts]
image_read = IMAGES
[[data.sources]]
path = "{run}/world/train.jsonl"
kind = "image"
[multitask]
steps = 100
learning_rate = 1e-4
context = CONTEXT
global_batch_size = PACKS
zero = ZERO
mixture = { image = 1.0 }
"""


@dataclass(frozen=True)
class Case:
    """One run of the two processes: the loader and its cache, or training. zero: ZeRO's stage; 1 trains in fp32."""

    name: str
    zero: int = 2
    packs: int = 2
    context: int = 512
    images: int = 16
    data: bool = False

    @property
    def plan(self) -> Plan:
        return Plan(4 if self.zero == 1 else 2, self.zero, RANKS, fused=False, buckets=1)

    def recipe(self) -> str:
        model = 'preset = "small"\nvocab_size = 512' if self.data else f'path = "{MODEL}"'
        values = {
            "PRECISION": "fp32" if self.zero == 1 else "bf16", "MODEL": model, "IMAGES": self.images,
            "CONTEXT": self.context, "PACKS": self.packs, "ZERO": self.zero,
        }  # fmt: skip
        text = RECIPE
        for name, value in values.items():
            text = text.replace(name, str(value))
        return text


LOADER = Case("loader", packs=8, context=2048, images=320, data=True)
CASES = (LOADER, *(Case(f"ZeRO-{zero}", zero) for zero in (1, 2, 3)))
QUICK = (LOADER, CASES[2])


class Watch(threading.Thread):
    """Reads the anonymous memory of this process every few milliseconds."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most = 0
        self.start()

    def run(self) -> None:
        while True:
            self.most = max(self.most, resident("RssAnon"))
            time.sleep(0.005)

    def settled(self) -> int:
        """Bytes, once they no longer change (threads may still encode or write); restarts `most`."""
        gc.collect()
        before, steady = -1, 0
        while steady < 5:
            now = resident("RssAnon")
            steady = steady + 1 if abs(now - before) < 1 << 20 else 0
            before = now
            time.sleep(0.3)
        self.most = before
        return before

    def added(self, action: Callable[[], Any]) -> tuple[int, int]:
        """Bytes that `action` adds: (afterwards, at most in the meantime)."""
        before = self.settled()
        action()
        most = max(self.most, resident("RssAnon")) - before
        return self.settled() - before, most


def one(case: Case, folder: Path) -> dict[str, Any]:
    """Run a case in this process, one of `RANKS`. Returns event → bytes."""
    import torch.distributed as dist

    from scripts.bench.stages.cost import Case as Small
    from scripts.bench.stages.cost import Training
    from stages.distributed import engine
    from stages.distributed.ranks import first_rank
    from stages.preparation import prepare_tokenizer, prepare_world
    from stages.recipe import load

    engine.start(threads=1)
    # Libraries that are loaded once count as the process.
    Training(Small("warm-up", width=128, layers=1, tower=1, tokens=128, documents=2, zero=2)).step()
    recipe, out = load(folder / "host.toml"), folder / "run"
    first_rank(lambda: prepare_world(recipe, out))
    first_rank(lambda: prepare_tokenizer(recipe, out))
    watch = Watch()
    found = {"process": watch.settled(), **(_data if case.data else _training)(recipe, out, watch)}
    dist.barrier()
    engine.stop()
    return found


def _data(recipe: Any, out: Path, watch: Watch) -> dict[str, Any]:
    """The drawn model, the loader without and with a cache, and the size of a step."""
    import torch

    from stages.data.items import Cache
    from stages.data.quarantine import Quarantine
    from stages.distributed.parallel import build_parallel_dims
    from stages.distributed.ranks import first_rank
    from stages.distributed.weights import open_start
    from stages.multitask import Multitask
    from stages.run import batches_of, make_processor, prepare_start, start_of
    from stages.stage import open_mixture

    config, grid = recipe.multitask, build_parallel_dims(1)
    processor = make_processor(recipe, config, out)
    found: dict[str, Any] = {"drawn": watch.added(lambda: first_rank(lambda: prepare_start("multitask", recipe, out)))}
    model = open_start(start_of("multitask", recipe, out)).build(torch.float32, "meta")
    stage, batches = Multitask(config, processor), batches_of("multitask", config, grid)
    step: list[Any] = []

    def fill(cache: Cache, steps: int) -> Any:
        mixture = open_mixture("multitask", recipe, processor, grid, cache, Quarantine(), str(out))
        loader = stage.loader(mixture, grid, model, 2)
        for _ in range(steps):
            step[:] = [loader.next() for _ in range(batches)]
        return loader

    fill(Cache(0), 1).close()  # loads the libraries that read and decode
    step.clear()
    for name, size in (("samples", 0), ("samples and cache", CACHE)):
        loaders: list[Any] = []
        found[name] = watch.added(lambda size=size, loaders=loaders: loaders.append(fill(Cache(size << 20), 4)))
        found["tokens"] = sum(batch["input_ids"].numel() for batch in step)
        found["patches"] = sum(len(batch["pixel_values"]) for batch in step)
        loaders.pop().close()
        step.clear()
    return found


def _training(recipe: Any, out: Path, watch: Watch) -> dict[str, Any]:
    """The weights that are read, two steps, both kinds of checkpoint, and the stage's model."""
    from stages.data.items import Cache
    from stages.distributed.background import write_in_background
    from stages.run import open_stage, save_model

    opened: list[Any] = []
    found = {"opened": watch.added(lambda: opened.append(open_stage("multitask", recipe, out, Cache(0))))}
    trainer = opened[0].trainer
    found["steps"] = watch.added(lambda: [trainer.train_step() for _ in range(2)])
    found["checkpoint"] = watch.added(trainer.save)
    write_in_background(trainer.engine)
    trainer.recipe, trainer.step = replace(trainer.recipe, async_checkpoints=True), trainer.step + 1
    found["background"] = watch.added(trainer.save)
    trainer.finish_saving()
    found["model"] = watch.added(lambda: save_model(opened[0], out / "multitask" / "model"))
    trainer.loader.close()
    return found


def write_model() -> None:
    """The model of the training cases: 24 M parameters, a quarter of them embeddings."""
    import torch

    from keye.model.keye import KeyeForConditionalGeneration
    from keye.processor.processor import KeyeProcessor
    from keye.processor.tokenizer import train_tokenizer
    from keye.world import texts

    processor = KeyeProcessor(train_tokenizer(texts(0), 512))
    config = processor.configure(KeyeConfig.preset("small", vocab_size=8192, num_hidden_layers=2))
    config.vision_config.num_hidden_layers = 2
    torch.manual_seed(0)
    KeyeForConditionalGeneration(config).save_pretrained(MODEL)
    processor.save_pretrained(MODEL)


def launch(case: Case) -> list[dict[str, Any]]:
    """Run a case. Returns rank → event → bytes."""
    folder = SCRATCH / case.name
    results = [folder / f"{rank}.json" for rank in range(RANKS)]
    if all(path.exists() for path in results):  # measured with the same code, in a run that was interrupted
        return [json.loads(path.read_text()) for path in results]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "host.toml").write_text(case.recipe())
    # Freed blocks go back to the system immediately, so that resident memory is what is in use.
    frugal = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(RANKS)),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", __spec__.name),
        *("--one", json.dumps(asdict(case)), "--folder", str(folder)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ, **frugal})
    if done.returncode:
        raise KeyeError(f"the case {case.name} failed: {done.stderr.strip()[-3000:]}")
    return [json.loads(path.read_text()) for path in results]


Row = tuple[str, str, float, float]  # case, component, bytes measured and estimated, of all processes


def compare(case: Case, found: list[dict[str, Any]]) -> list[Row]:
    """The components of a case."""
    if case.data:
        config = KeyeConfig.from_pretrained(SCRATCH / case.name / "run" / "start")
    else:
        config = KeyeConfig.from_pretrained(MODEL)
    total, plan = sum(parameters_of(config).values()), case.plan
    process = sum(rank["process"] for rank in found) / RANKS
    step = Share(*(sum(rank.get(name, 0) for rank in found) for name in ("tokens", "patches")), 0)

    def estimate(cache: float = 0.0) -> Any:
        return host_footprint(
            config, plan, Node(RANKS, process), step, total, total, cache=cache, drawn_once=total,
            background=True, gpus=False,
        )  # fmt: skip

    def most(name: str) -> float:
        return sum(rank[name][1] for rank in found)

    def kept(name: str) -> float:
        return sum(rank[name][0] for rank in found)

    host = estimate()
    if case.data:
        cached = estimate(CACHE << 20)
        return [
            (case.name, "model drawn", found[0]["drawn"][1], host.drawn),
            (case.name, "samples", kept("samples"), host.samples),
            (case.name, "samples and cache", kept("samples and cache"), cached.samples + cached.cache),
        ]
    return [
        (case.name, "checkpoint in the background", most("background"), host.copied),
        (case.name, "stage's model, rank 0", found[0]["model"][1], host.written),
    ]


def main() -> None:
    parser: argparse.ArgumentParser = arguments(__doc__, EXAMPLES, results="stages")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        found = one(Case(**json.loads(args.one)), args.folder)
        (args.folder / f"{os.environ['RANK']}.json").write_text(json.dumps(found))
        return
    if not Path("/proc/self/status").exists():
        raise KeyeError("this part reads the memory of a process from /proc: run it on Linux")
    forget_other_code(SCRATCH)
    if not MODEL.exists():
        write_model()
    began, rows = time.monotonic(), []
    for case in QUICK if args.quick else CASES:
        found = launch(case)
        print(case.name, json.dumps(found), flush=True)
        compared = compare(case, found)
        rows += compared
        for row in compared:
            print(*row[:2], f"{row[2] / MB:.1f} MB, estimated {row[3] / MB:.1f}", flush=True)
    errors = [estimated / measured - 1 for _, _, measured, estimated in rows if measured > MB]
    worst = max(map(abs, errors))
    claim = Claim(
        "host memory by component, estimated against measured", f"within {LIMIT:.0%}",
        f"{worst:.1%} at most over {len(errors)} components", met=worst <= LIMIT,
    )  # fmt: skip
    shown = [
        (case, part, f"{measured / MB:.1f}", f"{estimated / MB:.1f}", f"{estimated / max(measured, 1) - 1:+.1%}")
        for case, part, measured, estimated in rows
    ]
    table = Table("Host memory of two processes", ("case", "component", "MB measured", "MB estimated", "error"), shown)
    notes = [
        "Two gloo processes on one machine. Measured: anonymous memory of both above that before the event; at most "
        "during the event for drawn models, checkpoints and the stage's model, afterwards for samples and cache.",
        "In the background, a rank may have written the weights before it copies the optimizer's state, if the disk is "
        "faster than the copy; the estimate has both at the same time.",
        "With ZeRO-3, the measured figure of the stage's model includes the gathered tensor and the gather's buffer, "
        "which are device memory on a GPU.",
        "Not measured, because there is no GPU: a checkpoint in the foreground (on the CPU it is written from the "
        "optimizer's own tensors), pinned memory, and inputs of layers in host memory.",
        "The seconds are those of the last run alone: measurements of the same code are kept in `.cache/bench/host`.",
    ]
    save(out_of(args), "host", [claim], [table], notes=notes, seconds=time.monotonic() - began, quick=args.quick,
         seeds={"weights": 0})  # fmt: skip


if __name__ == "__main__":
    run(main)
