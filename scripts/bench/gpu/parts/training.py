"""Part d: complete training steps of stage 2 through DeepSpeed, with ZeRO-1, 2 and 3, plain and compiled.

Packs of 8,192 tokens from real plans, two micro-batches a step whose gradients are summed in fp32, fp32 master weights
and moments, on the path of a run (`scripts.bench.gpu.steps`). Every setting runs in a process of its own.
"""

import json
from dataclasses import asdict
from pathlib import Path

import torch

from keye.errors import run
from scripts.bench.common.process import in_process
from scripts.bench.common.record import Claim, Table
from scripts.bench.gpu.journal import Journal, Values, cell, parser
from scripts.bench.gpu.plans import plans_in
from scripts.bench.gpu.settings import sizes_of as kernel_sizes
from scripts.bench.gpu.stacks import ceiling_of, ceiling_table
from scripts.bench.gpu.steps import Setting, Steps, sizes_of

PART = "training"
RATE = 1e-5
ROUNDING = 2e-2  # relative difference of losses that bf16 explains
SETTINGS = {
    "ZeRO-2, plain": Setting(zero=2, micro_batches=2),
    "ZeRO-2, compiled": Setting(zero=2, compile=True, micro_batches=2),
    "ZeRO-2, compiled, nothing recomputed": Setting(zero=2, compile=True, checkpointing=False, micro_batches=2),
    "ZeRO-3, plain": Setting(zero=3, micro_batches=2),
    "ZeRO-3, compiled": Setting(zero=3, compile=True, micro_batches=2),
    "ZeRO-2, plain, frames in large chunks": Setting(zero=2, micro_batches=2, patches=32_768),
    "ZeRO-1, plain": Setting(zero=1, micro_batches=2),
}
COLUMNS = (
    "setting", "decoder layers", "tokens", "s a step", "s of the first", "waiting for data", "tokens/s", "TFLOP/s",
    "of the ceiling", "GB at the peak", "loss of the first step, and last",
)  # fmt: skip
NOTES = [
    "Rates count the operations of the model; what is recomputed is not counted. In bf16 the engine runs ZeRO-1 as "
    "ZeRO-2 (`stages.distributed.engine.build`). Every setting starts from the same weights and reads the same packs.",
]


def one(name: str, small: bool, device: torch.device, plans: Path) -> Values:
    """One setting, in this process."""
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0.0
    sizes = sizes_of(small, memory)
    with Steps(sizes, SETTINGS[name], plans_in(plans, small), device, RATE) as steps:
        return steps.measure(sizes.rounds)


def table_of(journal: Journal, ceiling: float) -> Table:
    rows = []
    for name, found in ((name, journal.found[name]) for name in SETTINGS if name in journal.found):
        share = f"{found['rate'] / ceiling:.0%}" if ceiling else "–"
        rows.append((
            name, found["layers"], found["tokens"], f"{found['seconds']:.2f}", f"{found['first']:.1f}",
            f"{found['stalled']:.0%}", f"{found['tokens'] / found['seconds']:,.0f}", f"{found['rate'] / 1e12:.3g}",
            share, cell(found["peak"]), f"{found['loss'][0]:.4f}, {found['loss'][-1]:.4f}",
        ))  # fmt: skip
    return Table("Training steps of stage 2 on one device", COLUMNS, rows)


def claims_of(journal: Journal, ceiling: float) -> list[Claim]:
    """The best rate, and that all settings compute the same loss."""
    found = {name: row for name, row in journal.found.items() if name in SETTINGS}
    claims = []
    if found and ceiling:
        best = max(found, key=lambda name: found[name]["rate"])
        claim, share = "complete training step of stage 2, 8,192 tokens a pack", found[best]["rate"] / ceiling
        claims.append(Claim(f"{claim}: share of the measured ceiling", "–", f"{share:.0%} ({best})"))
    if len(found) > 1:
        first = [row["loss"][0] for row in found.values()]
        apart = (max(first) - min(first)) / min(first)
        claim = f"loss of the first step of {len(found)} settings, largest relative difference"
        claims.append(Claim(claim, f"≤ {ROUNDING:g}", f"{apart:.1e}", met=apart <= ROUNDING))
    return claims


def main() -> int:
    made = parser(__doc__, PART)
    made.add_argument("--one", help="measure one setting in this process and print its values as JSON")
    args = made.parse_args()
    if args.one:
        print(json.dumps(one(args.one, args.small, torch.device(args.device), args.plans)))
        return 0
    journal = Journal.open(args, PART)
    ceiling = 0.0
    journal.tables = lambda: [ceiling_table(journal), table_of(journal, ceiling)]
    ceiling = ceiling_of(journal, kernel_sizes(journal.small, plans_in(journal.plans, journal.small)))
    options = ["--device", str(journal.device), "--plans", str(journal.plans), *(["--small"] if journal.small else [])]
    for name in SETTINGS:
        journal.row(name, lambda name=name: in_process(f"{__package__}.{PART}", ["--one", name, *options], name))
    settings = json.dumps({name: asdict(setting) for name, setting in SETTINGS.items()})
    journal.save(claims_of(journal, ceiling), [*NOTES, f"Settings: `{settings}`."])
    return 0


if __name__ == "__main__":
    run(main)
