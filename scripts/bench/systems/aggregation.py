"""Feature aggregation of SlowFast-LLaVA in a tiny reader: what do slow and fast tokens give at equal cost?

A tiny model learns to read stills: one to six unrelated pictures in a chat, one of which shows the answer. Then it
reads clips without any training (SlowFast-LLaVA), with three slow frames and pooled tokens of all frames, with slow
frames only and with pooled tokens only, at equal numbers of visual tokens. Copies of it are then trained on clips, one
for each of these (SlowFast-LLaVA-1.5). Each seed has weights, training questions and held-out questions of its own.
"""

import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from keye.errors import run
from keye.files import write_atomically
from scripts.bench.common.intervals import paired_interval
from scripts.bench.common.record import ROOT, Claim, Table, arguments, out_of, save
from scripts.bench.systems.aggregation_reader import (
    CELLS,
    ENCODERS,
    READ,
    SLOW,
    TOKENS,
    WATCHED,
    answers,
    changed_frames,
    clips,
    confident_frames,
    heldout,
    new_model,
    saved,
    still_part,
    stills,
    train,
    with_slow,
)

EXAMPLES = """examples:
  python -m scripts.bench.systems.aggregation                 three seeds; finished arms are read, not repeated
  python -m scripts.bench.systems.aggregation --seeds 0       one seed
  python -m scripts.bench.systems.aggregation --quick         shows that it runs
"""
SCRATCH = ROOT / ".cache" / "bench" / "systems" / "aggregation"
FREE = "training-free"
TRAINED = ("slow + fast", "slow only", "fast only", "slow + fast, pixels")
CHOSEN = {
    "periodic": "every fourth frame",
    "adaptive": "by this project's measure",
    "question": "by the reader's confidence",
    "evidence": "the frames that show the answer",
}
"""Ways to choose the slow frames; the last one knows the truth and is an upper bound."""
SEEDS = (0, 1, 2)
EACH, STEPS, CLIP_STEPS, BATCH, RATE = 60, 120, 110, 2048, 2e-3

Rows = dict[str, dict[str, list[int]]]
"""Arm → family → 1 for each question that is answered correctly, else 0."""


def by_family(rows: Sequence[int], families: Sequence[str], each: int) -> dict[str, list[int]]:
    """Rows in the order of `heldout`, by family."""
    return {family: list(rows[i * each : (i + 1) * each]) for i, family in enumerate(families)}


def free(seed: int, scratch: Path, each: int, steps: int, batch: int) -> dict[str, Any]:
    """Train the reader of stills, and let it read clips in every way without training."""
    cpu = [0.0]

    def make() -> Any:
        model = new_model(seed)
        cpu[0] = train(model, stills(seed, batch), steps, RATE, lambda text: print(f"seed {seed}, stills: {text}"))
        return model

    model = saved(scratch / str(seed) / "stills.pt", make)
    questions, families = heldout(seed, list(READ), each), list(READ)
    found: Rows = {}
    for as_video in (False, True):
        rows = answers(model, questions, "slow only", lambda one: still_part(one, one.cells[0], as_video))  # noqa: B023
        found[f"still of the answer, {'video of one frame' if as_video else 'image'}"] = by_family(rows, families, each)
    for name in ENCODERS:
        found[name] = by_family(answers(model, questions, name), families, each)
        print(f"seed {seed}, {FREE}, {name}: {means(found[name])}", flush=True)
    picks = {
        "periodic": [list(range(0, CELLS, CELLS // SLOW))] * len(questions),
        "adaptive": [changed_frames(one) for one in questions],
        "question": confident_frames(model, questions),
        "evidence": [_evidence(one.cells) for one in questions],
    }
    hits = {}
    for name, chosen in picks.items():
        places = {one.name: slow for one, slow in zip(questions, chosen, strict=True)}
        rows = answers(model, questions, "slow + fast", lambda one: with_slow(one, places[one.name]))  # noqa: B023
        found[f"slow frames: {name}"] = by_family(rows, families, each)
        hit = [int(bool({*one.cells} & {*places[one.name]})) for one in questions]
        hits[name] = by_family(hit, families, each)
        print(f"seed {seed}, {FREE}, slow frames {name}: {means(found[f'slow frames: {name}'])}", flush=True)
    return {"rows": found, "hits": hits, "cpu": cpu[0]}


def _evidence(cells: Sequence[int]) -> list[int]:
    """Three frames, as many as there are of those that show the answer."""
    rest = [cell for cell in range(0, CELLS, CELLS // SLOW) if cell not in cells]
    return sorted([*cells[:SLOW], *rest][:SLOW])


def trained(name: str, seed: int, scratch: Path, each: int, steps: int, batch: int) -> dict[str, Any]:
    """Train a copy of the reader of stills on clips under one encoder, and let it read held-out clips."""
    path = scratch / str(seed) / "stills.pt"
    model = new_model(seed)
    model.load_state_dict(torch.load(path, weights_only=True))
    say = lambda text: print(f"seed {seed}, {name}: {text}", flush=True)  # noqa: E731
    cpu = train(model, clips(name, seed, batch), steps, RATE, say)
    questions = heldout(seed, list(WATCHED), each)
    found = by_family(answers(model, questions, name), list(WATCHED), each)
    say(str(means(found)))
    return {"rows": {name: found}, "cpu": cpu}


def means(rows: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Accuracy of each family in percent."""
    return {family: round(100 * float(np.mean(values))) for family, values in rows.items()}


def measured(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The results of `path`, measured if it is not there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(make()) + "\n")
    return json.loads(path.read_text(encoding="utf-8"))


# --- the page ---------------------------------------------------------------------------------------------------------


def pooled(parts: Sequence[Rows], arm: str, families: Sequence[str]) -> np.ndarray:
    """Percent, of every question of every seed."""
    return 100 * np.array([row for part in parts for family in families for row in part[arm][family]], dtype=float)


def against(parts: Sequence[Rows], one: str, other: str, families: Sequence[str]) -> tuple[str, float]:
    """The paired difference of two arms with its 95 % interval, and the interval's lower end."""
    difference = pooled(parts, one, families) - pooled(parts, other, families)
    low, high = paired_interval(difference)
    return f"{difference.mean():+.1f} ({low:+.1f} … {high:+.1f})", low


def rows_of(
    parts: Sequence[Rows], arms: Mapping[str, Sequence[Any]], families: Sequence[str], base: str
) -> list[tuple]:
    """A row for each arm: its facts, accuracy by family, mean by seed, and difference to `base`."""
    rows = []
    for arm, facts in arms.items():
        seeds = " · ".join(f"{pooled([part], arm, families).mean():.0f}" for part in parts)
        shown = [f"{pooled(parts, arm, [family]).mean():.0f}" for family in families]
        gain = "–" if arm == base else against(parts, arm, base, families)[0]
        rows.append((arm, *facts, *shown, seeds, gain))
    return rows


def tables(found: Sequence[Mapping[str, Any]], after: Sequence[Rows]) -> list[Table]:
    """Accuracy of every arm, training-free and trained, and of every way to choose slow frames."""
    parts, families, watched = [one["rows"] for one in found], list(READ), list(WATCHED)
    sizes = {
        "slow + fast": TOKENS, "slow only": TOKENS, "fast only": TOKENS, "slow + fast, pixels": TOKENS,
        "slow + fast, maximum": TOKENS, "slow + fast, slow block first": TOKENS,
        "slow frames, no fast": 16 * SLOW, "1 token a fast frame": 16 * SLOW + CELLS,
        "16 tokens a fast frame": 16 * (SLOW + CELLS),
    }  # fmt: skip
    stills_of = {arm: (tokens,) for tokens, kind in ((16, "image"), (16, "video of one frame"))
                 for arm in [f"still of the answer, {kind}"]}  # fmt: skip
    arms = {**stills_of, **{arm: (tokens,) for arm, tokens in sizes.items()}}
    base = "slow + fast"
    picks = {f"slow frames: {name}": (text, _hit(found, name)) for name, text in CHOSEN.items()}
    columns = ("arm", "visual tokens", *families, "mean by seed", f"difference to {base} (95 %)")
    ways = ("arm", "chosen", "clips with the answer in a slow frame, %", *families, "mean by seed",
            "difference to periodic (95 %)")  # fmt: skip
    last = ("arm", *watched, "mean by seed", f"difference to {base} (95 %)")
    return [
        Table("A reader of stills reads clips, no training on clips; accuracy in percent", columns,
              rows_of(parts, arms, families, base)),
        Table(f"The same, {TOKENS} tokens, by the choice of the slow frames; accuracy in percent", ways,
              rows_of(parts, picks, families, "slow frames: periodic")),
        Table(f"Trained on clips, each arm with its own tokens, {TOKENS} a clip; accuracy in percent", last,
              rows_of(after, {arm: () for arm in TRAINED}, watched, base)),
    ]  # fmt: skip


def _hit(found: Sequence[Mapping[str, Any]], name: str) -> str:
    values = [value for one in found for rows in one["hits"][name].values() for value in rows]
    return f"{100 * np.mean(values):.0f}"


def claims(parts: Sequence[Rows], after: Sequence[Rows]) -> list[Claim]:
    """The questions of the study, each as a paired difference."""
    free_pairs = [
        ("slow + fast", "slow only"), ("slow + fast", "fast only"), ("slow + fast", "slow + fast, pixels"),
        ("slow + fast, slow block first", "slow + fast"), ("slow + fast", "1 token a fast frame"),
        ("1 token a fast frame", "slow frames, no fast"),
        ("slow frames: adaptive", "slow frames: periodic"), ("slow frames: question", "slow frames: periodic"),
    ]  # fmt: skip
    wanted = [(FREE, parts, one, other, list(READ)) for one, other in free_pairs]
    wanted += [("trained", after, "slow + fast", other, list(WATCHED)) for other in TRAINED[1:]]
    made = []
    for kind, rows, one, other, families in wanted:
        figure, low = against(rows, one, other, families)
        made.append(Claim(f"{kind}: {one} − {other}, points", "above 0 (95 %)", figure, met=low > 0))
    return made


def main() -> None:
    parser = arguments(__doc__, EXAMPLES, results="systems")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, metavar="SEED", help="default: 0 1 2")
    args = parser.parse_args()
    began, scratch, seeds = time.monotonic(), SCRATCH, list(args.seeds)
    each, steps, clip_steps, batch = EACH, STEPS, CLIP_STEPS, BATCH
    if args.quick:
        scratch, seeds, each, steps, clip_steps, batch = SCRATCH.with_name("aggregation_quick"), [0], 2, 2, 1, 256
        shutil.rmtree(scratch, ignore_errors=True)
    found, after, cpu = [], [], 0.0
    for seed in seeds:
        folder = scratch / str(seed)
        found.append(measured(folder / "free.json", lambda: free(seed, scratch, each, steps, batch)))  # noqa: B023
        rows: Rows = {}
        for name in TRAINED:
            path = folder / f"{name.replace(' ', '_').replace(',', '')}.json"
            part = measured(path, lambda: trained(name, seed, scratch, each, clip_steps, batch))  # noqa: B023
            rows |= part["rows"]
            cpu += part["cpu"]
        after.append(rows)
        cpu += found[-1]["cpu"]
    parts = [one["rows"] for one in found]
    notes = [
        f"{len(seeds)} seeds of weights, training and held-out questions; {each} held-out questions a family and seed. "
        "Intervals are by bootstrap over the questions of all seeds, paired by question; they do not contain the "
        f"variation of a fourth seed. Stills: {steps} steps of {batch} tokens; clips: {clip_steps} steps each. "
        f"Training took {cpu:.0f} processor seconds in all. Chance: read 10 %, find 17 %, order 50 %, motion 25 %.",
        f"A clip has {CELLS} frames (two a second); slow frames have 4 x 4 tokens, fast ones 2 x 2, pooled from 4 x 4. "
        f"The arm 'slow only' has {TOKENS // 16} frames, 'fast only' has {2 * CELLS} (four a second). Equal are the "
        "visual tokens; timestamps and marks of frames are not counted.",
    ]
    save(out_of(args), "aggregation", claims(parts, after), tables(found, after), seconds=time.monotonic() - began,
         quick=args.quick, seeds={"seeds": " ".join(map(str, seeds))}, notes=notes)  # fmt: skip


if __name__ == "__main__":
    sys.exit(run(main))
