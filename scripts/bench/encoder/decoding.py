"""Do skipping and seeking return the frames of sequential decoding, and how fast are they?

Exactness: every clip is decoded completely with PyAV and then sampled at random rates and ranges, with and without
seeking; index, time and pixels of every sampled frame are compared. Speed: bare decoding (PyAV, no conversion,
threading AUTO, FRAME, SLICE or none), sampled frames in RGB, and a complete plan, in alternation.
"""

import hashlib
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import av
import numpy as np

from keye import SlowFastEncoder
from keye.errors import run
from keye.video.decoding import decoder as decode
from keye.video.decoding.containers import open_container
from keye.video.decoding.decoder import Decoder
from scripts.bench.common.record import Claim, Table, arguments, out_of, save
from scripts.bench.encoder.media.corpus import real_clips
from scripts.bench.encoder.media.films import film

SEED = 7
RATES = (0.3, 1.0, 2.0, 3.7, 12.0, 100.0)
WHOLE = 2000  # frames of a clip that are compared
BARE = ("AUTO", "FRAME", "SLICE", "one thread")

Decoded = tuple[float, bytes]
"""(seconds on the container's clock, digest of the RGB pixels)"""


def decode_all(path: Path) -> tuple[list[Decoded], float]:
    """Every frame of a clip, one after the other; seconds at the end of the last."""
    found: list[Decoded] = []
    end = None
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        rate = float(stream.average_rate or stream.guessed_rate or 25)
        for frame in container.decode(stream):
            seconds = len(found) / rate if frame.pts is None else float(frame.pts * frame.time_base)
            found.append((seconds, _digest(frame.to_ndarray(format="gbrp"))))
            end = seconds + (float(frame.duration * frame.time_base) if frame.duration else 1 / rate)
            if len(found) == WHOLE:
                break
    return found, end


def _digest(pixels: np.ndarray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(pixels), digest_size=16).digest()


def expected(frames: Sequence[Decoded], moments: Sequence[float], end: float) -> list[int]:
    """The frame on the screen at each moment, by looking at every frame."""
    starts = [seconds - 1e-4 for seconds, _ in frames]
    shown = [int(np.searchsorted(starts, moment, "right")) - 1 for moment in moments if moment < end]
    return list(dict.fromkeys(shown))


def compare(path: Path, trials: int, draw: random.Random) -> dict:
    """How many sampled frames of a clip differ from plain decoding: {frames, differ, indexed}."""
    frames, end = decode_all(path)
    last, whole, found = frames[-1][0], len(frames) < WHOLE, {"frames": 0, "differ": 0, "indexed": 0}
    near = decode._FAR
    for trial in range(trials):
        begin = draw.uniform(0, 0.7 * last) if trial % 3 else 0.0
        until = None if whole and trial % 2 else min(begin + draw.uniform(0.5, 60), last)
        count = draw.choice((1, 3, 9)) if trial % 3 == 2 else None
        decode._FAR = 0 if trial % 4 == 1 else near  # every gap is jumped over
        container = open_container(path, path.name)
        decoder = Decoder(container, path.name, draw.choice(RATES), 400, begin, until, count, as_coded=True)
        decode._FAR = near
        got = [(frame.index, frame.time, _digest(frame.pixels.permute(1, 2, 0).numpy())) for frame in decoder.frames()]
        want = [(at, *frames[at]) for at in expected(frames, decoder.times, end)]
        found["frames"] += len(want)
        found["differ"] += abs(len(got) - len(want)) + sum(
            one[0] != other[0] or abs(one[1] - other[1]) > 1e-6 or one[2] != other[2]
            for one, other in zip(got, want, strict=False)
        )
        found["indexed"] += decoder.selective
        decoder.close()
    return found


def bare(path: Path, threads: str) -> None:
    """Decode a clip and do nothing with it."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        if threads == BARE[-1]:
            stream.codec_context.thread_count = 1
        else:
            stream.thread_type = threads
        for _ in container.decode(stream):
            pass


def sampled(path: Path) -> None:
    """Our frames of a clip, 2 a second, as RGB."""
    decoder = Decoder(open_container(path, path.name), path.name, 2.0, 1365)
    for _ in decoder.frames():
        pass
    decoder.close()


def race(path: Path, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Contender → (seconds, CPU seconds) of every round; each round begins with another one."""
    encoder = SlowFastEncoder()
    contenders: dict[str, Callable[[], object]] = {f"bare {name}": lambda name=name: bare(path, name) for name in BARE}
    contenders |= {"sampled": lambda: sampled(path), "plan": lambda: encoder.plan(path)}
    names = list(contenders)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            began, cpu = time.perf_counter(), time.process_time()
            contenders[name]()
            found[name].append((time.perf_counter() - began, time.process_time() - cpu))
    return found


def ratios(found: dict[str, list[tuple[float, float]]], name: str) -> tuple[float, float]:
    """Medians over the rounds of (seconds, CPU seconds) over those of the bare decoding that is fastest by median."""

    def ratio(clock: int) -> float:
        best = min((f"bare {key}" for key in BARE), key=lambda key: statistics.median(t[clock] for t in found[key]))
        return statistics.median(a[clock] / b[clock] for a, b in zip(found[name], found[best], strict=True))

    return ratio(0), ratio(1)


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__, "python -m scripts.bench.encoder.decoding my.mp4 other.webm --out runs/bench")
    parser.add_argument("clips", nargs="*", type=Path, help="clips to take (the real clips, and two films for speed)")
    args = parser.parse_args(argv)
    began = time.perf_counter()
    seconds = 12 if args.quick else 60
    size = (180, 320) if args.quick else (720, 1280)
    clips = {path.name: path for path in args.clips} or real_clips(("bikes.mp4", "a.mp4") if args.quick else None)
    raced = (
        clips
        if args.clips
        else {f"film {kind} B-frames": film(seconds, kind == "with", size) for kind in ("with", "without")}
    )
    draw = random.Random(SEED)
    exact, speed, claims = [], [], []
    trials = 3 if args.quick else 12
    for name, path in clips.items():
        found = compare(path, trials, draw)
        exact.append((name, found["frames"], found["differ"], f"{found['indexed']} of {trials}"))
        print(f"  {name}: {found['differ']} of {found['frames']} frames differ", flush=True)
    frames, differ = sum(row[1] for row in exact), sum(row[2] for row in exact)
    claims.append(
        Claim(
            "sampled frames are those of plain decoding", "every one", f"{frames - differ} of {frames}", "", differ == 0
        )
    )
    for name, path in raced.items():
        found = race(path, 1 if args.quick else 5)
        for what, turns in found.items():
            wall, cpu = ratios(found, what)
            medians = [f"{statistics.median(turn[clock] for turn in turns):.2f}" for clock in (0, 1)]
            speed.append((name, what, *medians, f"{wall:.2f}", f"{cpu:.2f}"))
        wall, cpu = ratios(found, "sampled")
        figure = f"{statistics.median(turn[0] for turn in found['sampled']):.2f} s, {cpu:.2f} × the CPU time"
        claims.append(Claim(f"sampled frames as RGB, {name}, against bare decoding", "–", figure, f"{wall:.2f} ×"))
    save(
        out_of(args),
        "decoding",
        claims,
        [
            Table("Frames compared", ("clip", "frames", "differ", "selective"), exact),
            Table("Time", ("clip", "what", "median s", "median CPU s", "× bare", "× bare CPU"), speed),
        ],
        seconds=time.perf_counter() - began,
        quick=args.quick,
        seeds={"sampling": SEED},
        notes=["Bare is the fastest of four threadings. CPU time is more reliable than seconds under load."],
    )
    return int(differ > 0)


if __name__ == "__main__":
    run(main)
