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
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from keye.errors import KeyeError, run
from keye.files import write_atomically
from scripts.bench.common.intervals import paired_interval
from scripts.bench.common.record import ROOT, Claim, Table, arguments, out_of, save
from scripts.bench.systems.aggregation_reader import (
    CELLS,
    READ,
    SLOW,
    TOKENS,
    WATCHED,
    Drawn,
    answers,
    changed_frames,
    clip_part,
    clips,
    confident_frames,
    heldout,
    new_model,
    still_part,
    stills,
    train,
    with_slow,
)

EXAMPLES = """examples:
  python -m scripts.bench.systems.aggregation                 three seeds; finished arms are read, not repeated
  python -m scripts.bench.systems.aggregation --seeds 0       one seed
  python -m scripts.bench.systems.aggregation --only stills free      some of it; a later call continues
  python -m scripts.bench.systems.aggregation --page          only the results, from the arms that are finished
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
KINDS = {"stills": "training on stills", "free": "arms without training", "trained": "trained arms"}
RATE = 2e-3
PLAIN = str.maketrans({" ": "_", ",": None, "+": "and", ":": None})

Rows = dict[str, dict[str, list[int]]]
"""Arm → family → 1 for each question that is answered correctly, else 0."""
STILLS = {"still of the answer, image": False, "still of the answer, video of one frame": True}
PICKS = {f"slow frames: {name}": name for name in CHOSEN}


FREE_TOKENS = {
    **dict.fromkeys(STILLS, 16), **dict.fromkeys(TRAINED, TOKENS), "slow + fast, maximum": TOKENS,
    "slow + fast, slow block first": TOKENS, "slow frames, no fast": 16 * SLOW,
    "1 token a fast frame": 16 * SLOW + CELLS, "16 tokens a fast frame": 16 * (SLOW + CELLS),
}  # fmt: skip
"""Arm without training → visual tokens of its still or clip."""
FREE_ARMS = (*FREE_TOKENS, *PICKS)


@dataclass(frozen=True)
class Work:
    """One seed of the study: sizes, and the folder of its results. each: held-out questions of a family."""

    seed: int
    folder: Path
    each: int = 60
    steps: int = 120
    clip_steps: int = 110
    batch: int = 2048

    def say(self, text: str) -> None:
        """Print a line of progress."""
        print(f"seed {self.seed}, {text}", flush=True)


def by_family(rows: Sequence[int], families: Sequence[str], each: int) -> dict[str, list[int]]:
    """Rows in the order of `heldout`, by family."""
    return {family: list(rows[i * each : (i + 1) * each]) for i, family in enumerate(families)}


def learn_stills(work: Work) -> dict[str, Any]:
    """Train the reader of stills and write `stills.pt`."""
    model = new_model(work.seed)
    cpu = train(model, stills(work.seed, work.batch), work.steps, RATE, lambda text: work.say(f"stills: {text}"))
    torch.save(model.state_dict(), work.folder / "stills.pt")
    return {"cpu": cpu}


def reader(work: Work) -> Any:
    """A copy of the reader of stills."""
    model = new_model(work.seed)
    model.load_state_dict(torch.load(work.folder / "stills.pt", weights_only=True))
    return model


def free(arm: str, work: Work) -> dict[str, Any]:
    """Let the reader of stills read held-out clips, or stills of them, in one way and without training."""
    model, questions = reader(work), heldout(work.seed, list(READ), work.each)
    part, encoder, more = clip_part, arm, {}
    if arm in STILLS:
        encoder, part = "slow only", lambda one: still_part(one, one.cells[0], STILLS[arm])
    elif arm in PICKS:
        chosen = _picked(PICKS[arm], model, questions)
        places = {one.name: slow for one, slow in zip(questions, chosen, strict=True)}
        encoder, part = "slow + fast", lambda one: with_slow(one, places[one.name])
        more = {"hits": [int(bool({*one.cells} & {*places[one.name]})) for one in questions]}
    found = by_family(answers(model, questions, encoder, part), list(READ), work.each)
    return {"rows": {arm: found}, **more}


def _picked(name: str, model: Any, questions: Sequence[Drawn]) -> list[list[int]]:
    """The slow frames of each question."""
    if name == "question":
        return confident_frames(model, questions)
    if name == "periodic":
        return [list(range(0, CELLS, CELLS // SLOW))] * len(questions)
    return [changed_frames(one) if name == "adaptive" else _evidence(one.cells) for one in questions]


def _evidence(cells: Sequence[int]) -> list[int]:
    """Three frames, as many as there are of those that show the answer."""
    rest = [cell for cell in range(0, CELLS, CELLS // SLOW) if cell not in cells]
    return sorted([*cells[:SLOW], *rest][:SLOW])


def trained(arm: str, work: Work) -> dict[str, Any]:
    """Train a copy of the reader of stills on clips under one encoder, and let it read held-out clips."""
    model, families = reader(work), list(WATCHED)
    cpu = train(model, clips(arm, work.seed, work.batch), work.clip_steps, RATE, lambda t: work.say(f"{arm}: {t}"))
    rows = answers(model, heldout(work.seed, families, work.each), arm)
    return {"rows": {arm: by_family(rows, families, work.each)}, "cpu": cpu}


def means(rows: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Accuracy of each family in percent."""
    return {family: round(100 * float(np.mean(values))) for family, values in rows.items()}


def measured(path: Path, make: Callable[[], dict[str, Any]] | None) -> dict[str, Any] | None:
    """The results of `path`, measured if it is not there; None if it is not and there is no `make`."""
    if not path.exists():
        if make is None:
            return None
        path.parent.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        found = make()
        write_atomically(path, json.dumps({**found, "seconds": time.monotonic() - began}) + "\n")
        shown = [f"{name}: {means(rows)}" for name, rows in found.get("rows", {}).items()]
        print(f"{path.parent.name}/{path.stem}", *shown, flush=True)
    return json.loads(path.read_text(encoding="utf-8"))


def all_of(work: Work, only: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What is measured of a seed: "stills", and each arm under "free" and "trained".

    Args:
        only: the beginnings of the names that are measured now, if they are not yet; "" is the beginning of all.
    """
    units = {"stills": lambda: learn_stills(work)}
    units |= {f"free {arm}": partial(free, arm, work) for arm in FREE_ARMS}
    units |= {f"trained {arm}": partial(trained, arm, work) for arm in TRAINED}
    found = {}
    for name, make in units.items():
        path = work.folder / f"{name.translate(PLAIN)}.json"
        wanted = any(name.startswith(start) for start in only)
        if (result := measured(path, make if wanted else None)) is not None:
            found[name] = result
    return found


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


def complete(found: Sequence[Mapping[str, Any]], kind: str, arms: Sequence[str]) -> list[Rows]:
    """The rows of each seed that has all of the arms."""
    names = [f"{kind} {arm}" for arm in arms]
    parts = [[one[name]["rows"] for name in names] for one in found if all(name in one for name in names)]
    return [{arm: rows for part in seed for arm, rows in part.items()} for seed in parts]


def tables(found: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Accuracy of every arm, training-free and trained, and of every way to choose slow frames."""
    families, watched, base, pick = list(READ), list(WATCHED), "slow + fast", "slow frames: periodic"
    facts: dict[str, Sequence[Any]] = {arm: (tokens,) for arm, tokens in FREE_TOKENS.items()}
    chosen = {arm: (CHOSEN[name], _hit(found, arm)) for arm, name in PICKS.items()}
    columns = ("arm", "visual tokens", *families, "mean by seed", f"difference to {base} (95 %)")
    ways = ("arm", "chosen", "clips with the answer in a slow frame, %", *families, "mean by seed",
            "difference to periodic (95 %)")  # fmt: skip
    last = ("arm", *watched, "mean by seed", f"difference to {base} (95 %)")
    wanted = (
        ("A reader of stills reads clips, no training on clips; accuracy in percent", columns, "free", facts, base),
        (f"The same, {TOKENS} tokens, by the choice of the slow frames; accuracy in percent", ways, "free", chosen,
         pick),
        (f"Trained on clips, each arm with its own tokens, {TOKENS} a clip; accuracy in percent", last, "trained",
         dict.fromkeys(TRAINED, ()), base),
    )  # fmt: skip
    made = []
    for title, head, kind, arms, against_arm in wanted:
        arms = {arm: facts for arm, facts in arms.items() if any(f"{kind} {arm}" in one for one in found)}
        if against_arm in arms and (parts := complete(found, kind, list(arms))):
            seeds = f"{len(parts)} seed{'s' * (len(parts) > 1)}"
            rows = rows_of(parts, arms, families if kind == "free" else watched, against_arm)
            made.append(Table(f"{title}, {seeds}", head, rows))
    return made


def _hit(found: Sequence[Mapping[str, Any]], arm: str) -> str:
    values = [value for one in found for value in one.get(f"free {arm}", {}).get("hits", [])]
    return f"{100 * np.mean(values):.0f}" if values else "–"


def claims(found: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """The questions of the study, each as a paired difference over the seeds that have both arms."""
    free_pairs = [
        ("slow + fast", "slow only"), ("slow + fast", "fast only"), ("slow + fast", "slow + fast, pixels"),
        ("slow + fast, slow block first", "slow + fast"), ("slow + fast", "1 token a fast frame"),
        ("1 token a fast frame", "slow frames, no fast"),
        ("slow frames: adaptive", "slow frames: periodic"), ("slow frames: question", "slow frames: periodic"),
    ]  # fmt: skip
    wanted = [("free", one, other, list(READ)) for one, other in free_pairs]
    wanted += [("trained", "slow + fast", other, list(WATCHED)) for other in TRAINED[1:]]
    made = []
    for kind, one, other, families in wanted:
        if rows := complete(found, kind, (one, other)):
            figure, low = against(rows, one, other, families)
            title = f"{FREE if kind == 'free' else kind}: {one} − {other}, points"
            made.append(
                Claim(title, "above 0 (95 %)", f"{figure}, {len(rows)} seed{'s' * (len(rows) > 1)}", met=low > 0)
            )
    return made


def main() -> None:
    parser = arguments(__doc__, EXAMPLES, results="systems")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, metavar="SEED", help="default: 0 1 2")
    parser.add_argument("--page", action="store_true", help="measure nothing: the results of what is finished")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[""],
        metavar="NAME",
        help="measure these now: stills, 'free slow + fast', trained …",
    )
    args = parser.parse_args()
    sizes, seeds, scratch = {}, list(args.seeds), SCRATCH
    if args.quick:
        scratch, seeds = SCRATCH.with_name("aggregation_quick"), [0]
        sizes = {"each": 2, "steps": 2, "clip_steps": 1, "batch": 256}
        shutil.rmtree(scratch, ignore_errors=True)
    works = [Work(seed, scratch / str(seed), **sizes) for seed in seeds]
    found = [all_of(work, [] if args.page else args.only) for work in works]
    one, units = works[0], [result for part in found for result in part.values()]
    if not units:
        raise KeyeError(f"nothing is measured in {scratch}; run the same command without --page")
    names = ["stills", *(f"free {arm}" for arm in FREE_ARMS), *(f"trained {arm}" for arm in TRAINED)]
    missing = []
    for work, part in zip(works, found, strict=True):
        counts = {kind: sum(name.startswith(kind) and name not in part for name in names) for kind in KINDS}
        missing += [f"{KINDS[kind]} of seed {work.seed} ({count})" for kind, count in counts.items() if count]
    cpu = sum(unit.get("cpu", 0) for unit in units)
    notes = [
        f"Weights, training and held-out questions differ by seed; {one.each} held-out questions a family and seed. "
        "Intervals are by bootstrap over the questions of all seeds, paired by question; they do not contain the "
        f"variation of another seed. Stills: {one.steps} steps of {one.batch} tokens; clips: {one.clip_steps} steps "
        f"each. Training took at most {cpu:.0f} processor seconds in all. Chance: "
        "read 10 %, find 17 %, order 50 %, motion 25 %.",
        f"A clip has {CELLS} frames (two a second); slow frames have 4 x 4 tokens, fast ones 2 x 2, pooled from 4 x 4. "
        f"The arm 'slow only' has {TOKENS // 16} frames, 'fast only' has {2 * CELLS} (four a second). Equal are the "
        "visual tokens; timestamps and marks of frames are not counted.",
        "Clips of read and find change only where their answer appears and disappears, or move slowly, so that a "
        "measure of change finds the answer. Its gain is not that of clips with other changes.",
    ]
    if missing:
        notes.append(f"Not measured yet; the command without --page continues: {', '.join(missing)}.")
    seconds = sum(unit["seconds"] for unit in units)
    shown = " ".join(str(work.seed) for work, part in zip(works, found, strict=True) if part)
    save(out_of(args), "aggregation", claims(found), tables(found), seconds=seconds, quick=args.quick,
         seeds={"seeds": shown}, notes=notes)  # fmt: skip


if __name__ == "__main__":
    sys.exit(run(main))
