"""Slow alone, Fast alone, both without and with the lateral at equal operations, on clips that alias for Slow."""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from keye.files import write_atomically
from keye.motion.frames import macs, pathways
from keye.motion.network import SlowFastNet
from keye.motion.settings import PRESETS, SlowFastSettings
from scripts.bench.common.intervals import paired_interval
from scripts.bench.common.record import Claim, Table
from scripts.bench.systems.motion.clips import CLASSES, FAMILIES, SIDE, VALUES, classes_of, draw

TINY = replace(PRESETS["tiny"], classes=CLASSES)
# Widths chosen for multiply-accumulates within 12 % of those of the network with laterals.
ARMS: dict[str, SlowFastSettings] = {
    "slow alone": replace(TINY, fast=False, width=27, beta=1),
    "fast alone": replace(TINY, slow=False, width=8, beta=1),
    "no lateral": replace(TINY, lateral="none", width=19),
    "lateral": TINY,
}
SEEDS = (11, 12, 13, 14, 15, 16)
STEPS, BATCH, RATE = 200, 24, 4e-3
HELD_OUT = 200  # clips of a family
TRAIN_SEED, TEST_SEED = 1_000, 950_000
MISSING = "Aliasing: not measured."
NOTE = (
    f"Aliasing: {STEPS} steps of {BATCH} new clips of 16 frames of {SIDE}×{SIDE} pixels, a third of each family; "
    f"{HELD_OUT} held-out clips of each family, the same for all networks. Trials had other seeds and other clips. "
    "Intervals are of the mean over seeds, which differ more than clips do: bootstrap over the seeds of each network. "
    "Operations are equal within 16 %."
)


def train(settings: SlowFastSettings, seed: int, steps: int) -> SlowFastNet:
    """A network trained for `steps` steps of `BATCH` new clips, a third of each family."""
    torch.manual_seed(seed)
    net = SlowFastNet(settings).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=1e-4)
    for step in range(steps):
        rate = min(1.0, (step + 1) / (0.1 * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = RATE * rate
        drawn = {name: draw(name, BATCH // 3, TRAIN_SEED + seed * 100_000 + step) for name in FAMILIES}
        logits = net(pathways(torch.cat([clips for clips, _ in drawn.values()]), settings)).split(BATCH // 3)
        losses = [
            F.cross_entropy(part[:, classes_of(name)], drawn[name][1])
            for name, part in zip(FAMILIES, logits, strict=True)
        ]
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        optimizer.step()
    return net.eval()


@torch.no_grad()
def answers(net: SlowFastNet, held_out: int) -> dict[str, list[int]]:
    """1 or 0 for each held-out clip of each family: whether the network names its class."""
    found = {}
    for family in FAMILIES:
        clips, labels = draw(family, held_out, TEST_SEED)
        logits = torch.cat([net(pathways(part, net.settings)) for part in clips.split(40)])
        found[family] = (logits[:, classes_of(family)].argmax(1) == labels).int().tolist()
    return found


def measure(folder: Path, quick: bool) -> None:
    """Train and ask every arm and seed that `folder` does not have."""
    for seed in SEEDS[:1] if quick else SEEDS:
        for arm in ARMS:
            if not _path(folder, arm, seed).exists():
                _train_and_ask(folder, arm, seed, quick)


def finished(folder: Path) -> tuple[dict[str, dict[str, list[list[int]]]], float] | None:
    """Arm → family → seed → answers, of the seeds that `folder` has for all arms, and the CPU seconds of all.

    None if there is no such seed.
    """
    seeds = [seed for seed in SEEDS if all(_path(folder, arm, seed).exists() for arm in ARMS)]
    if not seeds:
        return None
    found = {arm: [json.loads(_path(folder, arm, seed).read_text()) for seed in seeds] for arm in ARMS}
    right = {arm: {family: [one["right"][family] for one in found[arm]] for family in FAMILIES} for arm in ARMS}
    return right, sum(one["cpu"] for arm in ARMS for one in found[arm])


def _path(folder: Path, arm: str, seed: int) -> Path:
    return folder / f"{arm.replace(' ', '_')}_{seed}.json"


def _train_and_ask(folder: Path, arm: str, seed: int, quick: bool) -> None:
    began = time.process_time()
    steps, held_out = (2, 8) if quick else (STEPS, HELD_OUT)
    right = answers(train(ARMS[arm], seed, steps), held_out)
    cpu = time.process_time() - began
    write_atomically(_path(folder, arm, seed), json.dumps({"right": right, "cpu": cpu}) + "\n")
    means = ", ".join(f"{name} {100 * np.mean(values):.1f} %" for name, values in right.items())
    print(f"  {arm}, seed {seed}: {means} ({cpu:.0f} s of CPU)", flush=True)


def report(found: dict[str, dict[str, list[list[int]]]]) -> tuple[list[Claim], Table]:
    """The claims and the table of the measurement."""
    rows = [[*_sizes(arm), *(_share(found[arm][family]) for family in FAMILIES)] for arm in ARMS]
    chance = ["chance", "", "", *(f"{100 / len(VALUES[family]):.1f}" for family in FAMILIES)]
    seeds = len(found["lateral"]["spin"])
    table = Table(
        f"Correct in % of held-out drawn clips, mean of {seeds} seeds (each seed)",
        ("network", "parameters", "MMACs", *FAMILIES),
        [*rows, chance],
    )
    return list(_claims(found)), table


def _sizes(arm: str) -> list[str]:
    settings = ARMS[arm]
    count = sum(p.numel() for p in SlowFastNet(settings).parameters())
    return [arm, f"{count:,}", f"{macs(settings, SIDE) / 1e6:.1f}"]


def _share(seeds: list[list[int]]) -> str:
    return f"{100 * np.mean(seeds):.1f} (" + ", ".join(f"{100 * np.mean(values):.0f}" for values in seeds) + ")"


def _claims(found: dict[str, dict[str, list[list[int]]]]) -> Iterator[Claim]:
    means = {arm: {family: np.mean(found[arm][family], axis=1) for family in FAMILIES} for arm in ARMS}
    for family in ("spin", "flicker"):
        seeds = found["slow alone"][family]
        chance = 1 / len(VALUES[family])
        low, high = paired_interval(np.mean(seeds, axis=0) - chance)
        yield Claim(
            f"{family}: Slow alone minus chance ({100 * chance:.1f} %)",
            "interval over clips holds 0: it sees nothing of it",
            f"{100 * (np.mean(seeds) - chance):+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]",
            met=low <= 0 <= high,
        )
    for family in FAMILIES:
        for other in list(ARMS)[:3]:
            one, less = means["lateral"][family], means[other][family]
            low, high = seeds_interval(one, less)
            yield Claim(
                f"{family}: lateral minus {other}, at equal operations",
                "–",
                f"{100 * (one.mean() - less.mean()):+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]",
            )


def seeds_interval(one: np.ndarray, other: np.ndarray, draws: int = 10_000) -> tuple[float, float]:
    """The 95 % interval of the difference of two means over seeds; seeds of two networks have nothing in common."""
    rng = np.random.default_rng(0)
    ends = [values[rng.integers(0, len(values), (draws, len(values)))].mean(1) for values in (one, other)]
    low, high = np.percentile(ends[0] - ends[1], (2.5, 97.5))
    return float(low), float(high)
