"""What a binding budget is spent on, and what is seen with it, by policy.

Films are read once at 2 fps; an hour is the ten-minute film six times over (packets copied), whose frames are not
decoded again. At each budget every contender plans the same clip. A cut is seen if a new slow frame is shown within
0.75 s after it. Since `all_slow` makes every frame slow, "tokens at a cut" is given as well: the tokens of the largest
frame that is shown within that time, 0 if none is, as a mean over the cuts.

    python -m scripts.bench.encoder.allocation                  # all films, writes docs/results/encoder/allocation.json
    python -m scripts.bench.encoder.allocation --clips film     # one of film, hour, natural, continuity, into .cache
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from keye.encoder import SlowFastEncoder
from keye.errors import run
from keye.slowfast.plan import VideoPlan
from keye.slowfast.policies import SLOW
from keye.video.clip import open_clip
from scripts.bench.common.intervals import paired_interval
from scripts.bench.common.record import QUICK_OUT, Claim, Table, arguments, out_of, save
from scripts.bench.encoder.media.changes import TRAILER
from scripts.bench.encoder.media.continuity import continuity_film, cuts
from scripts.bench.encoder.media.films import film, film_cuts, film_times
from scripts.bench.encoder.recall import FPS
from scripts.bench.encoder.recall_tally import WITHIN

HOURS = 6  # ten-minute films in an hour
BUDGETS = (8_192, 16_384, 65_536)
DEFAULT = 65_536  # the only budget of the hour, whose plans take minutes
SEEDS = (0, 1, 2)
MULTIPLE = 4


@dataclass(frozen=True)
class Film:
    """A film's frames uint8 [3, H, W] at 2 fps, their times and the times of its cuts in seconds."""

    name: str
    frames: list[torch.Tensor]
    times: list[float]
    cuts: list[float]

    def repeated(self, name: str, count: int, seconds: float) -> "Film":
        """The film `count` times over; every beginning but the first is a cut, too."""
        starts = [seconds * turn for turn in range(count)]
        times = [start + moment for start in starts for moment in self.times]
        return Film(
            name,
            self.frames * count,
            times,
            sorted([*(start + cut for start in starts for cut in self.cuts), *starts[1:]]),
        )


@dataclass(frozen=True)
class Found:
    """One contender's plan: which cuts are seen, and the tokens at each, float64 [cuts]."""

    plan: VideoPlan
    seen: np.ndarray
    tokens: np.ndarray
    seconds: float


def contenders(budget: int) -> dict[str, list[SlowFastEncoder]]:
    """Encoders by name; several are averaged."""
    limit = {"max_tokens": budget}
    return {
        "default": [SlowFastEncoder(**limit)],
        "default without the rule": [SlowFastEncoder(**limit, slow_multiple=0)],
        "released": [SlowFastEncoder.released(**limit)],
        "ladder": [SlowFastEncoder(**limit, policy="ladder")],
        "uniform": [SlowFastEncoder(**limit, policy="uniform:4")],
        "random": [SlowFastEncoder(**limit, policy=f"random:seed={seed}") for seed in SEEDS],
        "two_stream": [SlowFastEncoder(**limit, policy="two_stream")],
        "downsampled": [SlowFastEncoder(**limit, policy="all_slow")],
    }


def films(quick: bool) -> dict[str, Callable[[], Film]]:
    """The films by name, each read when called for."""
    seconds, size = (12, (180, 320)) if quick else (600, (720, 1280))

    def plain(name: str, path: Path) -> Film:
        inner = film_times(path, [span.start for span in TRAILER if span.kind == "cut"])
        return read(name, path, sorted([*film_cuts(path), *inner]))

    def first() -> Film:
        return plain("film", film(seconds, False, size))

    return {
        "film": first,
        "hour": lambda: first().repeated("hour", HOURS, seconds),
        "natural": lambda: plain("natural", film(seconds, False, (360, 640), coloured=False)),
        "continuity": lambda: read("continuity", continuity_film(), [moment for moment, _ in cuts(continuity_film())]),
    }


def read(name: str, path: Path, moments: list[float]) -> Film:
    """The frames of a file at 2 fps."""
    with open_clip(path, FPS, 1 << 20) as clip:
        kept = [(frame.time, frame.pixels) for frame in clip]
    return Film(name, [pixels for _, pixels in kept], [moment for moment, _ in kept], moments)


def measure(clip: Film, encoder: SlowFastEncoder) -> Found:
    """Plan the clip and look what is shown after each cut."""
    began = time.thread_time()
    plan = encoder.plan(clip.frames, timestamps=clip.times)
    seconds = time.thread_time() - began
    times, tokens = plan.timestamps.double().numpy(), plan.tokens_per_frame.numpy()
    slow = plan.frame_types.numpy() == SLOW
    seen, most = [], []
    for cut in clip.cuts:
        after = (times >= cut - 1e-3) & (times <= cut + WITHIN)
        seen.append(bool((after & slow)[1:].any()))
        most.append(float(tokens[after].max(initial=0)))
    return Found(plan, np.array(seen, float), np.array(most), seconds)


def rows_of(name: str, turns: Sequence[Found]) -> tuple[str | int, ...]:
    """A row of the table; figures of several seeds are means, those of the plan the first seed's."""
    plan = turns[0].plan
    counts, cells = plan.counts, []
    for kind, count in enumerate(counts):
        cells.append(f"{count} × {plan.tokens_each(kind).removesuffix(' tokens each').removesuffix(' tokens')}")
    if not counts[1]:
        cells[1] = "0"
    seen, tokens = (float(np.mean([getattr(turn, key) for turn in turns])) for key in ("seen", "tokens"))
    return (
        name,
        len(plan.frame_indices.unique()),
        *cells,
        f"{plan.tokens:,}",
        f"{100 * seen:.1f} %",
        f"{tokens:.0f}",
        f"{np.mean([turn.seconds for turn in turns]):.0f}",
    )


COLUMNS = (
    "policy",
    "frames shown",
    "slow × tokens",
    "fast × tokens",
    "tokens",
    "cuts seen",
    "tokens at a cut",
    "CPU s",
)


def multiple_of(plan: VideoPlan) -> float:
    """The tokens of the smallest slow frame over those of the largest fast one; infinite without fast frames."""
    slow, fast = (plan.tokens_per_frame[plan.frame_types == kind] for kind in (0, 1))
    return float(slow.min()) / float(fast.max()) if len(fast) else float("inf")


def claims_of(clip: Film, budget: int, found: dict[str, list[Found]]) -> list[Claim]:
    """The claims about one film at one budget."""
    where = f"{clip.name}, {budget:,} tokens"
    over = [name for name, turns in found.items() if any(turn.plan.tokens > budget for turn in turns)]
    ours = {name: turns for name, turns in found.items() if name not in ("released", "default without the rule")}
    least = {name: min(multiple_of(turn.plan) for turn in turns) for name, turns in ours.items()}
    claims = [
        Claim(f"budget exceeded: {where}", "0 policies", ", ".join(over) or "0", "", not over),
        Claim(
            f"least slow frame over largest fast frame, every policy with the rule: {where}",
            f"≥ {MULTIPLE}",
            ", ".join(f"{name} {value:.1f}" for name, value in least.items() if value < float("inf")),
            "",
            min(least.values()) >= MULTIPLE,
        ),
    ]
    mean = {name: np.mean([turn.seen for turn in turns], 0) for name, turns in found.items()}
    for name in ("default", "ladder"):
        low, high = paired_interval(mean[name] - mean["released"])
        claims.append(
            Claim(
                f"cuts seen, {name} against released: {where}",
                "no fewer",
                f"{100 * mean[name].mean():.1f} % against {100 * mean['released'].mean():.1f} %",
                f"difference {100 * low:+.1f} to {100 * high:+.1f} points",
                bool(mean[name].mean() >= mean["released"].mean()),
            )
        )
    return claims


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--clips", nargs="+", choices=("film", "hour", "natural", "continuity"), help="only these")
    args = parser.parse_args()
    began = time.monotonic()
    known = films(args.quick)
    names = args.clips or (["film", "hour"] if args.quick else list(known))
    claims: list[Claim] = []
    tables: list[Table] = []
    given_up: list[tuple[str, ...]] = []
    for name in names:
        clip = known[name]()
        budgets = (DEFAULT,) if name == "hour" else BUDGETS
        for budget in (800,) if args.quick else budgets:
            found: dict[str, list[Found]] = {}
            for policy, encoders in contenders(budget).items():
                found[policy] = [measure(clip, encoder) for encoder in encoders]
                print(*rows_of(policy, found[policy]), sep="  ", flush=True)
                given_up += [(name, f"{budget:,}", policy, text) for text in found[policy][0].plan.warnings]
            claims += claims_of(clip, budget, found)
            title = f"{name}: {len(clip.frames):,} frames at 2 fps, {len(clip.cuts):,} cuts, budget {budget:,}"
            tables.append(Table(title, COLUMNS, [rows_of(policy, turns) for policy, turns in found.items()]))
    tables.append(Table("What the plans say was given up", ("film", "budget", "policy", "warning"), given_up))
    out = QUICK_OUT if args.clips and args.out is None else out_of(args)
    notes = [
        "`default without the rule` is the default with slow_multiple=0, as before the rule existed. `random` is the"
        f" mean of {len(SEEDS)} seeds. `downsampled` is all_slow: every frame has the same size.",
        "A default plan compares up to 16,384 frames of a clip, not only those that fit, which is what sees the cuts of"
        " the hour: at 65,536 tokens the release samples one frame in 2.6 s.",
    ]
    seeds = {"films": 3, "random": ", ".join(map(str, SEEDS)), "bootstrap": 0}
    seconds = time.monotonic() - began
    save(out, "allocation", claims, tables, seconds=seconds, quick=args.quick, seeds=seeds, notes=notes)


if __name__ == "__main__":
    with torch.inference_mode():
        run(main)
