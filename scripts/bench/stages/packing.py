"""A training step of stage 2 on packs compared with the same documents padded: same engine, model and steps.

The stage's loader draws packs from mixed data. The documents of each step are also arranged as padded batches: in
random order with a fixed number of rows, and sorted by length with the split that wastes the fewest positions, which is
the best possible padding. Batches are assigned to ranks by their number of positions. Steps of the trainer alternate
between the layouts; losses and labels are equal.
"""

import argparse
import json
import random
import time
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from keye.errors import run
from scripts.bench.common.record import ROOT, Claim, Table, arguments, forget_other_code, out_of, save
from scripts.bench.stages.documents import MIXTURE, draw_mixed, torchrun, write_recipe

PACKED, BY_LENGTH = "packed", "padded, sorted by length"
ROWS = (4, 16)  # rows of a padded batch as drawn
SEED, LIMIT = 3, 1800
SCRATCH = ROOT / ".cache" / "bench" / "stages_packing"
EXAMPLES = """examples:
  python -m scripts.bench stages --part packing
  python -m scripts.bench.stages.packing --quick
"""
VISUAL = (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw"))


@dataclass
class Document:
    """One document of a pack: ids `[L]`, positions `[3, L]`, shifted labels `[L]`; its stills' and frames' pixels."""

    input_ids: Tensor
    position_ids: Tensor
    shift_labels: Tensor
    visual: dict[str, Tensor]

    @property
    def tokens(self) -> int:
        return len(self.input_ids)


def documents(row: dict[str, Tensor], image: int, video: int) -> list[Document]:
    """The documents of a packed row, each with the pixels and grids that its placeholders (ids image, video) want."""
    bounds = row["cu_seqlens"].tolist()
    at = dict.fromkeys(("pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw"), 0)
    found = []
    for start, end in pairwise(bounds):
        ids, visual = row["input_ids"][0, start:end], {}
        for (pixels, grids), token in zip(VISUAL, (image, video), strict=True):
            wanted = 4 * int((ids == token).sum())
            if not wanted:
                continue
            first_grid, first = at[grids], at[pixels]
            sizes = row[grids][first_grid:].prod(1).cumsum(0)
            count = int((sizes <= wanted).sum())
            visual[grids] = row[grids][first_grid : first_grid + count]
            visual[pixels] = row[pixels][first : first + wanted]
            at[grids], at[pixels] = first_grid + count, first + wanted
        found.append(Document(ids, row["position_ids"][:, 0, start:end], row["shift_labels"][0, start:end], visual))
    # What only fills a row up to a multiple has no labels and nothing to teach.
    return [document for document in found if bool((document.shift_labels != -100).any())]


def padded(batch: list[Document], pad: int) -> dict[str, Any]:
    """One padded batch: input_ids, attention_mask, shift_labels `[B, L]`, position_ids `[3, B, L]`, pixels, grids."""
    from keye.slowfast.pixels import join

    rows, length = len(batch), max(document.tokens for document in batch)
    out = {
        "input_ids": torch.full((rows, length), pad),
        "attention_mask": torch.zeros(rows, length, dtype=torch.long),
        "shift_labels": torch.full((rows, length), -100),
        "position_ids": torch.zeros(3, rows, length, dtype=torch.long),
    }
    for i, document in enumerate(batch):
        size = document.tokens
        out["input_ids"][i, :size], out["attention_mask"][i, :size] = document.input_ids, 1
        out["shift_labels"][i, :size], out["position_ids"][:, i, :size] = document.shift_labels, document.position_ids
    for name in (name for pair in VISUAL for name in pair):
        parts = [document.visual[name] for document in batch if name in document.visual]
        if parts:
            out[name] = join(parts)
    # The trainer counts operations by the documents: padding is no work that anybody asked for.
    lengths = torch.tensor([0] + [document.tokens for document in batch]).cumsum(0)
    count = int(lengths[-1])
    return {**out, "cu_seqlens": lengths, "kinds": {"text": count}}


def as_drawn(sizes: list[int], batches: int, draw: random.Random) -> list[list[int]]:
    """Indices in random order, cut into batches of the same number of documents (± 1)."""
    order = draw.sample(range(len(sizes)), len(sizes))
    cuts = [round(i * len(order) / batches) for i in range(batches + 1)]
    return [order[a:b] for a, b in pairwise(cuts)]


def by_length(sizes: list[int], batches: int) -> list[list[int]]:
    """Indices sorted by length and cut into so many batches that together have the fewest padded positions."""
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    lengths, count = [sizes[i] for i in order], len(order)
    # best[k][j]: positions of the first j documents in k batches; a batch a…b costs its first (longest) × its rows.
    best = [[0] + [sum(lengths) * count + 1] * count]
    cut: list[list[int]] = []
    for k in range(1, batches + 1):
        line, where = [sum(lengths) * count + 1] * (count + 1), [0] * (count + 1)
        for j in range(k, count + 1):
            costs = [(best[k - 1][a] + lengths[a] * (j - a), a) for a in range(k - 1, j)]
            line[j], where[j] = min(costs)
        best.append(line)
        cut.append(where)
    groups, end = [], count
    for k in range(batches, 0, -1):
        start = cut[k - 1][end]
        groups.append(order[start:end])
        end = start
    return groups[::-1]


def share_out(groups: list[list[int]], sizes: list[int], ranks: int) -> list[list[list[int]]]:
    """The batches of every rank, as many for each, the most expensive first to the rank with the least so far."""
    room = [len(groups) // ranks] * ranks
    loads, given = [0] * ranks, [[] for _ in range(ranks)]
    for group in sorted(groups, key=lambda g: -max(sizes[i] for i in g) * len(g)):
        rank = min((r for r in range(ranks) if len(given[r]) < room[r]), key=lambda r: loads[r])
        given[rank].append(group)
        loads[rank] += max(sizes[i] for i in group) * len(group)
    return given


class Prepared:
    """A loader of batches that were made before."""

    def __init__(self, batches: list[dict[str, Any]]) -> None:
        self.batches, self.at, self.stalled = batches, 0, 0.0

    def next(self) -> dict[str, Any]:
        self.at += 1
        return self.batches[self.at - 1]

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]

    def close(self) -> None:
        """No thread runs."""


class Padded:
    """Stage 2 on padded batches: the same loss, without `cu_seqlens`."""

    name = "multitask"

    def weight(self, batch: dict[str, Any], grid: Any) -> float:
        return float((batch["shift_labels"] != -100).sum())

    def loss(self, module: nn.Module, batch: dict[str, Any], grid: Any) -> Tensor:
        inputs = {k: v for k, v in batch.items() if isinstance(v, Tensor) and k != "cu_seqlens"}
        return module(**inputs, num_items_in_batch=1.0).loss


def layouts(step: list[Document], packs: int, ranks: int, draw: random.Random) -> dict[str, list[list[list[int]]]]:
    """Layout → the batches of every rank, as indices of a step's documents; as many batches for each rank."""
    sizes = [document.tokens for document in step]
    found = {}
    for rows in ROWS:
        batches = max(1, round(len(sizes) / rows / ranks)) * ranks
        found[f"padded as drawn, {rows} rows"] = share_out(as_drawn(sizes, batches, draw), sizes, ranks)
    return found | {BY_LENGTH: share_out(by_length(sizes, packs), sizes, ranks)}


def worker(recipe_path: Path, folder: Path, rounds: int) -> None:
    """One process of the measurement: draw, lay out, train in turn; rank 0 writes `folder/steps.json`."""
    from stages import recipe as recipes
    from stages.data.items import Cache
    from stages.distributed import engine
    from stages.distributed.weights import open_start
    from stages.preparation import prepare_tokenizer
    from stages.run import open_stage, start_of
    from stages.trainer import Trainer

    recipe = recipes.load(recipe_path)
    engine.start()
    grid_ranks, rank = dist.get_world_size(), dist.get_rank()
    if rank == 0:
        prepare_tokenizer(recipe, folder)
    dist.barrier()
    opened = open_stage("multitask", recipe, folder, Cache(1 << 30))
    trainer, processor, settings = opened.trainer, opened.processor, recipe.multitask
    packs = [[trainer.loader.next() for _ in range(trainer.micro_batches)] for _ in range(rounds + 1)]
    stalled = trainer.loader.stalled
    trainer.loader.close()
    tokens = [processor.token_id(name) for name in ("<|image_pad|>", "<|video_pad|>")]
    prepared: dict[str, list[list[dict[str, Any]]]] = defaultdict(list)
    sizes, draw = [], random.Random(SEED)
    for step in packs:
        prepared[PACKED].append(step)
        everyone: list[list[Document]] = [[] for _ in range(grid_ranks)]
        dist.all_gather_object(everyone, [d for row in step for d in documents(row, *tokens)])
        mixed = [document for part in everyone for document in part]
        sizes.append([document.tokens for document in mixed])
        for name, given in layouts(mixed, settings.global_batch_size, grid_ranks, draw).items():
            batches = [padded([mixed[i] for i in group], processor.tokenizer.pad_token_id) for group in given[rank]]
            prepared[name].append(batches)
    trainers, weights = {PACKED: trainer}, opened.model.state_dict()
    for name in prepared:
        if name != PACKED:
            model = open_start(start_of("multitask", recipe, folder)).build(torch.float32).train()
            model.load_state_dict(weights)
            trainers[name] = Trainer(
                Padded(), model, Prepared([]), trainer.grid, settings, folder / name, len(prepared[name][0]),
                recipe.precision,
            )  # fmt: skip
    steps = []
    for number in range(rounds + 1):  # the first warms up
        names = list(prepared) if number % 2 else list(prepared)[::-1]
        for name in names:
            values = one_step(trainers[name], prepared[name][number])
            steps.append({"layout": name, "round": number, **values})
    if rank == 0:
        computed = {name: sum(_positions(b) for s in made for b in s) for name, made in prepared.items()}
        record = {"steps": steps, "computed_rank0": computed, "sizes": sizes, "stalled": stalled}
        (folder / "steps.json").write_text(json.dumps(record))
    engine.stop()


def one_step(trainer: Any, batches: list[dict[str, Any]]) -> dict[str, float]:
    """A step of a trainer on these batches: loss, documents' tokens over all ranks, seconds of the slowest rank."""
    trainer.loader = Prepared(batches)
    # The number of batches follows the number of documents, which is another in every step.
    trainer.micro_batches = len(batches)
    trainer.engine.set_train_batch_size(len(batches) * trainer.grid.world)
    trainer.engine.micro_steps = 0
    dist.barrier()
    began = time.perf_counter()
    values = trainer.train_step()
    dist.barrier()
    return {"loss": values["loss"], "tokens": values["tokens"], "seconds": time.perf_counter() - began}


def _positions(batch: dict[str, Any]) -> int:
    return batch["input_ids"].numel()


def measure(processes: int, rounds: int, quick: bool) -> dict[str, Any]:
    """The worker's result on a number of processes; saved, so that an interrupted bench resumes."""
    folder = SCRATCH / f"{'quick-' if quick else ''}{processes}"
    found = folder / "steps.json"
    if not found.exists():
        folder.mkdir(parents=True, exist_ok=True)
        draw_mixed(SCRATCH / ("world-quick" if quick else "world"), SEED, 0.2 if quick else 1.0)
        context, packs = (1024, 2) if quick else (2048, 4)
        recipe = write_recipe(folder / "packing.toml", SCRATCH / ("world-quick" if quick else "world"), context, packs)
        worker = ["-m", __spec__.name, "--worker", str(recipe), str(folder), str(rounds)]
        torchrun(worker, folder / "log", processes, LIMIT)
    return json.loads(found.read_text())


def judge(processes: int, record: dict[str, Any]) -> tuple[list[Claim], list[tuple]]:
    """Claims and rows of one number of processes: rates are medians over rounds, ratios are of the same round."""
    rates: dict[str, list[float]] = defaultdict(list)
    losses: dict[int, list[float]] = defaultdict(list)
    for step in sorted(record["steps"], key=lambda s: s["round"]):
        losses[step["round"]].append(step["loss"])
        if step["round"]:
            rates[step["layout"]].append(step["tokens"] / step["seconds"])
    apart = max(max(found) - min(found) for found in losses.values())
    drawn = [name for name in rates if name.startswith("padded as drawn")]
    best = max(drawn, key=lambda name: median(rates[name]))
    where = f"stage 2, {processes} process{'es' if processes > 1 else ''}"
    claims = []
    for other, goal in ((best, 2.0), (BY_LENGTH, 1.0)):
        gain = median(a / b for a, b in zip(rates[PACKED], rates[other], strict=True))
        figure = f"{median(rates[PACKED]):,.0f} against {median(rates[other]):,.0f} tokens/s"
        wanted = f"≥ {goal:g} ×" if goal > 1 else "faster"
        claims.append(Claim(f"{where}: packs compared with {other}", wanted, figure, f"{gain:.2f} ×", gain >= goal))
    claims.append(
        Claim(f"{where}: loss of the same step in every layout", "≤ 1e-4 apart", f"{apart:.1e}", met=apart <= 1e-4)
    )
    total = sum(map(sum, record["sizes"])) / processes
    rows = [
        (processes, name, f"{median(found):,.0f}", f"{min(total / record['computed_rank0'][name], 1):.0%}")
        for name, found in rates.items()
    ]
    return claims, rows


def main() -> None:
    parser: argparse.ArgumentParser = arguments(__doc__, EXAMPLES, results="stages")
    parser.add_argument("--rounds", type=int, help="steps of each layout (9; 2 with --quick)")
    parser.add_argument("--fresh", action="store_true", help="forget what an earlier run measured")
    parser.add_argument("--worker", nargs=3, metavar=("RECIPE", "DIR", "ROUNDS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(Path(args.worker[0]), Path(args.worker[1]), int(args.worker[2]))
        return
    forget_other_code(SCRATCH)
    began, rounds = time.monotonic(), args.rounds or (2 if args.quick else 9)
    claims, rows, lengths = [], [], []
    for processes in (1, 2):
        if args.fresh:
            (SCRATCH / f"{'quick-' if args.quick else ''}{processes}" / "steps.json").unlink(missing_ok=True)
        record = measure(processes, rounds, args.quick)
        found, cells = judge(processes, record)
        claims, rows, lengths = claims + found, rows + cells, sorted(n for step in record["sizes"] for n in step)
    columns = ("processes", "layout", "tokens of documents a second", "full (rank 0)")
    middle = lengths[len(lengths) // 2]
    shares = ", ".join(f"{kind} {share:.0%}" for kind, share in MIXTURE.items())
    notes = [
        f"Tokens: {shares}. Documents have {lengths[0]} to {lengths[-1]} tokens, half of them at most {middle}. Every "
        "layout trains on the same documents in the same step; encoding is done before. Padding is free to spend more "
        "memory: a batch as drawn takes as many positions as its longest document asks for.",
    ]
    save(
        out_of(args), "packing", claims, [Table("Layouts, medians over rounds", columns, rows)], quick=args.quick,
        seconds=time.monotonic() - began, seeds={"world and order": SEED}, notes=notes
    )  # fmt: skip


if __name__ == "__main__":
    run(main)
