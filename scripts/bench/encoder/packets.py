"""Planning from packets: its time, its recall over seven encodes, and the time of plan and pixels if half is dropped.

Recall: as in `recall`, at an equal number of slow frames, of measure `packets` and of pixel measures on the same
encode. The encodes and clips of the report were not used for tuning the measure; those of `--split tuning` were.

Time: every measurement runs in its own process, contenders alternate, and ratios are medians over the rounds, of
processor time, which other programs of a shared machine change less, and of the clock. Half of the sampled frames is
dropped in four ways: every second one; the half that is most similar to the frame before, by the packets; the second
half of every run of frames between two cuts that the encoder found; every second of these runs. "needed" decodes the
packets that the frames of one way need, and does nothing else: no reader that decodes with FFmpeg can be faster.

    python -m scripts.bench.encoder.packets               # writes docs/results/encoder/packets.json
    python -m scripts.bench.encoder.packets --split tuning --skip-time
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import torch

from keye.errors import run
from keye.slowfast.measures import get_measure
from keye.video.clip import open_clip
from scripts.bench.common.intervals import DRAWS, paired_interval
from scripts.bench.common.process import in_process
from scripts.bench.common.record import QUICK_OUT, Claim, Table, arguments, out_of, save
from scripts.bench.encoder.media.changes import CONTINUITY, FILM, GROUPS, sources
from scripts.bench.encoder.media.continuity import SEED
from scripts.bench.encoder.media.corpus import FOLDER, locked, real_clips
from scripts.bench.encoder.media.encodes import RECIPES, encode
from scripts.bench.encoder.media.films import film, render
from scripts.bench.encoder.media.scenes import HELD_OUT_SEEDS, Scene, Span
from scripts.bench.encoder.packets_time import MEASURE, TIMED, measure_time, time_claims
from scripts.bench.encoder.recall import FPS, Scores, sample
from scripts.bench.encoder.recall_tally import Tally, evenly

ALONE = "packets alone"  # MEASURE without the fallback to pixels
PIXELS = ("change", "mse", "lab", "patch_l1")
SETTINGS = ("10%", "20%", "30%", "as changes")
GOAL = 5  # points of recall below the best pixel measure
SECONDS = 240.0  # of a film


def clips(split: str) -> Iterator[Scene]:
    """The clips of a split that have changes, but for the pages of text; of the two films the first `SECONDS`."""
    for name, make in sources(split).items():
        made = make()
        if made.events and {GROUPS[event.kind] for event in made.events} != {"pages"}:
            yield replace(made, end=min(made.end, SECONDS)) if name in (FILM, CONTINUITY) else made
    if split == "tuning":
        yield _bikes(real_clips())


def _bikes(paths: dict[str, Path]) -> Scene:
    """A film cut from a real clip of the tuning split."""
    path = FOLDER / "films" / "160s-240p-bikes.mp4"
    with locked(path.name):
        if not path.is_file():
            render(paths["bikes.mp4"], path, 160, False, (240, 426), coloured=False, longest=4.5)
    pieces = json.loads(path.with_suffix(".json").read_text())["pieces"]
    return Scene("film of bikes", path, [Span("cut", piece["time"], piece["time"]) for piece in pieces[1:]])


class PacketScores(Scores):
    """The scores of measure `packets` for a coded clip."""

    def __init__(self, path: Path):
        self.measure, self.rows = get_measure(MEASURE), defaultdict(list)
        with open_clip(path, FPS, 1 << 20, lazy=True) as clip:
            facts, frames = clip.packets()
        self.features, self.times = self.measure.read(facts, frames), facts.times[frames].tolist()
        self.falls_back = self.measure.lacks(facts) is not None


def judge(split: str, name: str, few: bool) -> dict:
    """Recall of every measure on one encode of all clips of a split.

    Where the packets say nothing, `packets` is the pixel measure that it falls back to, and `packets alone` is not.

    Returns:
        {setting: {measure: what `Tally.result` gives}}
    """
    tallies: dict[tuple[str, str], Tally] = defaultdict(Tally)
    for number, made in enumerate(clips(split)):
        if few and number % 16:
            continue
        path = encode(made.path, split, name, made.start, made.end - made.start)
        read = PacketScores(path)
        clip = sample(Scene(made.name, path))
        if clip.times != read.times:
            raise ValueError(f"{path} has other frames than its packets say")
        events = (replace(one, start=one.start - made.start, end=one.end - made.start) for one in made.events)
        clip.events = [event for event in events if event.end < clip.times[-1]]
        total = len(clip.times)
        targets = {share: max(2, round(int(share[:-1]) / 100 * total)) for share in SETTINGS[:-1]}
        targets["as changes"] = 1 + len(clip.events)
        for setting, target in targets.items():
            tallies[setting, "uniform"].add(clip, evenly(target, total))
        for measure in (ALONE, *PIXELS):
            scores = read if measure == ALONE else Scores(get_measure(measure), clip.frames)
            used = read.measure.pixels.name if read.falls_back else ALONE
            for setting, target in targets.items():
                slow = scores.spend(target)
                for row in (measure, *([MEASURE] if measure == used else [])):
                    tallies[setting, row].add(clip, slow)
    found: dict = {setting: {} for setting in SETTINGS}
    for (setting, measure), tally in tallies.items():
        found[setting][measure] = tally.result()
    return found


def interval(one: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the difference of two recalls in points, by bootstrap over the changes (paired)."""
    low, high = paired_interval(np.subtract(one, other, dtype=float))
    return 100 * low, 100 * high


def recall_claims(found: dict[str, dict]) -> tuple[list[Claim], list[Table]]:
    claims, rows = [], []
    for name, settings in found.items():
        for setting, measures in settings.items():
            recalls = {measure: result["changes"]["all"]["recall"] for measure, result in measures.items()}
            best = max(PIXELS, key=lambda measure: recalls[measure])
            points = 100 * (recalls[MEASURE] - recalls[best])
            low, high = interval(measures[MEASURE]["hits"], measures[best]["hits"])
            share = " / ".join(f"{measures[measure]['share']:.1%}" for measure in (MEASURE, best))
            shown = [f"{recalls[measure]:.0%}" for measure in (MEASURE, ALONE, *PIXELS, "uniform")]
            groups = [f"{_of(measures[MEASURE], kind)} / {_of(measures[best], kind)}" for kind in KINDS_SHOWN]
            rows.append((name, setting, share, *shown, f"{points:+.0f} ({low:+.0f} to {high:+.0f})", *groups))
            if setting in ("20%", "as changes"):
                slow = "20 % of the frames slow" if setting == "20%" else "as many slow frames as changes"
                figure = f"packets {recalls[MEASURE]:.0%}, {best} {recalls[best]:.0%}"
                claims.append(
                    Claim(
                        f"recall of changes from packets, {name}, {slow}",
                        f"at most {GOAL} points below the best pixel measure",
                        f"{figure}; {points:+.1f} points ({low:+.1f} to {high:+.1f})",
                        "",
                        points >= -GOAL,
                    )
                )
    columns = (
        "encode",
        "setting",
        "slow, packets / best",
        MEASURE,
        ALONE,
        *PIXELS,
        "uniform",
        "points to the best (95 %)",
    )
    return claims, [Table("Recall of changes", (*columns, *(f"{kind}, packets / best" for kind in KINDS_SHOWN)), rows)]


KINDS_SHOWN = ("cuts", "gradual", "text", "small")


def _of(result: dict, kind: str) -> str:
    return f"{result['changes'][kind]['recall']:.0%}" if kind in result["changes"] else "–"


def bench(args: argparse.Namespace) -> None:
    began, claims, tables = time.monotonic(), [], []
    kept = FOLDER / "packets" / args.split
    kept.mkdir(parents=True, exist_ok=True)
    if not args.skip_time:
        size = (180, 320) if args.quick else (720, 1280)
        films = {}
        for (length, names), bframes in product(TIMED.items(), (True, False)):
            path = film(12 if args.quick else length, bframes, size)
            known = kept / f"{path.stem}-time-{len(names)}.json"
            if args.quick or not (args.resume and known.is_file()):
                known.write_text(json.dumps(measure_time(path, 1 if args.quick else args.rounds, names)))
            about = f"{path.stem.split('-')[0]} {size[0]}p film {'with' if bframes else 'without'} B-frames"
            films[about] = {**films.get(about, {}), **json.loads(known.read_text())}
        timed = time_claims(films)
        claims, tables = claims + timed[0], tables + timed[1]
    found = {}
    for name in args.encodes[: 1 if args.quick else None]:
        known = kept / f"{name.replace(' ', '-')}.json"
        if args.quick or not (args.resume and known.is_file()):
            options = ["--judge", name, "--split", args.split, *(["--quick"] if args.quick else [])]
            known.write_text(json.dumps(in_process(__spec__.name, options, f"recall on {name}")))
        found[name] = json.loads(known.read_text())
        print(f"  {name}", flush=True)
    judged = recall_claims(found)
    claims, tables = claims + judged[0], tables + judged[1]
    tuning = args.split == "tuning"
    missing = [name for name in RECIPES[args.split] if name not in found]
    save(
        QUICK_OUT if tuning and args.out is None else out_of(args),
        "packets-tuning" if tuning else "packets",
        claims,
        tables,
        seconds=time.monotonic() - began,
        quick=args.quick,
        seeds={"films": 3, "drawn clips": ", ".join(map(str, HELD_OUT_SEEDS)), "reel": 7, "continuity": SEED},
        notes=[*NOTES, *([f"Not measured yet: {', '.join(missing)}."] if missing else [])],
    )


NOTES = [
    f"Encodes have at most 240 rows; of the two films the first {SECONDS:.0f} s are coded. VP9 is coded in two passes"
    " with alternate references. `av1` has the default pyramids of SVT-AV1, 16 frames long; there the measure falls"
    " back to `change` with a warning. `packets alone` shows what it would see without that.",
    "Tried while tuning, not by this command. AV1, 13 tuning clips with 40 changes, as many slow frames as"
    " changes: `change` sees 36 and evenly spaced frames 13. Packets alone see 19 in the default pyramids of SVT-"
    " AV1, also with its scene detection, which inserts no key frames; 32 with pyramids of 4 frames (hierarchical-"
    " levels=2), 29 with low delay, 18 with libaom of good quality and 28 in its realtime mode. The measure falls"
    " back for the defaults of both encoders, and with low delay for 6 of the 13 clips. H.264 at a bit rate:"
    " scaling the bytes by the quantiser of each picture (read from decoded frames), and subtracting or dividing"
    " by the local median deviation, changed the recall of the tuning clips by at most 3 points in either"
    " direction; neither is used.",
    "Packets needed: by the packets' headers, H.264 pictures before the last wanted one of their group that are a"
    " reference of any other, and the wanted ones. The conversion of the frames to RGB and their resizing come on top.",
    "The best pixel measure is selected on the reported clips themselves, for each encode and setting. Intervals:"
    f" paired bootstrap over the changes, {DRAWS:,} resamples.",
]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--split", choices=list(RECIPES), default="held-out", help="which clips and encodes")
    every = list(RECIPES["held-out"])
    parser.add_argument("--encodes", nargs="+", choices=every, default=every, help="only these encodes")
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds of the times (default 3)")
    parser.add_argument("--skip-time", action="store_true", help="recall only")
    parser.add_argument("--resume", action="store_true", help="take what an interrupted bench has measured")
    parser.add_argument("--judge", choices=list(RECIPES["tuning"]), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.judge:
        torch.set_num_threads(1)
        with torch.inference_mode():
            print(json.dumps(judge(args.split, args.judge, args.quick)))
    else:
        bench(args)


if __name__ == "__main__":
    run(main)
