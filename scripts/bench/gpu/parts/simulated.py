"""What the passes of parts c and e do on one H200, by their shapes: kernels, memory, waits, and the least time.

The code of the parts runs at full size on a device that computes nothing (`scripts.bench.gpu.simulated`), so no GPU is
needed and nothing is measured. A kernel takes at least what its operations or its bytes take at the rates of the notes;
launching it is free. The sum is a bound for layers that are not compiled.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from keye.errors import run
from keye.model import decoder, flops, vision
from keye.model.config import KeyeConfig
from keye.model.keye import KeyeForConditionalGeneration
from scripts.bench.common.record import RESULTS, Table, arguments, save
from scripts.bench.gpu import steps, waterfall
from scripts.bench.gpu.journal import PLANS, QUICK, say
from scripts.bench.gpu.parts import context
from scripts.bench.gpu.plans import DecodedPlan, plans_in
from scripts.bench.gpu.simulated.device import SimulatedGPU
from scripts.bench.gpu.simulated.ledger import ATTENTION, MEMORY, PRODUCTS, TRANSFER, Rates
from stages.cost.gpus import gpu_named
from stages.distributed.activation_memory import apply_memory_options

PART = "simulated"
RATES = Rates(products=790e12, attention=350e12, memory=4.3e12, link=55e9)
LAYERS = 11  # of the decoder in a step with recomputation
CONTEXTS = (131_072, 262_144, 524_288, 786_432, 1_048_576)
OURS, THEIRS = "norms in one kernel", "transformers' norms"
COLUMNS = (
    "pass", "norms or chunks", "kernels", "waits", "TFLOP counted", "TFLOP of the model", "ms: products", "attention",
    "memory", "host link", "of the ceiling, at most", "GB at the peak",
)  # fmt: skip
LONG = ("tokens", "norms", "of the ceiling, at most", "GB at the peak", "GB at 36 layers", "host GB at 36 layers")
NOTES = [
    f"Rates: products {RATES.products / 1e12:.0f} TFLOP/s, attention {RATES.attention / 1e12:.0f} (FlashAttention-2 "
    f"reaches 35 % of an H100, arXiv 2407.08608), memory {RATES.memory / 1e12:.1f} TB/s, host link "
    f"{RATES.link / 1e9:.0f} GB/s. They are assumptions, and so is every time; the ceiling is that of products. "
    "Kernels, operations and bytes are counted. Bytes are those of tensors that are alive and of the fp32 sums of the "
    "attention's backward pass; an allocator needs more.",
    "A wait: the host reads a value of the device, so no kernel is queued for a while. 'TFLOP counted' has what is "
    "computed again: five products in the attention's backward pass where the model has four, the head's logits, and "
    "recomputed layers. 'Of the ceiling' divides the operations of the model by the time.",
    "Passes as in part c: 18 decoder and 14 tower layers, a pack of 8,192 tokens, nothing recomputed. Recomputed: "
    f"{LAYERS} decoder layers and the complete tower, frames in chunks of so many patches. The stack is that of "
    "part e.",
]


@dataclass
class Found:
    """What a simulated call does: kernels, waits, operations counted and of the model, seconds by kind, bytes."""

    kernels: int
    waits: int
    counted: float
    work: float
    seconds: dict[str, float]
    peak: int
    host: int

    @property
    def share(self) -> float:
        """Of the ceiling, if launches are free and every kernel reaches the rates."""
        return self.work / RATES.products / sum(self.seconds.values())


@contextlib.contextmanager
def norms(name: str) -> Iterator[None]:
    """Decoders that are built inside have these norms."""
    keep = patch.object(decoder, "fuse_norms", lambda module: None) if name == THEIRS else contextlib.nullcontext()
    with keep:
        yield


def simulate(gpu: SimulatedGPU, call: Callable[[], Any], work: float) -> Found:
    """A call that has been made once before, so that gradients and tables exist."""
    gpu.restart()
    call()
    kinds = gpu.ledger.kinds.values()
    return Found(
        sum(kind.kernels for kind in kinds), sum(gpu.waits.values()), sum(kind.flops for kind in kinds), work,
        gpu.ledger.seconds(RATES), gpu.memory.peak, gpu.host.peak,
    )  # fmt: skip


def passes(small: bool, plans: list[DecodedPlan], kind: str) -> dict[str, Found]:
    """The passes of the waterfall."""
    found, gpu = {}, SimulatedGPU()
    with norms(kind), gpu:
        model = waterfall.model_of(small, gpu.device, torch.bfloat16)
        batch = waterfall.to_device(waterfall.packs_of(plans, model.config, small, 1)[0], gpu.device)
        for name, (call, work) in waterfall.passes_of(model, batch).items():
            say(f"{kind}: {name}")
            call()
            found[name] = simulate(gpu, call, work)
            model.zero_grad(set_to_none=True)
    return found


def recomputed(small: bool, plans: list[DecodedPlan], patches: int) -> Found:
    """A pass with recomputation over frames in chunks of `patches`."""
    gpu = SimulatedGPU()
    config = KeyeConfig.preset("tiny", vocab_size=512) if small else KeyeConfig.preset("keye_8b")
    steps.set_layers(config, 2 if small else LAYERS)
    config.image_token_id, config.video_token_id = 1, 2
    with patch.object(vision, "FRAME_PATCHES", patches), gpu:
        with torch.device(gpu.device):
            model = KeyeForConditionalGeneration(config).to(torch.bfloat16).train()
        apply_memory_options(model, checkpointing=True)
        batch = waterfall.to_device(waterfall.packs_of(plans, config, small, 1)[0], gpu.device)
        return simulate(gpu, lambda: model(**batch).loss.backward(), waterfall.operations(config, batch))


def stack(small: bool, kind: str, lengths: tuple[int, ...]) -> dict[int, tuple[Found, float, float]]:
    """Context → (what a pass of part e's stack does, bytes with the weights of 36 layers, host bytes of 36 layers)."""
    found, gpu = {}, SimulatedGPU()
    with norms(kind), gpu:
        made = context.Stack(SimpleNamespace(device=gpu.device, small=small))  # type: ignore[arg-type]
        text, element = made.config.text_config, made.model.dtype.itemsize
        more = (context.DEPTH - context.STACK_LAYERS) * steps.parameters_around(made.config)[1] * 2 * element
        for length in lengths:
            say(f"{kind}: {length:,} tokens")
            work = flops.training_step(made.config, [], [length], length)
            one = simulate(gpu, lambda length=length: made.run(length), work)
            found[length] = one, one.peak + more, context.DEPTH * length * text.hidden_size * element
    return found


def cells(name: str, kind: str, one: Found) -> tuple[Any, ...]:
    took = [f"{one.seconds[kind] * 1e3:.1f}" for kind in (PRODUCTS, ATTENTION, MEMORY, TRANSFER)]
    return (
        name, kind, f"{one.kernels:,}", one.waits, f"{one.counted / 1e12:.1f}", f"{one.work / 1e12:.1f}", *took,
        f"{one.share:.0%}", f"{one.peak / 1e9:.1f}",
    )  # fmt: skip


def tables_of(small: bool, folder: Path) -> list[Table]:
    """All that is simulated."""
    plans = plans_in(folder, small)
    rows, long = [], []
    for kind in (THEIRS, OURS):
        rows += [cells(name, kind, one) for name, one in passes(small, plans, kind).items()]
    for patches in (64, 256) if small else (4096, 32_768):
        say(f"recomputed, chunks of {patches:,} patches")
        rows.append(cells("whole pack, recomputed", f"{patches:,} patches", recomputed(small, plans, patches)))
    for kind in (THEIRS, OURS):
        for length, (one, deep, host) in stack(small, kind, (256, 512) if small else CONTEXTS).items():
            fits = "" if deep <= gpu_named("h200").memory else " (does not fit)"
            gigabytes = f"{one.peak / 1e9:.1f}", f"{deep / 1e9:.1f}{fits}", f"{host / 1e9:.0f}"
            long.append((f"{length:,}", kind, f"{one.share:.0%}", *gigabytes))
    return [Table("Passes over a pack", COLUMNS, rows), Table("The stack by context", LONG, long)]


def main() -> int:
    parser = arguments(__doc__, f"examples:\n  python -m scripts.bench.gpu.parts.{PART}   minutes on one core\n", "gpu")
    parser.add_argument("--plans", type=Path, default=PLANS, help="folder of decoded plans (.cache/bench/gpu_plans)")
    args = parser.parse_args()
    began, out = time.monotonic(), args.out or (QUICK if args.quick else RESULTS / "gpu")
    tables = tables_of(args.quick, args.plans)
    save(out, PART, [], tables, seconds=time.monotonic() - began, quick=args.quick, notes=NOTES)
    return 0


if __name__ == "__main__":
    run(main)
