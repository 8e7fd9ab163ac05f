"""How sharply the ideal observer of SlowFastBench sees, and what that changes in a comparison of policies.

Two tables on questions of the split dev: the accuracy of reading text by the height of its digits and by the noise of
the eye, and the accuracy under policies of equal tokens by the noise. The noise that the observer has was chosen by the
first. Results: docs/results/observer.md.

    python -m scripts.bench.observer            # 5 minutes on one quiet core
    python -m scripts.bench.observer --quick    # shows that it runs
"""

import math
import sys
import time
from collections.abc import Sequence

import numpy as np
import torch

from keye.errors import run
from keye.evaluation.study import Setting
from keye.evaluation.study.answerers import right
from keye.evaluation.study.bootstrap import interval
from keye.evaluation.study.clips import WITHIN, DrawnClip
from keye.files import write_atomically
from keye.slowfast.resizing import resize
from keye.world.scene import card
from keye.world.slowfastbench import FAMILIES, Item, draw, painter_of
from keye.world.slowfastbench.reader import NOISE, read
from scripts.bench.common.record import Claim, Table, arguments, document, out_of, save

HEAD = """# The ideal observer of SlowFastBench

Command: `python -m scripts.bench.observer`. What it is:
[docs/slowfastbench.md](../slowfastbench.md)."""
CARDS = (3, 4, 6, 8, 10, 12, 16, 24)
"""Heights of cards in pixels."""
NOISES = (8.0, 32.0, 64.0, 128.0, 256.0)
EYES = (8.0, 64.0, 256.0)
"""Noises of the second table."""
POLICIES = ("default", "released", "random", "uniform", "downsampled", "two_stream")
BUDGET, LENGTH, HEIGHT = 512, 60, 240
FAMILY_GROUPS = 3
"""Groups of questions of a family in the second table."""
LEFT_OUT = ("detail", "turn")
"""Families of the second table: those of clips of 240p, whose answer is a place or a word."""


def main() -> None:
    args = arguments(__doc__, results="observer").parse_args()
    began = time.monotonic()
    claims, legible = _legibility(4 if args.quick else 40)
    policies = _policies(1 if args.quick else FAMILY_GROUPS)
    out = out_of(args)
    notes = [
        "The eye knows exactly how everything looks, so that noise of 8 grey levels lets it read digits 2 pixels high."
        f" It is used with noise of {NOISE:g}, where digits become legible at about 5 pixels.",
        "Differences are paired, with 95 % intervals over groups of questions; `≠` marks tokens that differ from those"
        f" of the default by more than {100 * WITHIN:g} %.",
    ]
    seconds = time.monotonic() - began
    save(out, "observer", claims, [legible, policies], seconds=seconds, quick=args.quick, seeds={"questions": "dev"},
         notes=notes)  # fmt: skip
    write_atomically((out if args.quick or args.out else out.parent) / "observer.md", document(out, ["observer"], HEAD))


def _legibility(number: int) -> tuple[list[Claim], Table]:
    """Accuracy in the family read, on still clips of 8 seconds whose frames are resized."""
    answers: dict[tuple[int, float], list[bool]] = {}
    for index in range(0, 5 * number, 5):
        item = draw("read", "dev", index, 8, 360, "still")
        painter = painter_of(item.film)
        frames = painter.cell_frames()
        for tall in CARDS:
            height = 2 * round(180 * tall / painter.pixels)
            pictures = _resized(frames, (height, round(height * 16 / 9)))
            for noise in NOISES:
                answer = read(item, [cell / 2 for cell in range(len(frames))], pictures, noise)
                answers.setdefault((tall, noise), []).append(right(item, answer))
    rows = [[tall, f"{tall * digit_height():.1f}",
             *(f"{100 * np.mean(answers[tall, noise]):.0f}" for noise in NOISES)] for tall in CARDS]  # fmt: skip
    read_at = next((float(row[1]) for row in rows if float(row[2 + NOISES.index(NOISE)]) >= 95), math.inf)
    columns = ("card, pixels", "digits, pixels", *(f"noise {noise:g}" for noise in NOISES))
    title = f"Accuracy in per cent of reading a digit, {number} questions, chance 25"
    figure = f"{read_at:g} pixels at noise {NOISE:g}"
    claim = Claim("height of the smallest digits that are read at 95 %", "4 to 8 pixels", figure, met=4 <= read_at <= 8)
    return [claim], Table(title, columns, rows)


def digit_height() -> float:
    """The height of a digit as a share of the height of its card."""
    picture = card((100, 250), "1 2 3 4", (0, 0, 0), (255, 255, 255)).mean(2)
    return float((picture < 128).any(1).sum()) / len(picture)


def _resized(frames: Sequence[np.ndarray], size: tuple[int, int]) -> list[torch.Tensor]:
    different = {id(frame): frame for frame in frames}
    small = {key: resize(torch.from_numpy(frame).permute(2, 0, 1)[None], size, "bicubic")[0]
             for key, frame in different.items()}  # fmt: skip
    return [small[id(frame)] for frame in frames]


def _policies(groups: int) -> Table:
    """Accuracy under policies with the tokens of the default, by noise."""
    known = [name for name, row in FAMILIES.items() if not row.real and name not in LEFT_OUT]
    clips: dict[str, list[Item]] = {}
    for family in known:
        for index in range(groups * FAMILIES[family].members):
            still = index // FAMILIES[family].members % 2
            item = draw(family, "dev", index, LENGTH, HEIGHT, "still" if still else None)
            clips.setdefault(item.clip, []).append(item)
    marks: dict[tuple[str, float], list[bool]] = {}
    tokens: dict[str, list[int]] = {}
    names: list[str] = []
    for name, items in clips.items():
        clip = DrawnClip(name, items[0].film)
        target = clip.plan(Setting("default", BUDGET)).tokens
        names += [item.group for item in items]
        for policy in POLICIES:
            setting = Setting(policy, BUDGET)
            plan = clip.plan(setting) if setting.is_reference else clip.plan_of_tokens(setting, target)
            pictures = clip.pictures_of(plan)
            tokens.setdefault(policy, []).extend([plan.tokens] * len(items))
            for noise in EYES:
                given = [right(item, read(item, plan.timestamps.tolist(), pictures, noise)) for item in items]
                marks.setdefault((policy, noise), []).extend(given)
    rows = [[policy, _tokens(tokens[policy], tokens["default"]),
             *(_cell(marks[policy, noise], marks["default", noise], names, policy) for noise in EYES)]
            for policy in POLICIES]  # fmt: skip
    title = (f"Accuracy in per cent, and minus default in points, by the noise of the eye: {len(names)} questions on"
             f" clips of {LENGTH} s and {HEIGHT}p, budget {BUDGET}")  # fmt: skip
    return Table(title, ("policy", "tokens", *(f"noise {noise:g}" for noise in EYES)), rows)


def _tokens(own: Sequence[int], others: Sequence[int]) -> str:
    return f"{np.mean(own):.0f}" + (" ≠" if abs(np.mean(own) / np.mean(others) - 1) > WITHIN else "")


def _cell(own: Sequence[bool], others: Sequence[bool], names: Sequence[str], policy: str) -> str:
    mean = f"{100 * np.mean(own):.1f}"
    if policy == "default":
        return mean
    where = np.unique(names, return_inverse=True)[1]
    change = np.bincount(where, np.array(own, float) - np.array(others, float))
    difference, low, high = (100 * value for value in interval(change, np.bincount(where)))
    return f"{mean} [{difference:+.1f} ({low:+.1f} to {high:+.1f})]"


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(run(main))
