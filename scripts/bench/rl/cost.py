"""Estimates of rl/cost compared with measured steps, and the memory of the 8B recipe by component.

Each case runs in a process of its own with the real engine, sampler and update, on the CPU in float32. Two peaks of
resident memory above the process without a model are measured: of the rollout, and of the scoring and the optimizer
step. Measurements are saved, so that an interrupted bench resumes.
"""

import argparse
import gc
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from keye.errors import KeyeError, run
from keye.model.config import KeyeConfig, KeyeVisionConfig
from keye.processor.processor import KeyeProcessor, Sample
from keye.processor.tokenizer import train_tokenizer
from rl.cost import report
from rl.cost.estimate import Assumptions, estimate
from rl.cost.memory import Loading, step_memory
from rl.cost.settings import Settings
from rl.cost.work import Lengths
from rl.recipe import Gspo, load
from scripts.bench.common.process import in_process, resident
from scripts.bench.common.record import ROOT, Claim, Table, arguments, forget_other_code, out_of, save
from stages.cost.estimate import parameters_of
from stages.cost.gpus import gpu_named
from stages.recipe import load as load_pretrain

MIB = 1 << 20
LIMIT = 0.15
GPU_LIMIT = 140.0  # GB
VOCABULARY = 4096
SIDE = 8  # patches along a frame
SCRATCH = ROOT / ".cache" / "bench" / "rl_cost"
RECIPE, PRETRAIN = ROOT / "rl/recipes/keye_8b.toml", ROOT / "stages/recipes/keye_8b.toml"
GPUS, GPU = 8, "h200"
EXAMPLES = """examples:
  python -m scripts.bench rl --part cost
  python -m scripts.bench.rl.cost --quick   two cases, which prove nothing
"""


@dataclass(frozen=True)
class Case:
    """One step: the decoder's width and layers, tokens of a prompt, half of them visual, and of an answer, and keys."""

    name: str
    width: int = 512
    layers: int = 6
    tower: int = 4
    prompt: int = 1024
    answer: int = 64
    prompts: int = 2
    group_size: int = 8
    mini_batches: int = 1
    micro_batch_tokens: int = 0
    zero: int = 1
    checkpointing: bool = False
    freeze: tuple[str, ...] = ()
    decode_batch_size: int = 256

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

    def keys(self) -> dict[str, Any]:
        """The settings under their names in `[gspo]`."""
        return {
            "prompts": self.prompts, "group_size": self.group_size, "mini_batches": self.mini_batches,
            "micro_batch_tokens": self.micro_batch_tokens, "zero": self.zero, "freeze": tuple(self.freeze),
            "decode_batch_size": self.decode_batch_size, "max_new_tokens": self.answer, "precision": "fp32",
            "checkpointing": self.checkpointing,
        }  # fmt: skip

    def lengths(self) -> Lengths:
        return Lengths(self.prompt, self.prompt, self.answer, self.answer, 0.5, SIDE * SIDE, SIDE * SIDE)

    def samples(self) -> list[Sample]:
        """Prompts that begin with their frames, with pixels as floats."""
        torch.manual_seed(0)
        frames = self.prompt // 2 // (SIDE * SIDE // 4)
        made = []
        for _ in range(self.prompts):
            ids = torch.randint(3, VOCABULARY, (self.prompt,))
            ids[: self.prompt // 2] = 2
            positions = torch.arange(self.prompt).expand(3, -1)
            pixels = torch.randn(frames * SIDE * SIDE, 3, 14, 14)
            grid = torch.tensor([[1, SIDE, SIDE]] * frames)
            made.append(Sample(ids, torch.full_like(ids, -100), positions, None, None, pixels, grid))
        return made


BASE = Case("base")
CASES = (
    BASE,
    Case("longer prompts", prompt=2048),
    Case("longer answers", answer=256),
    Case("four prompts", prompts=4),
    Case("four prompts in micro-batches of one", prompts=4, micro_batch_tokens=1536),
    Case("half of a group in a micro-batch", answer=128, micro_batch_tokens=1536),
    Case("wider", width=640),
    Case("deeper", layers=12),
    Case("frozen tower", freeze=("visual",), tower=12),
    Case("ZeRO-2", zero=2),
    Case("recomputed", checkpointing=True),
    Case("recomputed, frozen tower, longer prompts", prompt=2048, checkpointing=True, freeze=("visual",)),
)
QUICK = (BASE, Case("frozen tower", freeze=("visual",), tower=12))


WARM_UP = Case("warm-up", width=128, layers=1, tower=1, prompt=128, answer=4)


def one(case: Case) -> dict[str, int]:
    """Bytes above the start at the peaks of a rollout and of an update."""
    from stages.distributed import engine as deep

    deep.start(threads=1)
    processor = KeyeProcessor(train_tokenizer(["user assistant how many flashes"] * 4, 300))
    step(WARM_UP, WARM_UP.samples(), processor, 0)  # loads what is loaded once
    gc.collect()
    samples = case.samples()
    peaks = step(case, samples, processor, resident("VmRSS"))
    deep.stop()
    return peaks


def step(case: Case, samples: list[Sample], processor: KeyeProcessor, before: int) -> dict[str, int]:
    """The peaks of a step above `before`."""
    from keye.model.keye import KeyeForConditionalGeneration
    from rl.policy.update import PolicyUpdate
    from rl.rollout import InProcessRollout
    from stages.distributed import engine as deep
    from stages.distributed.activation_memory import apply_memory_options

    torch.manual_seed(0)
    model = KeyeForConditionalGeneration(case.config())
    settings = Gspo(steps=1, learning_rate=1e-4, **case.keys())
    for name in settings.freeze:
        model.base_model.get_submodule(name).requires_grad_(False)
    apply_memory_options(model, settings.checkpointing, settings.offload, settings.mlp_tiles)
    engine = deep.build(model.train(), settings, 100, zero=settings.zero, precision="fp32")
    rollout = InProcessRollout(model, processor, torch.Generator().manual_seed(0), settings.decode_batch_size)
    rollout.ends = frozenset()  # every answer has `max_new_tokens`
    update = PolicyUpdate(engine, settings)
    advantages = torch.randn(case.prompts, case.group_size, generator=torch.Generator().manual_seed(1))
    size = case.prompts // case.mini_batches
    parts = [slice(begin, begin + size) for begin in range(0, case.prompts, size)]
    peaks = {}
    for _ in range(2):  # the first step makes the optimizer's states
        Path("/proc/self/clear_refs").write_text("5")
        groups = rollout.generate(samples, case.group_size, 1.0, case.answer)
        peaks["rollout"] = resident("VmHWM") - before
        Path("/proc/self/clear_refs").write_text("5")
        update.run(groups, advantages, parts)
        peaks["update"] = resident("VmHWM") - before
    return peaks


def measured(case: Case) -> dict[str, int]:
    """The peaks of a case in a process of its own, which returns freed blocks to the system at once."""
    frugal = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    return in_process(__spec__.name, ["--one", json.dumps(asdict(case))], f"the case {case.name}", frugal)


def estimated(case: Case) -> dict[str, float]:
    """The same peaks from the shapes alone."""
    config = case.config()
    loading = Loading(fused=False, buckets=1)
    made = step_memory(config, Settings(**case.keys()), case.lengths(), 1, parameters_of(config), loading)
    moments = made.moments
    rolling = {name: size for name, size in moments.items() if name.startswith("while")}
    return {
        "rollout": max(rolling.values()),
        "update": max(size for name, size in moments.items() if name not in rolling),
    }


def measure(cases: tuple[Case, ...], record: Path) -> dict[str, dict[str, int]]:
    """Case → measured peaks; kept in `record` as they come."""
    found = json.loads(record.read_text()) if record.exists() else {}
    for number, case in enumerate(cases, 1):
        key = json.dumps(asdict(case))
        if key not in found:
            found[key] = measured(case)
            record.parent.mkdir(parents=True, exist_ok=True)
            record.write_text(json.dumps(found, indent=1))
        taken, expected = found[key], estimated(case)
        said = ", ".join(f"{k} {taken[k] / MIB:.0f} MB, estimated {expected[k] / MIB:.0f}" for k in taken)
        print(f"{number}/{len(cases)}  {case.name}: {said}", flush=True)
    return {case.name: found[json.dumps(asdict(case))] for case in cases}


def recipe_8b() -> tuple[Claim, list[Table], list[str]]:
    """The memory of the 8B recipe by component and moment."""
    gpu, assumed = gpu_named(GPU), Assumptions()
    cost = estimate(load(RECIPE), load_pretrain(PRETRAIN), gpu, GPUS, assumed)
    head, *rows = report.memory_rows(cost)
    claim = Claim(
        f"memory of a GPU, rl/recipes/keye_8b.toml on {GPUS} GPUs, estimated", f"≤ {GPU_LIMIT:.0f} GB",
        f"{cost.memory.peak / 1e9:.1f} GB", met=cost.memory.peak <= GPU_LIMIT * 1e9,
    )  # fmt: skip
    notes = [report.advice(cost), report.sentence(PRETRAIN.name, gpu, GPUS, assumed, cost)]
    seconds = cost.seconds
    times = [
        (name, f"{getattr(seconds, key):.0f}")
        for name, key in (("prefill", "prefill"), ("decode", "decode"), ("old log-probabilities", "score"),
                          ("update", "update"), ("sum", "total"))
    ]  # fmt: skip
    tables = [
        Table(f"rl/recipes/keye_8b.toml on {GPUS} × {gpu.name}, by component", head, rows),
        Table("Estimated seconds of a step", ("part", "seconds"), times),
    ]
    return claim, tables, notes


def main() -> None:
    parser: argparse.ArgumentParser = arguments(__doc__, EXAMPLES, results="rl")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(Case(**json.loads(args.one)))))
        return
    if not Path("/proc/self/clear_refs").exists():
        raise KeyeError("the peak of a process is read from /proc, which this system has not: run this part on Linux")
    forget_other_code(SCRATCH, ("keye", "stages", "rl"))
    began, cases = time.monotonic(), QUICK if args.quick else CASES
    taken = measure(cases, SCRATCH / "cases.json")
    rows, errors = [], {"rollout": [], "update": []}
    for case in cases:
        found, expected = taken[case.name], estimated(case)
        cells = []
        for what, off in errors.items():
            off.append(expected[what] / found[what] - 1)
            cells += [f"{found[what] / MIB:.0f}", f"{expected[what] / MIB:.0f}", f"{off[-1]:+.1%}"]
        rows.append((case.name, *cells))
    columns = (
        "case", "rollout: MB measured", "MB estimated", "off by", "update: MB measured", "MB estimated", "off by",
    )  # fmt: skip
    claim, tables, notes = recipe_8b()
    claims = [claim]
    claims += [_claim(f"peak memory of the {what}, estimated against measured", off) for what, off in errors.items()]
    notes += [
        "Small steps: float32, one process. Memory is resident memory at the peak above the process's own before the "
        "model was built. Base: decoder of width 512 with 6 layers, tower of width 256 with 4, two prompts of 1,024 "
        "tokens, half of them visual, with 8 answers of 64 tokens each, one optimizer step, ZeRO-1; the others change "
        "what their name says."
    ]
    save(
        out_of(args), "cost", claims, [*tables, Table("Steps estimated and run", columns, rows)], notes=notes,
        seconds=time.monotonic() - began, quick=args.quick, seeds={"weights, prompts and sampling": 0},
    )  # fmt: skip


def _claim(what: str, errors: list[float]) -> Claim:
    worst = max(map(abs, errors))
    figure = f"{worst:.1%} at most, {median(map(abs, errors)):.1%} in the median of {len(errors)} cases"
    return Claim(what, f"within {LIMIT:.0%}", figure, met=worst <= LIMIT)


if __name__ == "__main__":
    run(main)
