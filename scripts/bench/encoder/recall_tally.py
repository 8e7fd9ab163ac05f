"""Which changes of a clip its slow frames see, and sums over clips."""

import bisect
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from scripts.bench.encoder.media.changes import FILMS, GROUPS, kind_of
from scripts.bench.encoder.media.scenes import Span

WITHIN = 0.75  # seconds after a change
BLOCK = 30.0  # seconds of a longer clip that are drawn as one unit for intervals
SEEDS = (0, 1, 2, 3, 4)  # of random slow frames
Results = dict[str, dict[str, dict[str, dict[str, Any]]]]
"""{"all", "films" or a kind of clip: {setting: {measure: what `Tally.result` gives}}}"""


@dataclass
class Judged:
    """A clip's ground truth and the slow frames of each measure at each setting.

    times: of the sampled frames, seconds. targets: setting → number of slow frames. slow: measure → setting → slow
    frames, ascending. apart: it is reported separately and not included in all clips.
    """

    name: str
    times: list[float]
    events: list[Span] = field(default_factory=list)
    nuisances: list[Span] = field(default_factory=list)
    apart: bool = False
    targets: dict[str, int] = field(default_factory=dict)
    slow: dict[str, dict[str, list[int]]] = field(default_factory=dict)


def seen(clip: Judged, slow: Sequence[int]) -> list[bool]:
    """For each change of the clip: is there a new slow frame at it or within 0.75 s after its end?"""
    times = [clip.times[i] for i in slow[1:]]
    found = []
    for event in clip.events:
        first = bisect.bisect_left(times, event.start - 1e-3)
        found.append(first < len(times) and times[first] <= event.end + WITHIN)
    return found


def nuisance_frames(clip: Judged) -> set[int]:
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


def randomly(count: int, total: int) -> list[list[int]]:
    """`count` of `total` frames, the first among them, the others drawn; for each of `SEEDS`."""
    picks = [random.Random(f"{seed} {count} {total}").sample(range(1, total), count - 1) for seed in SEEDS]
    return [[0, *sorted(pick)] for pick in picks]


class Tally:
    """Sums over clips for one measure at one setting."""

    def __init__(self) -> None:
        self.slow = self.frames = 0.0
        self.hits: list[float] = []  # of each change: how often it was seen, 0 to 1
        self.groups: list[str] = []
        self.units: list[str] = []
        self.wasted: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])  # unit → wasted frames, frames

    def add(self, clip: Judged, *draws: Sequence[int]) -> None:
        """Add a clip with its slow frames; of several draws the mean counts."""
        self.slow, self.frames = (
            self.slow + float(np.mean([len(slow) for slow in draws])),
            self.frames + len(clip.times),
        )
        self.hits += np.mean([seen(clip, slow) for slow in draws], 0).tolist()
        self.groups += [GROUPS[event.kind] for event in clip.events]
        self.units += [unit_of(clip, event.start) for event in clip.events]
        for i in sorted(nuisance_frames(clip)):
            of = self.wasted[unit_of(clip, clip.times[i])]
            of[0], of[1] = of[0] + float(np.mean([i in slow for slow in draws])), of[1] + 1

    def result(self) -> dict[str, Any]:
        """Shares, recall by group of changes, and what intervals need: the hits and wasted frames by unit."""
        wasted, nuisance = (sum(of[column] for of in self.wasted.values()) for column in (0, 1))
        hits = np.array(self.hits)
        recall = {}
        for group in (sorted({*self.groups, "all"})) if self.groups else ():
            of = hits[[group in ("all", other) for other in self.groups]]
            recall[group] = {"seen": float(of.sum()), "of": len(of), "recall": round(float(of.mean()), 3)}
        return {
            "slow": round(self.slow),
            "frames": round(self.frames),
            "share": round(self.slow / self.frames, 3),
            "wasted": round(wasted / nuisance, 3) if nuisance else None,
            "changes": recall,
            "hits": self.hits,
            "units": self.units,
            "wasted_by_unit": dict(self.wasted),
        }


def unit_of(clip: Judged, moment: float) -> str:
    """What is drawn as a whole for intervals: a clip, or half a minute of a longer one."""
    return clip.name if clip.times[-1] <= 2 * BLOCK else f"{clip.name} {moment // BLOCK:.0f}"


def results_of(clips: Sequence[Judged], reference: str) -> Results:
    """Sums over all clips that are not apart ("all"), the films ("films"), and each kind of clip.

    reference: the measure whose number of slow frames `uniform` and `random` have where a setting has no target.
    """
    tallies: dict[tuple[str, str, str], Tally] = defaultdict(Tally)
    for clip in clips:
        kind = kind_of(clip.name)
        groups = [*([] if clip.apart else ["all"]), *(["films"] if kind in FILMS else []), kind]
        own = clip.slow.get(reference, {})
        targets = clip.targets | {name: len(slow) for name, slow in own.items() if name not in clip.targets}
        for setting, target in targets.items():
            rows = {"uniform": [evenly(target, len(clip.times))], "random": randomly(target, len(clip.times))}
            rows |= {name: [slow[setting]] for name, slow in clip.slow.items() if setting in slow}
            for group in groups:
                for name, draws in rows.items():
                    tallies[group, setting, name].add(clip, *draws)
    results: Results = {}
    for (group, setting, name), tally in tallies.items():
        results.setdefault(group, {}).setdefault(setting, {})[name] = tally.result()
    return results
