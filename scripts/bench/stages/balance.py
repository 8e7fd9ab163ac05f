"""Fill and balance of packs on random lengths like those of the report's six kinds of data, up to 64 groups.

The real planner forms the steps from samples with random lengths. The cost of each rank is computed for the 8B model
(keye/model/flops.py): in a sequence-parallel group, a rank has its part of the decoder, the frames that it encodes, and
the logits of its labels. The baseline fills packs best-fit in the order of the draws and distributes them to the ranks
in that order, with complete frames.
"""

import pickle
import random
import time
from collections.abc import Iterator
from itertools import pairwise
from statistics import median
from types import SimpleNamespace

import numpy as np
import torch

from keye.errors import run
from keye.model.config import KeyeConfig
from scripts.bench.common.record import Claim, Table, arguments, out_of, save
from stages.data.packing.balance import Cost, TowerCost, assign_rounds, rank_operations
from stages.data.packing.mixture import Mixture
from stages.data.packing.packer import BalancedPacker
from stages.data.packing.planner import Planner
from stages.data.packing.samples import Block, Encoded, Meta
from stages.distributed.parallel import Piece, share_frames, vision_shares

EXAMPLES = """examples:
  python -m scripts.bench.stages.balance
  python -m scripts.bench.stages.balance --quick
"""
SEED = 3
# Data, context, packs a step, balanced packs (0: a quarter of the step), ranks that share a pack, and packs trained on
# at the same time; the first three as in keye_8b.toml.
SETTINGS = (
    ("mixed", 8192, 256, 0, 1, (2, 8, 64)), ("long", 131_072, 16, 8, 8, (1, 2, 8)), ("long", 131_072, 16, 16, 8, (16,)),
    ("long", 131_072, 64, 64, 8, (8, 64)), ("short", 8192, 256, 0, 1, (64,)), ("text", 8192, 256, 0, 1, (64,)),
)  # fmt: skip
STEPS, SHORT_STEPS = 30, 5
STEP_SECONDS = 5.0  # assumed of a step of the 8B model on 256 packs of 8,192 tokens, on 64 GPUs
MIXED = {
    "caption": ("image", 0.15), "ocr_vqa": ("image", 0.15), "grounding": ("image", 0.10),
    "interleaved": ("image", 0.10), "video": ("video", 0.24), "text": ("text", 0.26),
}  # fmt: skip
# The long context reads also stills of 8,192 to 20,480 tokens (`data/large_image.jsonl` of keye_8b.toml).
LONG = {**MIXED, "caption": ("image", 0.10), "ocr_vqa": ("image", 0.10), "large": ("image", 0.10)}
# Half of the samples are below 100 tokens.
SHORT = {"short_text": ("text", 0.26), "short_still": ("image", 0.50), "short_clip": ("video", 0.24)}
DATA = {"mixed": MIXED, "long": LONG, "short": SHORT, "text": {"short_text": ("text", 1.0)}}
SAMPLES = 4000  # of each kind, over and over


class Drawn:
    """A source of made-up samples; counts as one of `stages.data.sources.source`."""

    def __init__(self, name: str, kind: str, metas: list[Meta]) -> None:
        self.name, self.metas, self.at = name, metas, 0
        self.recipe = SimpleNamespace(kind=kind)

    def draw_many(self, count: int) -> np.ndarray:
        self.at += count
        return np.arange(self.at - count, self.at)

    def results(self, good: np.ndarray, causes: dict[int, str]) -> None:
        """All are good."""

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}


def still(draw: random.Random, most: int, median: int, least: int = 16) -> tuple[int, int]:
    """(height, width) in patches of a still of a lognormal number of tokens."""
    tokens = min(most, max(least, draw.lognormvariate(0, 1.0) * median))
    aspect = draw.uniform(0.6, 1.7)
    height = max(1, round((tokens / aspect) ** 0.5))
    return 2 * height, 2 * max(1, min(int(most / height), round(tokens / height)))


def words(draw: random.Random, median: int, spread: float, most: int) -> int:
    return int(min(most, max(8, draw.lognormvariate(0, spread) * median)))


def clip(draw: random.Random, context: int) -> list[tuple[int, int]]:
    """Frames of a clip at 2 fps: slow ones, and fast ones of 30 % of the tokens, inside the budget."""
    frames = words(draw, 60, 1.2, 1365)
    budget = 6144 if context == 8192 else 75_000
    slow = [i == 0 or draw.random() < 0.3 for i in range(frames)]
    share = budget / sum(1 if s else 0.3 for s in slow)
    tokens = min(768, max(48, share))
    while sum(int(tokens) if s else max(48, int(0.3 * tokens)) for s in slow) > budget and len(slow) > 1:
        slow.pop()
    sizes = [int(tokens) if s else max(48, int(0.3 * tokens)) for s in slow]
    return [(8, max(2, size // 4 * 2)) for size in sizes]  # 4 tokens high


def sample(kind: str, draw: random.Random, context: int) -> tuple[int, int, list[tuple[int, int]], list]:
    """Tokens of text, labels, stills and frames."""
    if kind.startswith("short"):
        text = words(draw, {"short_text": 100, "short_still": 40, "short_clip": 50}[kind], 1.0, context)
        stills = [still(draw, 1024, 50)] if kind == "short_still" else []
        return text, max(1, text // 2), stills, [(4, 4)] * words(draw, 10, 0.7, 64) if kind == "short_clip" else []
    large = 6144 if context == 8192 else 20_480
    if kind == "caption":
        text = words(draw, 150, 0.6, 1000)
        return text + 20, text, [still(draw, large, 500)], []
    if kind == "ocr_vqa":
        answer = words(draw, 40, 1.2, 1500)
        return answer + 40, answer, [still(draw, large, 1500)], []
    if kind == "large":
        answer = words(draw, 100, 1.0, 1500)
        return answer + 40, answer, [still(draw, large, 12_000, 8192)], []
    if kind == "grounding":
        answer = words(draw, 60, 0.8, 600)
        return answer + 40, answer, [still(draw, large, 900)], []
    if kind == "interleaved":
        text = words(draw, 800, 0.8, context // 4)
        return text, text, [still(draw, large // 16, 200) for _ in range(draw.randint(2, 12))], []
    if kind == "video":
        text = words(draw, 120, 0.8, 1000)
        frames = clip(draw, context)
        return text + 8 * len(frames) + 30, text, [], frames
    text = words(draw, 700, 1.3, context)
    return text, max(1, text // 2), [], []


def metas_of(kind: str, group: str, context: int, cost: Cost | TowerCost, seed: int, count: int = 0) -> Iterator[Meta]:
    draw, made = random.Random(f"{seed} {kind} {context}"), 0
    while made < (count or SAMPLES):
        text, labels, stills, frames = sample(kind, draw, context)
        tokens = text + sum(h * w // 4 for h, w in [*stills, *frames])
        if tokens <= context:
            excess = cost.excess(tokens, labels, [*stills, *frames])
            yield Meta(kind, made, group, tokens, labels, tuple(stills), tuple(frames), excess)
            made += 1


class Encoders:
    """The sizes of the samples of all sources, by block, as columns."""

    def __init__(self, made: dict[str, list[Meta]]) -> None:
        self.metas = [meta for of_source in made.values() for meta in of_source]
        self.table = Encoded.of(list(made), self.metas)
        self.starts = np.cumsum([0, *map(len, made.values())])

    def rows(self, source: np.ndarray, index: np.ndarray) -> np.ndarray:
        return self.starts[source] + index % SAMPLES

    def encode(self, block: Block) -> Encoded:
        found = self.table[self.rows(block.source, block.index)]
        found.index, found.place = block.index, np.arange(len(block))
        return found


def plan(
    kinds: dict[str, tuple[str, float]], context: int, packs: int, balanced: int, steps: int, cost: Cost, at_once: int
) -> tuple[list[list[list[Meta]]], dict[str, float], list[float], int]:
    """Steps of the planner, the shares of the kinds, seconds of processor of each step, bytes of the last as sent.

    The seconds are all that rank 0 does: drawing, planning, dealing to the ranks, writing the plan and the state.
    """
    sources = [
        (Drawn(kind, group, list(metas_of(kind, group, context, cost, SEED))), share)
        for kind, (group, share) in kinds.items()
    ]
    encoders = Encoders({source.name: source.metas for source, _ in sources})
    planner = Planner(Mixture(sources), BalancedPacker(context, packs, cost.per_token, balanced))
    found, seconds, sent = [], [], b""
    for _ in range(steps):
        began = time.process_time()
        planner.draws()
        while planner.hungry():
            planner.take(encoders.encode(planner.flight[0]))
            planner.draws()
        step = planner.plan()
        flops = step.samples.excess + step.samples.tokens * cost.per_token
        costs = [int(flops[a:b].sum()) for a, b in pairwise(step.starts.tolist())]
        sent = pickle.dumps((step, assign_rounds(costs, at_once), planner.state_dict()))
        seconds.append(time.process_time() - began)
        rows = encoders.rows(step.samples.source, step.samples.index).tolist()
        found.append([[encoders.metas[row] for row in rows[a:b]] for a, b in pairwise(step.starts.tolist())])
    return found, planner.realised(), seconds, len(sent)


def plain(steps: list[list[list[Meta]]], context: int, packs: int) -> list[list[list[Meta]]]:
    """The same samples in a random order, packed best-fit: oldest first, then always the largest that fits."""
    pool = [meta for step in steps for pack in step for meta in pack]
    random.Random(SEED).shuffle(pool)
    pool.reverse()
    made: list[list[Meta]] = []
    window: list[Meta] = []
    while pool or window:
        while pool and (len(window) < 64 or sum(m.tokens for m in window) < 2 * context):
            window.append(pool.pop())
        pack, room = [window.pop(0)], context
        room -= pack[0].tokens
        while fitting := [m for m in window if m.tokens <= room]:
            pack.append(max(fitting, key=lambda m: m.tokens))
            window.remove(pack[-1])
            room -= pack[-1].tokens
        made.append(pack)
    whole = len(made) // packs
    return [made[i * packs : (i + 1) * packs] for i in range(whole)]


def rank_costs(pack: list[Meta], cost: Cost, ranks: int, cut: bool) -> list[float]:
    """Operations of each rank of a sequence group in a pack; cut: large frames may be cut among them.

    A document's labels are its last tokens.
    """
    frames = [size for meta in pack for size in meta.stills] + [size for meta in pack for size in meta.frames]
    grids = torch.tensor([(1, *size) for size in frames]).reshape(-1, 3)
    if cut:
        shares = vision_shares(grids, ranks)
    else:
        sizes = grids.prod(1).tolist()
        frames_of = share_frames([size + size**2 / 6800 for size in sizes], ranks)
        shares = [[Piece(i, 0, sizes[i] // 4) for i in share] for share in frames_of]
    lengths = [meta.tokens for meta in pack]
    own = -(-sum(lengths) // ranks)
    labels, end = [0] * ranks, 0
    for meta in pack:
        end += meta.tokens
        for rank in range(ranks):
            labels[rank] += max(0, min(end, (rank + 1) * own) - max(end - meta.labels, rank * own))
    return [
        rank_operations(cost.config, share, frames, lengths, count, ranks)
        for share, count in zip(shares, labels, strict=True)
    ]


def slowest(
    steps: list[list[list[Meta]]], operations: list[list[list[float]]], at_once: int, cost: Cost, planned: bool
) -> float:
    """How much longer the slowest ranks of all rounds take than the mean: Σ largest ÷ Σ mean, over all ranks.

    operations: of every rank of the group of each pack (`rank_costs`). planned: packs are assigned in rounds as the
    loader does; otherwise as they come.
    """
    largest = mean = 0.0
    for step, costs in zip(steps, operations, strict=True):
        if planned:
            wholes = [sum(m.excess + m.tokens * cost.per_token for m in pack) for pack in step]
            rounds = list(zip(*([p for (p,) in rank] for rank in assign_rounds(wholes, at_once)), strict=True))
        else:
            rounds = [range(i, i + at_once) for i in range(0, len(costs), at_once)]
        for round_ in rounds:
            every = [rank for pack in round_ for rank in costs[pack]]
            largest += max(every)
            mean += sum(every) / len(every)
    return largest / mean


def of_video(step: list[list[Meta]]) -> float:
    """Per cent of a step's tokens."""
    return 100 * sum(m.tokens for p in step for m in p if m.kind == "video") / sum(m.tokens for p in step for m in p)


def main() -> int:
    args = arguments(__doc__, EXAMPLES, results="stages").parse_args()
    began = time.monotonic()
    config = KeyeConfig.preset("keye_8b")
    cost = Cost(config)
    rows, claims, worst, fullest, apart, slow = [], [], 0.0, 1.0, 0.0, 0.0
    for data, context, packs, balanced, sequence, sizes in SETTINGS:
        steps = 3 if args.quick else STEPS if data in ("mixed", "long") else SHORT_STEPS
        found, shares, seconds, sent = plan(DATA[data], context, packs, balanced, steps, cost, max(sizes))
        usual = plain(found, context, packs)
        filled = [sum(m.tokens for m in pack) / context for step in found for pack in step]
        wanted = {kind: 0.0 for kind, _ in DATA[data].values()}
        for kind, share in DATA[data].values():
            wanted[kind] += share
        off = max(abs(shares[kind] - share) for kind, share in wanted.items())
        fill, apart = sum(filled) / len(filled), max(apart, off)
        fullest = min(fullest, fill)
        films = [of_video(step) for step in found]
        lengths = [meta.tokens for step in found for pack in step for meta in pack]
        if (context, packs) == (8192, 256):
            slow = max(slow, *seconds[1:])
        # A pack costs its group the same however many groups there are.
        cut = [[rank_costs(pack, cost, sequence, True) for pack in step] for step in found]
        uncut = [[rank_costs(pack, cost, sequence, False) for pack in step] for step in found] if sequence > 1 else []
        plainly = [[rank_costs(pack, cost, sequence, False) for pack in step] for step in usual]
        for at_once in sizes:
            ours = slowest(found, cut, at_once, cost, True)
            whole = slowest(found, uncut, at_once, cost, True) if sequence > 1 else 0.0
            theirs = slowest(usual, plainly, at_once, cost, False)
            worst = max(worst, ours)
            rows.append(
                (data, f"{context:,}", f"{median(lengths):,.0f}", f"{len(lengths) / steps:,.0f}", packs,
                 BalancedPacker(context, packs, 0, balanced).balanced_packs,
                 f"{at_once} × {sequence}", f"{ours:.3f}", f"{whole:.3f}" if sequence > 1 else "–", f"{theirs:.3f}",
                 f"{100 * fill:.2f} %", f"{100 * min(filled):.1f} %", f"{100 * off:.2f}",
                 f"{min(films):.0f}–{max(films):.0f} %",
                 f"{1000 * median(seconds[1:]):.0f}", f"{sent / 1000:,.0f}")
            )  # fmt: skip
            print(*rows[-1], flush=True)
    claims = [
        Claim("the slowest of all ranks against the mean of its round", "within 5 %",
              f"{100 * (worst - 1):.1f} % at most", met=worst <= 1.05),
        Claim("packs on mixed data are full", "≥ 98 %", f"{100 * fullest:.2f} %", met=fullest >= 0.98),
        Claim("planning a step of 256 packs of 8,192 tokens: processor time of the one process that plans",
              f"≤ 5 % of {STEP_SECONDS:.0f} s", f"{100 * slow / STEP_SECONDS:.1f} % in the slowest step",
              met=slow <= 0.05 * STEP_SECONDS),
        Claim(f"realised shares of the tokens after {SHORT_STEPS} to {STEPS} steps", "within 1 %",
              f"{100 * apart:.2f} points off", met=apart <= 0.01 if not args.quick else None),
    ]  # fmt: skip
    columns = ("data", "context", "median tokens", "samples a step", "packs a step", "balanced packs",
               "ranks (packs at once × ranks a pack)", "slowest ÷ mean", "the same, frames not cut",
               "best-fit, as drawn", "full", "emptiest", "points off share", "video in a step", "ms to plan a step",
               "kB sent and saved")  # fmt: skip
    notes = [
        "Slowest ÷ mean: the packs of a step are trained on in rounds, in which each rank (or sequence group) takes "
        "one pack. The figure is the sum over all rounds of the operations of the slowest rank, divided by the sum "
        "over all rounds of the mean of the ranks: 1.05 means that the ranks need 5 % more time than if all had the "
        "same work. In a sequence group, the operations of a rank are its part of the decoder, the frames that it "
        "encodes, and the logits of its own labels. The plan does not depend on the number of ranks, only on how many "
        "packs must be balanced: samples that are too expensive are deferred until there are as many of similar cost, "
        "and come in one step, so the share of video varies from step to step. Lengths are drawn, a tenth of the "
        "tokens at 131,072 in stills of 8,192 to 20,480; costs are computed for the 8B model.",
        "Milliseconds are processor time, median over the steps after the first: one process of a run plans for all "
        "ranks; drawing, planning, sending to the ranks and writing plan and state are counted, encoding is not.",
    ]
    table, seconds = Table("Steps of the planner", columns, rows), time.monotonic() - began
    save(out_of(args), "balance", claims, [table], seconds=seconds, quick=args.quick, seeds={"lengths": SEED},
         notes=notes)  # fmt: skip
    return 0


if __name__ == "__main__":
    run(main)
