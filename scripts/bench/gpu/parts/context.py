"""Part e: the longest context of one GPU: recomputation, offloading to host memory, tiled MLPs, chunked loss.

Each variant has a process of its own. Those of the trainer are complete training steps of stage 3 on the path of a run,
one long video a pack. `stack` is a forward and backward pass of two decoder layers with the embeddings and the head of
the 8B model, as the work on Arctic Long Sequence Training measures (arXiv 2506.13996): with offloading, the activations
of a pass do not depend on the number of layers.
"""

import argparse
import subprocess
import sys
import time

import torch

from keye.errors import run
from keye.model import flops
from keye.model.config import KeyeConfig
from keye.model.keye import KeyeForConditionalGeneration
from scripts.bench.common.record import ROOT, Claim, Table
from scripts.bench.gpu.journal import Journal, Values, begin_peak, cell, parser, peak_gb, synchronize
from scripts.bench.gpu.plans import plans_in, words
from scripts.bench.gpu.settings import sizes_of as kernel_sizes
from scripts.bench.gpu.stacks import ceiling_of, ceiling_table
from scripts.bench.gpu.steps import Setting, Steps, parameters_around, set_layers, sizes_of
from stages.distributed.activation_memory import apply_memory_options

PART = "context"
VISUAL = 0.9  # share of visual tokens of a long video
TILES = 16  # parts of an MLP
STACK_LAYERS = 2
DEPTH = 36  # layers of the 8B model's decoder
RATE_GOAL, AT = 0.45, 131_072
LONGEST_GOAL = 500_000
VARIANTS = {
    "trainer": (Setting(zero=1, mlp_tiles=TILES), (16_384, 32_768, 65_536, 131_072, 163_840, 196_608)),
    "trainer, cuDNN's attention": (Setting(zero=1, mlp_tiles=TILES, attention="cudnn"), (131_072,)),
    "stack": (Setting(offload=True, mlp_tiles=TILES), (131_072, 524_288, 786_432, 262_144)),
    "trainer, offloaded": (Setting(zero=1, offload=True, mlp_tiles=TILES), (131_072, 196_608, 262_144, 327_680)),
}
# Share of the part's time after which a variant begins no further row.
UNTIL = {"trainer": 0.4, "trainer, cuDNN's attention": 0.45, "stack": 0.8, "trainer, offloaded": 1.0}
COLUMNS = (
    "variant", "tokens", "decoder layers", "s", "tokens/s", "TFLOP/s", "of the ceiling", "GB at the peak",
    "GB at 36 layers", "host GB at 36 layers",
)  # fmt: skip
NOTES = [
    "The steps of the trainer include the tower, the optimizer and the loader, and have one warm-up step at each "
    "context. A pass of the stack has text alone, every token is learnt, and there is no optimizer. Operations that "
    "are computed again are not counted.",
    "At 36 layers: the peak with bf16 weights and gradients of the missing layers added, without optimizer states, and "
    "the inputs of 36 layers in host memory. Both are computed from the shapes, not measured.",
]


def contexts_of(variant: str, small: bool) -> tuple[int, ...]:
    """Contexts in the order in which they are measured; of a trainer ascending, because none follows a failed one."""
    return (256, 512, 1024) if small else VARIANTS[variant][1]


def key_of(variant: str, context: int) -> str:
    return f"{variant}: {context:,} tokens"


def complete(journal: Journal, variant: str) -> bool:
    """Whether all rows of a variant are measured."""
    return all(key_of(variant, context) in journal.found for context in contexts_of(variant, journal.small))


def measure_trainer(journal: Journal, variant: str) -> None:
    """Rows of a variant on the path of a run; none beyond a context that failed."""
    memory = torch.cuda.get_device_properties(journal.device).total_memory if journal.device.type == "cuda" else 0.0
    sizes = sizes_of(journal.small, memory, share=0.5)
    with Steps(sizes, VARIANTS[variant][0], plans_in(journal.plans, journal.small), journal.device, 1e-6) as steps:
        for context in contexts_of(variant, journal.small):

            def one(context: int = context) -> Values:
                steps.read(context, VISUAL)
                return steps.measure(1) | {"context": context}

            if journal.row(key_of(variant, context), one) is None:
                return  # memory of the failed step may not be free, and longer ones need more


class Stack:
    """Forward and backward passes of a few decoder layers with the embeddings and the head of the 8B model."""

    def __init__(self, journal: Journal) -> None:
        self.device, small = journal.device, journal.small
        self.config = KeyeConfig.preset("tiny", vocab_size=512) if small else KeyeConfig.preset("keye_8b")
        set_layers(self.config, STACK_LAYERS)
        self.config.vision_config.num_hidden_layers = 1
        self.config.image_token_id, self.config.video_token_id = 1, 2
        torch.manual_seed(0)
        with torch.device(self.device):
            self.model = KeyeForConditionalGeneration(self.config).to(torch.float32 if small else torch.bfloat16)
        apply_memory_options(self.model.train(), checkpointing=True, offload=True, mlp_tiles=TILES)
        self.run(256)  # kernels are loaded

    def run(self, context: int) -> None:
        """One pass over a document of text."""
        ids = words(self.config, context, torch.Generator().manual_seed(0))[None].to(self.device)
        places = torch.arange(context, device=self.device)
        width, dtype = self.config.text_config.hidden_size, self.model.dtype
        self.model.zero_grad(set_to_none=True)
        self.model(
            input_ids=ids,
            position_ids=places.expand(3, 1, -1),
            cu_seqlens=torch.tensor([0, context], dtype=torch.int32, device=self.device),
            visual_features=torch.empty(0, width, device=self.device, dtype=dtype),
            shift_labels=ids.roll(-1, 1),
        ).loss.backward()

    def measure(self, context: int) -> Values:
        begin_peak(self.device)
        began = time.perf_counter()
        self.run(context)
        synchronize(self.device)
        took = time.perf_counter() - began
        work = flops.training_step(self.config, [], [context], context)
        _, layer = parameters_around(self.config)
        missing = DEPTH - STACK_LAYERS
        peak, width = peak_gb(self.device), self.config.text_config.hidden_size
        element = self.model.dtype.itemsize
        return {
            "context": context, "tokens": context, "layers": STACK_LAYERS, "seconds": took, "rate": work / took,
            "peak": peak, "deep": None if peak is None else peak + missing * layer * 2 * element / 1e9,
            "host": DEPTH * context * width * element / 1e9,
        }  # fmt: skip


def measure_stack(journal: Journal) -> None:
    """Rows of the stack; none beyond a context that failed."""
    made: list[Stack] = []
    shortest_failed = float("inf")
    for context in contexts_of("stack", journal.small):
        if context > shortest_failed:
            continue

        def one(context: int = context) -> Values:
            if not made:
                made.append(Stack(journal))
            return made[0].measure(context)

        if journal.row(key_of("stack", context), one) is None:
            shortest_failed = context


def rows_of(journal: Journal, variant: str) -> list[Values]:
    """Finished rows by context."""
    found = [row for key, row in journal.found.items() if key.startswith(f"{variant}: ")]
    return sorted(found, key=lambda row: row["context"])


def table_of(journal: Journal, ceiling: float) -> Table:
    rows = []
    for variant in VARIANTS:
        for row in rows_of(journal, variant):
            share = f"{row['rate'] / ceiling:.0%}" if ceiling else "–"
            rows.append((
                variant, f"{row['context']:,}", row["layers"], f"{row['seconds']:.2f}",
                f"{row['tokens'] / row['seconds']:,.0f}", f"{row['rate'] / 1e12:.3g}", share, cell(row["peak"]),
                cell(row.get("deep")), cell(row.get("host")),
            ))  # fmt: skip
    return Table("Steps and passes by context", COLUMNS, rows)


def claims_of(journal: Journal, ceiling: float) -> list[Claim]:
    claims = []
    for variant, row in ((name, row) for name in VARIANTS if name != "stack" for row in rows_of(journal, name)):
        if row["context"] == AT and ceiling:
            share = row["rate"] / ceiling
            claim = f"training step of stage 3, {AT:,} tokens, {variant}: share of the measured ceiling"
            claims.append(Claim(claim, f"≥ {RATE_GOAL:.0%}", f"{share:.0%}", met=share >= RATE_GOAL))
    for variant in VARIANTS:
        if rows := rows_of(journal, variant):
            longest, goal = rows[-1]["context"], f"≥ {LONGEST_GOAL:,}" if variant == "stack" else "–"
            met = longest >= LONGEST_GOAL if variant == "stack" else None
            claims.append(Claim(f"longest context of one GPU, {variant}", goal, f"{longest:,} tokens", met=met))
    return claims


def journal_of(args: argparse.Namespace) -> Journal:
    """The journal with the tables of the rows so far."""
    journal = Journal.open(args, PART)
    rates = [row["rate"] for key, row in journal.found.items() if key.startswith("matrix product ")]
    journal.tables = lambda: [ceiling_table(journal), table_of(journal, max(rates, default=0.0))]
    return journal


def main() -> int:
    made = parser(__doc__, PART)
    made.add_argument("--variant", choices=VARIANTS, help="only this variant, in this process")
    args = made.parse_args()
    journal = journal_of(args)
    if args.variant:
        if not complete(journal, args.variant):
            measure_stack(journal) if args.variant == "stack" else measure_trainer(journal, args.variant)
        return 0
    ceiling = ceiling_of(journal, kernel_sizes(journal.small, plans_in(journal.plans, journal.small)))
    options = ["--device", str(journal.device), "--plans", str(journal.plans), "--out", str(journal.out)]
    options += ["--small"] if journal.small else []
    ended: dict[str, str] = {}
    for variant in VARIANTS:
        left = UNTIL[variant] * journal.limit - journal.spent
        if left <= 0 or complete(journal, variant):
            continue
        command = [sys.executable, "-m", f"{__package__}.{PART}", "--variant", variant, "--limit", f"{left:.0f}"]
        code = subprocess.run([*command, *options], check=False, cwd=ROOT).returncode
        if code:
            ended[variant] = f"failed: its process ended with code {code}; its output says why"
    args.again = False
    journal = journal_of(args)
    for variant in VARIANTS:
        for key in (key_of(variant, context) for context in contexts_of(variant, journal.small)):
            if key not in journal.found and key not in journal.failed:
                journal.failed[key] = "not measured: the time was up, or an earlier row of the variant failed"
    journal.failed |= ended
    journal.save(claims_of(journal, ceiling), NOTES)
    return 0


if __name__ == "__main__":
    run(main)
