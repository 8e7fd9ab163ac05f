"""All four stages of the 8B recipe on 64 simulated ranks: collectives of every rank, and memory.

Nothing is computed: tensors have shapes but no values, and the process group sends nothing. Everything else is real:
the recipe, the planner on random lengths, packing, sharding, the model, activation checkpointing, the trainer's step,
DeepSpeed's engine and ZeRO with the recipe's configuration, AdamW. Every rank takes a complete optimizer step with two
decoder layers and two tower layers of full width, because the collectives of a rank depend on its data and not on the
depth. The ranks with the most and the fewest patches take the step with all layers, and their memory is compared with
`stages/cost/estimate.py`. Each simulated rank is a separate process.
"""

import dataclasses
import gc
import multiprocessing
import os
import pickle
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from keye.errors import run
from keye.files import atomic_file
from keye.model.config import KeyeConfig
from scripts.bench.common.record import ROOT, Claim, Table, arguments, forget_other_code, out_of, save
from scripts.bench.stages import balance
from scripts.bench.stages.simulated import drawn, rank
from scripts.bench.stages.simulated.compare import Compared, collectives, memory
from scripts.bench.stages.simulated.rank import Simulated
from stages import recipe as recipes
from stages.cost.estimate import estimate
from stages.cost.gpus import gpu_named
from stages.data.packing.balance import Cost, TowerCost, assign_parts, assign_rounds
from stages.data.packing.samples import Meta
from stages.distributed.parallel import ParallelDims
from stages.recipe import STAGES, StageRecipe, VisionRecipe, stage_of

EXAMPLES = """examples:
  python -m scripts.bench.stages.simulation
  python -m scripts.bench.stages.simulation --phase annealing --ranks 64
  python -m scripts.bench.stages.simulation --quick
"""
RECIPE = ROOT / "stages" / "recipes" / "keye_8b.toml"
# Stage 0's text tower of SigLIP-so400m's shape, without its files.
DRAWN_TOWER = [
    "vision.text_model=", "vision.text_width=1152", "vision.text_layers=27", "vision.text_heads=16",
    "vision.text_length=64",
]  # fmt: skip
SCRATCH = ROOT / ".cache" / "bench" / "stages_simulation"
GPU = "h100"  # what a step takes is estimated for it
SHALLOW = 2  # layers of decoder and tower where all ranks are simulated
TOLERANCE = 0.15


@dataclass(frozen=True)
class Phase:
    """A phase of the recipe, the packs of one step, and seconds that the planner took for it."""

    name: str
    settings: StageRecipe
    packs: list[list[Meta]]
    planning: float

    def shares(self, ranks: int, config: KeyeConfig) -> list[list[list[Meta]]]:
        """Data-parallel rank → its micro-batches."""
        if isinstance(self.settings, VisionRecipe):
            parts = self.settings.micro_batches(ranks)
            costs = [sum(meta.excess for meta in pack) for pack in self.packs]
            rounds = assign_parts(costs, ranks, parts)
        else:
            each = Cost(config).per_token
            costs = [sum(meta.excess + meta.tokens * each for meta in pack) for pack in self.packs]
            rounds = assign_rounds(costs, ranks)
        return [[[meta for pack in packs for meta in self.packs[pack]] for packs in mine] for mine in rounds]


def plan(name: str, settings: StageRecipe, config: KeyeConfig, steps: int) -> Phase:
    """Have the planner form steps of drawn lengths; the last one is simulated."""
    if isinstance(settings, VisionRecipe):
        return plan_pairs(name, settings, config)
    cost = Cost(config, tower_trains=stage_of(name) != "alignment", decoder_trains=stage_of(name) != "alignment")
    data = balance.DATA["mixed" if settings.context <= 8192 else "long"]
    kinds = {kind: (group, share) for kind, (group, share) in data.items() if settings.mixture.get(group)}
    packs, balanced = settings.global_batch_size, settings.balanced_packs
    found, _, seconds, _ = balance.plan(kinds, settings.context, packs, balanced, steps, cost, packs)
    return Phase(name, settings, found[-1], median(seconds))


def plan_pairs(name: str, settings: VisionRecipe, config: KeyeConfig) -> Phase:
    """A step of stage 0: stills of native resolution with captions, in the order in which they are drawn."""
    began = time.perf_counter()
    cost = TowerCost(config.vision_config)
    made = balance.metas_of("caption", "image", 131_072, cost, balance.SEED, settings.pairs)
    return Phase(name, settings, [[meta] for meta in made], time.perf_counter() - began)


def batches(phase: Phase, shares: list[list[list[Meta]]], grid: ParallelDims) -> list[dict[str, Any]]:
    mine = shares[grid.data_rank]
    if isinstance(phase.settings, VisionRecipe):
        return [drawn.pair_batch(metas, phase.settings.text_length) for metas in mine]
    return [drawn.language_batch(metas, grid) for metas in mine]


def shallow(config: KeyeConfig) -> KeyeConfig:
    """The same widths with fewer layers."""
    made = KeyeConfig.from_dict(config.to_dict())
    made.text_config.num_hidden_layers = made.vision_config.num_hidden_layers = SHALLOW
    made.text_config.layer_types = made.text_config.layer_types[:SHALLOW]
    return made


def simulate(
    phase: Phase, shares: list[list[list[Meta]]], config: KeyeConfig, number: int, ranks: int, kept: Path
) -> Path:
    """Simulate one rank in this process and leave its result in the file `kept`."""
    rank.join(number, ranks)
    found = rank.step(phase.name, phase.settings, config, drawn.processor(), partial(batches, phase, shares))
    with atomic_file(kept) as part:
        part.write_bytes(pickle.dumps(found))
    return kept


def simulate_all(
    phase: Phase, config: KeyeConfig, numbers: list[int], ranks: int, folder: Path, processes: int
) -> Iterator[Simulated]:
    """The ranks `numbers`, some at once, each in a process of its own; what was simulated before is read again."""
    depth = config.text_config.num_hidden_layers
    shares = phase.shares(ranks // phase.settings.sequence_parallel, config)
    files = [folder / f"{phase.name}-{depth}-{number}-of-{ranks}.pickle" for number in numbers]
    context, pending, running = multiprocessing.get_context("fork"), list(zip(numbers, files, strict=True)), {}
    gc.collect()
    while pending or running:
        while pending and len(running) < processes:
            number, file = pending.pop(0)
            if file.exists():
                yield pickle.loads(file.read_bytes())
                continue
            running[file] = context.Process(target=simulate, args=(phase, shares, config, number, ranks, file))
            running[file].start()
        for file, process in list(running.items()):
            process.join(0.05)
            if process.is_alive():
                continue
            del running[file]
            if process.exitcode:
                raise RuntimeError(f"{file.stem}: the simulated rank failed, see above")
            yield pickle.loads(file.read_bytes())


def heaviest(phase: Phase, config: KeyeConfig, ranks: int) -> int:
    """The first rank of the group with the most patches in a micro-batch."""
    shares = phase.shares(ranks // phase.settings.sequence_parallel, config)
    most = [max(sum(h * w for m in pack for h, w in [*m.stills, *m.frames]) for pack in packs) for packs in shares]
    return phase.settings.sequence_parallel * most.index(max(most))


def compare(recipe: recipes.Recipe, phase: Phase, config: KeyeConfig, ranks: int, args: Any, bar: Progress) -> Compared:
    """Simulate a phase: ranks with few layers, one with all."""
    deep = [heaviest(phase, config, ranks)]
    apart = args.some and phase.settings.sequence_parallel == 1
    numbers = list(range(0, ranks, max(1, ranks // args.some))) if apart else list(range(ranks))
    task = bar.add_task(phase.name, total=len(numbers) + len(deep))
    found: dict[bool, list[Simulated]] = {False: [], True: []}
    for whole, chosen in ((False, numbers), (True, deep)):
        layers = config if whole else shallow(config)
        for one in simulate_all(phase, layers, chosen, ranks, SCRATCH, args.processes):
            found[whole].append(one)
            bar.advance(task)
    difference = collectives(found[False], phase.settings.sequence_parallel)
    largest = found[True][0]
    return Compared(
        phase.name, difference, [len(one.calls) for one in found[False]], largest,
        memory(recipe, phase.name, config, largest, ranks), phase.planning,
    )  # fmt: skip


def main() -> int:
    parser = arguments(__doc__, EXAMPLES, results="stages")
    parser.add_argument("--phase", nargs="+", choices=STAGES, default=list(STAGES), help="stages to simulate")
    parser.add_argument("--ranks", type=int, default=64, help="ranks to simulate (64)")
    parser.add_argument("--some", type=int, help="simulate so many ranks of a stage without sequence groups, not all")
    parser.add_argument("--processes", type=int, default=2, help="simulated at once (2)")
    parser.add_argument("--only", action="store_true", help="leave what was simulated in the cache and write no result")
    args = parser.parse_args()
    began = time.monotonic()
    torch.set_num_threads(1)
    recipe = recipes.load(RECIPE, DRAWN_TOWER)
    config = drawn.processor().configure(KeyeConfig.preset("keye_8b"))
    ranks = 16 if args.quick else args.ranks
    if args.quick:
        config, recipe = shallow(config), smaller(recipe, ranks)
    balance.SAMPLES = 200 if args.quick else 1000  # of each kind, over and over
    forget_other_code(SCRATCH)
    seconds = {cost.name: cost.seconds for cost in estimate(recipe, gpu_named(GPU), ranks)}
    columns = [TextColumn("{task.description:10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    found = []
    with Progress(*columns) as bar:
        for name in args.phase:
            phase = plan(name, recipe.chain[name], config, 1 if args.quick else 3)
            found.append(compare(recipe, phase, config, ranks, args, bar))
            print(name, found[-1].difference or "same collectives on all ranks", flush=True)
    if args.only:
        return 0
    write(args, found, seconds, ranks, time.monotonic() - began)
    return 0


def smaller(recipe: recipes.Recipe, ranks: int) -> recipes.Recipe:
    """The same recipe with as few packs and pairs as the ranks need."""
    changed = {}
    for name in recipe.stages:
        settings = getattr(recipe, name)
        packs = ranks // settings.sequence_parallel
        few = {"pairs": 2 * ranks} if isinstance(settings, VisionRecipe) else {"global_batch_size": packs}
        changed[name] = dataclasses.replace(settings, balanced_packs=0, **few)
    return dataclasses.replace(recipe, **changed)


def write(args: Any, found: list[Compared], seconds: dict[str, float], ranks: int, took: float) -> None:
    """The claims and tables of docs/results/stages.md."""
    claims = [
        Claim(f"{one.name} of keye_8b, {len(one.counts)} of {ranks} ranks simulated: collectives of a step",
              "the same on every rank",
              one.difference or f"the same ({median(one.counts):.0f} each)", met=one.difference is None)
        for one in found
    ]  # fmt: skip
    for one in found:
        off = one.off
        claims.append(Claim(f"{one.name}: peak memory, simulated against estimated", f"within {TOLERANCE:.0%}",
                            f"{one.largest.memory.peak / 1e9:.1f} GB, {off:+.1%}",
                            met=abs(off) <= TOLERANCE))  # fmt: skip
    language = [one for one in found if one.name != "vision"]
    if language:
        share = max(one.planning / seconds[one.name] for one in language)
        claims.append(Claim(f"planner's share of an estimated step ({ranks} × {GPU})", "≤ 5 %", f"{share:.1%} at most",
                            met=share <= 0.05))  # fmt: skip
    rows = [
        (one.name, part, f"{ran / 1e9:.2f}", f"{estimate / 1e9:.2f}", f"{ran / estimate - 1:+.1%}" if estimate else "–")
        for one in found for part, (ran, estimate) in one.parts.items()
    ]  # fmt: skip
    counts = [
        (one.name, f"{len(one.counts)} of {ranks}", f"{min(one.counts)}–{max(one.counts)}", len(one.largest.calls),
         f"{one.largest.operators:,}", *(f"{n:,}" for n in dataclasses.astuple(one.largest.share)),
         f"{one.planning:.2f}", f"{seconds[one.name]:.2f}")
        for one in found
    ]  # fmt: skip
    tables = [
        Table("Collectives of one optimizer step", ("stage", "ranks with 2 + 2 layers", "collectives of each",
              "collectives with all layers", "operators of a rank", "tokens", "patches", "labels",
              "patches of its largest frame",
              "seconds to plan", "seconds a step, estimated"), counts),
        Table("Memory of the rank with the most patches, all layers, GB", ("stage", "part", "simulated", "estimated",
              "simulated against estimated"), rows),
    ]  # fmt: skip
    notes = [
        "Tensors have shapes and no values; torch's fake process group sends nothing. Real: the recipe keye_8b, the "
        "planner on drawn lengths, packing, sharding, model, recomputation, the trainer's step, DeepSpeed with the "
        "recipe's configuration and overlapped reduction, fused AdamW. Memory is what storages take while something "
        "refers to them, from one optimizer step. Tokens, patches and labels are the most of that rank's "
        "micro-batches. Ranks of a sequence group must issue the same collectives in the same order, all ranks the "
        "same ones over all. Logits include the gradient of the head where there are several chunks of labels. Buckets "
        "include what one takes that is reduced. Stage 0's text tower has SigLIP-so400m's shape and Keye's vocabulary.",
        "What this cannot show: whether NCCL or a kernel works or how fast it is (the attention of GPUs is its shape "
        "alone), time and overlap, fragmentation of the allocator and workspaces of libraries, values (overflow, loss, "
        "a skipped step), the loader's own exchange of samples between ranks, checkpoints, and start-up.",
    ]
    save(out_of(args), "simulation", claims, tables, seconds=took, quick=args.quick, notes=notes,
         seeds={"lengths": balance.SEED})  # fmt: skip


if __name__ == "__main__":
    run(main)
