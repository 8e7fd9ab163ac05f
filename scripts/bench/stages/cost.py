"""Estimates of stages/cost/estimate.py compared with measured steps: peak memory and time of small runs on the CPU.

Each case runs in one process with the real engine for the peak of resident memory, and in another process that
alternates with the base case for the time. The base case gives the share of the machine's matrix rate from which the
time of the case is estimated; memory is estimated from shapes. Measurements are saved, so that an interrupted bench
resumes.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from keye.errors import KeyeError, run
from keye.model.config import KeyeConfig, KeyeVisionConfig
from scripts.bench.common.process import in_process, resident
from scripts.bench.common.record import ROOT, Claim, Table, arguments, forget_other_code, out_of, save
from stages.cost.estimate import Work, parameters_of, step_flops, step_seconds
from stages.cost.footprint import Plan, Share, footprint
from stages.cost.gpus import Gpu
from stages.recipe import StageRecipe

MIB = 1 << 20
LIMIT = 0.15
VOCABULARY = 4096
SIDE = 8  # patches along a frame
SCRATCH = ROOT / ".cache" / "bench" / "cost"
EXAMPLES = """examples:
  python -m scripts.bench.stages.cost           about fifteen minutes on a quiet machine
  python -m scripts.bench.stages.cost --quick   three cases, which prove nothing (two minutes)
"""


@dataclass(frozen=True)
class Case:
    """One training: the decoder's width and layers, the tower's layers (its width is the decoder's half), tokens of a
    pack, documents in it, and the settings of a stage."""

    name: str
    width: int = 512
    layers: int = 6
    tower: int = 4
    tokens: int = 2048
    documents: int = 4
    zero: int = 1
    checkpointing: bool = False
    mlp_tiles: int = 1
    stage: str = "multitask"

    def config(self) -> KeyeConfig:
        heads = self.width // 64
        text = {
            "model_type": "qwen3", "hidden_size": self.width, "intermediate_size": 3 * self.width, "head_dim": 64,
            "num_hidden_layers": self.layers, "num_attention_heads": heads, "num_key_value_heads": heads // 2,
            "vocab_size": VOCABULARY, "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        }  # fmt: skip
        vision = KeyeVisionConfig(
            hidden_size=self.width // 2, intermediate_size=2 * self.width, num_hidden_layers=self.tower,
            num_attention_heads=heads,
        )  # fmt: skip
        return KeyeConfig(vision_config=vision, text_config=text, image_token_id=1, video_token_id=2)

    def recipe(self) -> StageRecipe:
        return StageRecipe(
            steps=1, learning_rate=1e-4, context=self.tokens, global_batch_size=1, zero=self.zero,
            checkpointing=self.checkpointing, mlp_tiles=self.mlp_tiles,
        )  # fmt: skip

    def work(self) -> Work:
        """Half of a pack is visual, a quarter labelled."""
        frames = self.tokens // 2 // (SIDE * SIDE // 4)
        return Work([self.tokens // self.documents] * self.documents, [(SIDE, SIDE)] * frames, self.tokens // 4)


BASE = Case("base")
CASES = (
    BASE,
    Case("longer", tokens=4096),
    Case("shorter", tokens=1024),
    Case("one document", documents=1),
    Case("wider", width=640),
    Case("narrower", width=384),
    Case("deeper", layers=12),
    Case("deeper tower", tower=12),
    Case("ZeRO-2", zero=2),
    Case("recomputed", checkpointing=True),
    Case("recomputed, longer", tokens=4096, checkpointing=True),
    Case("recomputed, MLP in 4 tiles", checkpointing=True, mlp_tiles=4),
    Case("alignment", stage="alignment"),
)
QUICK = (BASE, Case("shorter", tokens=1024), Case("recomputed", checkpointing=True))


def pack_of(case: Case) -> dict[str, torch.Tensor]:
    """A random pack of the case's work: documents that each begin with their frames."""
    torch.manual_seed(0)
    work = case.work()
    ids = torch.randint(3, VOCABULARY, (1, case.tokens))
    length, visual = work.documents[0], work.patches // 4 // case.documents
    for start in range(0, case.tokens, length):
        ids[0, start : start + visual] = 2
    labels = torch.full_like(ids, -100)
    labels[0, length - case.tokens // 4 // case.documents :] = -100
    for start in range(0, case.tokens, length):
        labels[0, start + length - work.labels // case.documents : start + length] = 5
    bounds = torch.arange(0, case.tokens + 1, length)
    return {
        "input_ids": ids,
        "shift_labels": labels,
        "cu_seqlens": bounds,
        "pixel_values_videos": torch.randint(0, 256, (work.patches, 3, 14, 14), dtype=torch.uint8),
        "video_grid_thw": torch.tensor([[1, SIDE, SIDE]] * len(work.frames)),
    }


def one(case: Case, steps: int) -> dict[str, Any]:
    """Train here. Without steps: bytes above the start at the peak of a step. Else seconds of so many, and of BASE's.

    The two alternate in one process, so that other load affects both.
    """
    from stages.distributed import engine as deep

    deep.start(threads=1)
    Training(Case("warm-up", width=128, layers=1, tower=1, tokens=128, documents=2)).step()  # loads what is loaded once
    before = resident("VmRSS")
    trainings = [Training(case)] if not steps else [Training(case), Training(BASE)]
    for training in trainings:
        training.step()  # makes the optimizer's states
    Path("/proc/self/clear_refs").write_text("5")  # what building took does not count
    seconds: list[list[float]] = [[] for _ in trainings]
    for number in range(steps or 1):
        order = list(zip(trainings, seconds, strict=True))
        for training, taken in order if number % 2 else order[::-1]:
            taken.append(training.step())
    peak = resident("VmHWM") - before
    rates = {"rate": matrix_rate(), "bandwidth": copy_rate()}
    deep.stop()
    return {"seconds": seconds[0], "base": seconds[1], **rates} if steps else {"peak": peak}


class Training:
    """A case ready to be trained on its pack."""

    def __init__(self, case: Case, compiled: bool = False) -> None:
        from keye.model.keye import KeyeForConditionalGeneration
        from stages.distributed import engine as deep
        from stages.distributed.activation_memory import apply_memory_options

        torch.manual_seed(0)
        model, settings = KeyeForConditionalGeneration(case.config()), case.recipe()
        apply_memory_options(model, settings.checkpointing, settings.offload, settings.mlp_tiles, compiled)
        if case.stage == "alignment":
            model.requires_grad_(False).projector.requires_grad_(True)
        self.case, self.pack = case, pack_of(case)
        self.engine = deep.build(model.train(), settings, 100, zero=settings.zero, precision="fp32")

    def step(self) -> float:
        """Seconds of the processor."""
        began = time.process_time()
        self.engine.backward(self.engine(**self.pack, num_items_in_batch=float(self.case.tokens // 4)).loss)
        self.engine.step()
        return time.process_time() - began


def matrix_rate() -> float:
    """Operations a second of a large product: the fastest of five."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    return 2 * 1024**3 / min(_timed(lambda: a @ b) for _ in range(5))


def copy_rate() -> float:
    """Bytes a second, read and written, of a copy of 128 MB: the fastest of five."""
    a = torch.zeros(32 * MIB)
    b = torch.empty_like(a)
    return 2 * a.nbytes / min(_timed(lambda: b.copy_(a)) for _ in range(5))


def _timed(call: Any) -> float:
    began = time.process_time()
    call()
    return time.process_time() - began


def alone(case: Case, steps: int) -> dict[str, Any]:
    """In two processes: one for the memory, and one for the time, which may keep what it frees."""
    # Freed blocks go back to the system at once, so that resident memory is what is held; that takes time of its own.
    frugal = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    found: dict[str, Any] = {}
    for count, environment in ((steps, {}), (0, frugal)):
        options = ["--one", json.dumps(asdict(case)), "--steps", str(count)]
        found |= in_process(__spec__.name, options, f"the case {case.name}", {"OMP_NUM_THREADS": "1", **environment})
    return found


def estimated(case: Case) -> tuple[float, float, int]:
    """(bytes at the peak, operations of a step, parameters that train) from the shapes alone."""
    config, settings, work = case.config(), case.recipe(), case.work()
    counts = parameters_of(config)
    frozen = case.stage == "alignment"
    total = sum(counts.values())
    trained = counts["projector"] if frozen else total
    plan = Plan(4, case.zero, 1, case.checkpointing, settings.offload, case.mlp_tiles, fused=False, buckets=1)
    share = Share(case.tokens, work.patches, work.labels)
    made = footprint(config, plan, share, total, trained, frozen)
    return made.peak, step_flops(config, case.stage, work, settings)[1], trained


def measure(cases: tuple[Case, ...], steps: int, record: Path) -> dict[str, dict[str, Any]]:
    """Case → what was measured; kept in `record` as it comes."""
    found = json.loads(record.read_text()) if record.exists() else {}
    for number, case in enumerate(cases, 1):
        key = json.dumps([asdict(case), steps])
        if key not in found:
            found[key] = alone(case, steps)
            record.parent.mkdir(parents=True, exist_ok=True)
            record.write_text(json.dumps(found, indent=1))
        taken = found[key]
        said = f"{taken['peak'] / MIB:.0f} MB, {median(taken['seconds']) / median(taken['base']):.2f} × base's time"
        print(f"{number}/{len(cases)}  {case.name}: {said}", flush=True)
    return {case.name: found[json.dumps([asdict(case), steps])] for case in cases}


def main() -> None:
    parser: argparse.ArgumentParser = arguments(__doc__, EXAMPLES, results="stages")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=5, help="steps of each that are timed (5)")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(Case(**json.loads(args.one)), args.steps)))
        return
    if not Path("/proc/self/clear_refs").exists():
        raise KeyeError("the peak of a process is read from /proc, which this system has not: run this part on Linux")
    forget_other_code(SCRATCH)
    began, cases, steps = time.monotonic(), (QUICK if args.quick else CASES), 2 if args.quick else args.steps
    taken = measure(cases, steps, SCRATCH / "cases.json")
    rows, memory, seconds = [], [], []
    for case in cases:
        found, (peak, done, trained), (_, of_base, in_base) = taken[case.name], estimated(case), estimated(BASE)
        # The share of the matrix rate that BASE reaches in this process is taken to be the case's.
        machine = Gpu("cpu", 0.0, found["rate"], found["bandwidth"], 0.0)
        base, real = median(found["base"]), median(found["seconds"])
        utilisation = of_base / found["rate"] / (base - step_seconds(0.0, in_base, machine, 1, 1.0))
        expected = step_seconds(done, trained, machine, 1, utilisation)
        memory.append(peak / found["peak"] - 1)
        if case is not BASE:
            seconds.append(expected / real - 1)
        rows.append(
            (
                case.name, f"{found['peak'] / MIB:.0f}", f"{peak / MIB:.0f}", f"{memory[-1]:+.1%}",
                f"{base:.2f}", f"{real:.2f}", f"{expected:.2f}", f"{expected / real - 1:+.1%}",
            )
        )  # fmt: skip
    claims = [
        _claim("peak memory of a step, estimated against measured", memory),
        _claim("time of a step, estimated from that of the base case, against measured", seconds),
    ]
    columns = ("case", "MB measured", "MB estimated", "off by", "s of base", "s measured", "s estimated", "off by")
    notes = [
        "One thread. A process trains the case and the base case in turn; from the share of the matrix rate that the "
        "base case has there, the case's time is estimated. Seconds are the processor's, medians. Memory is resident "
        "memory at the peak of a step above the process's own before the model was built.",
        "Base: decoder of width 512 with 6 layers, tower of width 256 with 4, a pack of 2,048 tokens, half of them "
        "visual, in 4 documents, fp32, ZeRO-1; the others change what their name says.",
    ]
    save(
        out_of(args), "cost", claims, [Table("Steps estimated and run", columns, rows)], notes=notes,
        seconds=time.monotonic() - began, quick=args.quick, seeds={"weights and pack": 0}
    )  # fmt: skip


def _claim(what: str, errors: list[float]) -> Claim:
    worst = max(map(abs, errors))
    figure = f"{worst:.1%} at most, {median(map(abs, errors)):.1%} in the median of {len(errors)} cases"
    return Claim(what, f"within {LIMIT:.0%}", figure, met=worst <= LIMIT)


if __name__ == "__main__":
    run(main)
