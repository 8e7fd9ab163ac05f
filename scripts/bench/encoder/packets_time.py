"""The time of planning from packets, and of plan and pixels if half of the frames is dropped; see `packets`."""

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from keye.errors import run
from keye.slowfast.policies import FAST, SLOW, Decisions, Limits, Policy
from keye.slowfast.policies.base import ClipFeatures
from keye.video.decoding.containers import open_container
from keye.video.decoding.packet_index import read_index
from scripts.bench.common.process import in_process
from scripts.bench.common.record import Claim, Table

MEASURE = "packets"
DROPS = ("even", "similar", "tails", "runs")
NEEDED = "needed"
CUT = 0.1  # similarity below which a run of frames ends: key frames where none was due


@dataclass(frozen=True)
class Half(Policy):
    """Shows half of the sampled frames; slow and fast by the rule of `adaptive`. way: one of `DROPS`."""

    name = "half"
    online = False

    threshold: float
    way: str = DROPS[0]

    def decide(self, clip: ClipFeatures, limits: Limits) -> Decisions:
        count = len(clip)
        nearby = [1.0, *(clip.score(index - 1, index) for index in range(1, count))]
        new = {0, *(index for index in range(1, count) if nearby[index] < self.threshold)}
        if self.way == "even":
            shown = list(range(0, count, 2))
        elif self.way == "similar":
            shown = sorted([0, *sorted(range(1, count), key=lambda index: nearby[index])[: count // 2 - 1]])
        else:
            starts = [0, *(index for index in range(1, count) if nearby[index] < CUT), count]
            runs = list(zip(starts, starts[1:], strict=False))
            if self.way == "runs":
                shown = [index for start, stop in runs[::2] for index in range(start, stop)]
            else:
                shown = [index for start, stop in runs for index in range(start, start + max(1, (stop - start) // 2))]
        types = [SLOW if index in new else FAST for index in shown]
        return Decisions(types, [float("nan"), *(nearby[index] for index in shown[1:])], shown)


def contender(name: str, path: Path) -> Callable[[], dict]:
    """The timed function of a worker process; imports are not timed."""
    if name == "bare":
        import av

        def bare() -> dict:
            with av.open(str(path)) as container:
                container.streams.video[0].thread_type = "SLICE"  # the fastest one of `plan`
                return {"frames": sum(1 for _ in container.decode(video=0))}

        return bare
    from keye import SlowFastEncoder

    if name == "plan":
        encoder = SlowFastEncoder(measure=MEASURE)
        return lambda: {"frames": len(encoder.plan(path))}
    way = name.removeprefix(f"{NEEDED} ")
    encoder = SlowFastEncoder(measure=MEASURE, policy=Half(0.4, way), slow_multiple=0.0)
    if name == way:
        return lambda: {"frames": len(encoder(path, dtype=torch.uint8).plan)}
    needed = needed_packets(path, encoder.plan(path).timestamps.tolist())
    return lambda: {"frames": decode_packets(path, needed), "needed": float(needed.mean())}


def needed_packets(path: Path, times: Sequence[float]) -> np.ndarray:
    """bool [packets]: those that the frames displayed at ascending times (seconds) need, by the packets' headers."""
    with open_container(path, path.name) as container:
        stream = container.streams.video[0]
        index = read_index(container, stream, float(stream.average_rate))
    return index.plan(index.showing(times)).decode


def decode_packets(path: Path, needed: np.ndarray) -> int:
    """Decode some packets of a file and nothing else; returns the number of frames."""
    import av

    frames = 0
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "SLICE"
        for packet, used in zip(container.demux(stream), [*needed, True], strict=True):  # the last one is empty
            frames += len(packet.decode()) if used else 0
    return frames


def measure_time(path: Path, rounds: int, names: Sequence[str]) -> dict[str, list[dict]]:
    """{contender: [{"seconds", "cpu"} of each round]}. The file is read before, so that it is in memory."""
    path.read_bytes()
    found: dict[str, list[dict]] = defaultdict(list)
    for turn in range(rounds):
        for name in names if turn % 2 == 0 else names[::-1]:
            one = in_process(__spec__.name, ["--worker", name, "--film", str(path)], f"{name} on {path.name}")
            print(f"  {path.name:24} {name:8} {one['seconds']:7.2f} s, CPU {one['cpu']:.2f} s", flush=True)
            found[name].append(one)
    return found


def time_claims(films: dict[str, dict[str, list[dict]]]) -> tuple[list[Claim], list[Table]]:
    claims, rows = [], []
    for about, found in films.items():
        for name, rounds in found.items():
            bound = found.get(f"{NEEDED} {name}")
            needed = f"{bound[0]['needed']:.0%}" if bound else "–"
            over = f"{_ratio(rounds, bound, 'cpu'):.2f}" if bound else "–"
            ratios = {clock: _ratio(rounds, found["bare"], clock) for clock in ("seconds", "cpu")}
            medians = [f"{statistics.median(one[clock] for one in rounds):.2f}" for clock in ratios]
            shown = [f"{ratio:.3f}" for ratio in ratios.values()]
            rows.append((about, NAMES[name], len(rounds), *medians, *shown, needed, over))
            if name == "bare" or name.startswith(NEEDED):
                continue
            most, goal = (0.1, "≤ 10 % of bare decoding") if name == "plan" else (0.5, "≤ 0.5 × bare decoding")
            bare = statistics.median(one["cpu"] for one in found["bare"])
            figure = f"{medians[1]} s of processor time against {bare:.2f} s; by the clock {ratios['seconds']:.3f} ×"
            if bound:
                least = f"{_ratio(bound, found['bare'], 'cpu'):.3f} ×"
                figure += f"; decoding the {needed} of the packets that these frames need takes {least}"
            claims.append(
                Claim(f"{NAMES[name]}, {about}", goal, figure, f"{ratios['cpu']:.3f} ×", ratios["cpu"] <= most)
            )
    columns = ("film", "what", "rounds", "median s", "median CPU s", "s over bare decoding", "CPU s over bare decoding")
    columns += ("packets needed", "CPU s over decoding these")
    return claims, [Table("Time of planning from packets", columns, rows)]


def _ratio(one: Sequence[dict], bare: Sequence[dict], clock: str) -> float:
    """The median over the rounds of the time of one over that of bare decoding in the same round."""
    return statistics.median(a[clock] / b[clock] for a, b in zip(one, bare, strict=False))


NAMES = {
    "bare": "bare decoding, PyAV, threads SLICE",
    "plan": "plan from packets",
    "even": "plan and pixels, every second frame dropped",
    "similar": "plan and pixels, the more similar half dropped",
    "tails": "plan and pixels, the second half of each shot dropped",
    "runs": "plan and pixels, every second shot dropped",
    "needed tails": "decoding what the first halves of the shots need",
    "needed runs": "decoding what every second shot needs",
}
TIMED = {600: ("bare", "plan"), 120: ("bare", "tails", "needed tails", "runs", "needed runs", "even", "similar")}
"""Seconds of a film → contenders."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker", required=True, choices=tuple(NAMES))
    parser.add_argument("--film", required=True, type=Path)
    args = parser.parse_args()
    action = contender(args.worker, args.film)
    began, cpu = time.perf_counter(), time.process_time()
    figures = action()
    print(json.dumps({"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu, **figures}))


if __name__ == "__main__":
    run(main)
