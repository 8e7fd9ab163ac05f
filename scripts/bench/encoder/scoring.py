"""Frames per second of the comparison without decoding, for every measure and for keye-vl-utils 1.5.2.

Frames of 1280x720 are in memory as after decoding, and each contender classifies them: resizing, scoring, selection of
slow frames. Every run is a separate process, because the state of the allocator after another run changes the release's
speed by up to a factor of two. The contenders alternate, and ratios compare consecutive runs.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from keye.errors import run
from keye.slowfast.frame_classifier import FrameClassifier
from keye.slowfast.measures import get_measure, known_measures
from keye.slowfast.policies import get_policy
from keye.slowfast.resizing import resize
from keye.slowfast.threads import one_thread
from keye.video.clip import open_clip
from scripts.bench.common.process import in_process
from scripts.bench.common.record import Claim, Table, arguments, out_of, save
from scripts.bench.encoder.identity import compare
from scripts.bench.encoder.media.corpus import real_clips
from scripts.bench.encoder.media.films import FILMED
from scripts.bench.encoder.media.released import load_released

RELEASED = "keye-vl-utils"
SIZE = (720, 1280)
BATCH = 8  # frames, as the encoder takes them
GOAL = 5.0
EXAMPLES = "example: python -m scripts.bench.encoder.scoring --frames 200 --rounds 7 --threads 1"


def same_types(frames: torch.Tensor, thresholds: Sequence[float] = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)) -> bool:
    """Whether patch_cosine gives frames [T, 3, H, W] uint8 the released types at every one of the thresholds."""
    released = load_released()
    return all(compare(released, frames, threshold)[0] == 0 for threshold in thresholds)


def filmed(count: int) -> torch.Tensor:
    """`count` frames of a film's trailer, at its own rate from the beginning, at 1280x720: uint8 [T, 3, H, W]."""
    with open_clip(real_clips([FILMED])[FILMED], 2.0, count) as clip:
        frames = torch.stack([frame.pixels for frame in clip])
    return _as_decoded(resize(frames, SIZE, "bicubic")).repeat(-(-count // len(frames)), 1, 1, 1)[:count]


def drawn(count: int, seed: int = 5) -> torch.Tensor:
    """`count` frames of coarse noise that drifts, with a cut every tenth frame, at 1280x720: uint8 [T, 3, H, W]."""
    rng = np.random.default_rng(seed)
    frames = np.empty((count, *SIZE, 3), np.uint8)
    for index in range(count):
        if index % 10 == 0:
            scene = np.kron(
                rng.integers(0, 256, (SIZE[0] // 16, SIZE[1] // 16, 3), np.uint8), np.ones((16, 16, 1), np.uint8)
            )
        frames[index] = np.roll(scene, 3 * index, axis=1)
    return torch.from_numpy(frames).permute(0, 3, 1, 2)


def _as_decoded(frames: torch.Tensor) -> torch.Tensor:
    """The same frames with the three values of a pixel together in memory."""
    return frames.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def score(contender: str, frames: torch.Tensor) -> list[int]:
    """The types of frames [T, 3, H, W], by the release or by one of our measures, at its own threshold."""
    if contender == RELEASED:
        return load_released().extract_slow_fast_frames(frames, 0.9).tolist()
    measure = get_measure(contender)
    walk = FrameClassifier(measure, get_policy("adaptive", measure.threshold), remember=False)
    with one_thread():  # as the encoder walks
        return [kind for batch in frames.split(BATCH) for kind in walk.step(batch)[0]]


def measure(contenders: Sequence[str], frames: torch.Tensor, rounds: int, threads: int) -> dict[str, dict[str, list]]:
    """For each contender its frames a second in every round, by the clock (`wall`) and by processor time (`cpu`)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "frames.npy"
        np.save(path, frames.permute(0, 2, 3, 1).numpy())
        found: dict[str, dict[str, list]] = {name: {"wall": [], "cpu": []} for name in contenders}
        for turn in range(rounds):
            for name in contenders if turn % 2 == 0 else reversed(contenders):
                options = ["--run", name, "--array", str(path), "--threads", str(threads)]
                answer = in_process(__spec__.name, options, name, {"OMP_NUM_THREADS": str(threads)})
                for clock, values in found[name].items():
                    values.append(answer[clock])
        return found


def _run_one(contender: str, path: Path, threads: int) -> None:
    """One run in this process: print {"wall": frames a second, "cpu": frames a second of processor time} as JSON."""
    torch.set_num_threads(threads)
    frames = torch.from_numpy(np.load(path)).permute(0, 3, 1, 2)
    # The second video of a process is measured. All of it goes before, not a part: after a shorter one the allocator
    # keeps what the release asks for and gives back for every frame, which makes it faster than on video after video.
    score(contender, frames)
    wall, cpu = time.perf_counter(), time.process_time()
    score(contender, frames)
    rates = {"wall": len(frames) / (time.perf_counter() - wall), "cpu": len(frames) / (time.process_time() - cpu)}
    print(json.dumps(rates))


def _table(title: str, found: dict[str, dict[str, list]]) -> Table:
    rows = []
    for name, clocks in found.items():
        wall, cpu = (statistics.median(clocks[clock]) for clock in ("wall", "cpu"))
        ratios = [f"{_ratio(found, name, clock):.1f}×" for clock in ("wall", "cpu")]
        rows.append((name, f"{wall:.0f}", ratios[0], f"{cpu:.0f}", ratios[1]))
    return Table(title, ("measure", "frames/s", "ratio", "frames/s of processor time", "ratio"), rows)


def _ratio(found: dict[str, dict[str, list]], name: str, clock: str) -> float:
    """The median over the rounds of how many times the release's frames a second these are."""
    pairs = zip(found[name][clock], found[RELEASED][clock], strict=True)
    return statistics.median(ours / theirs for ours, theirs in pairs)


def main() -> None:
    parser = arguments(__doc__, EXAMPLES)
    parser.add_argument("--frames", type=int, default=120, help="how many frames a run compares (120)")
    parser.add_argument("--rounds", type=int, default=5, help="how often each contender runs (5)")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2], help="threads of torch, one table each (1 2)")
    parser.add_argument("--measures", nargs="*", help="which measures (all that need no vision tower)")
    parser.add_argument("--run", help="run one contender in this process, on the frames of --array")
    parser.add_argument("--array", type=Path, help="frames [T, H, W, 3] for --run, as .npy")
    args = parser.parse_args()
    if args.run:
        _run_one(args.run, args.array, args.threads[0])
        return
    began = time.monotonic()
    count, rounds = (16, 1) if args.quick else (args.frames, args.rounds)
    names = args.measures or [name for name in known_measures() if name != "features"]
    claims, tables = [], []
    for about, frames in (("of a film", filmed(count)), ("drawn", drawn(count))):
        for threads in args.threads:
            found = measure([RELEASED, *names], frames, rounds, threads)
            tables.append(_table(f"{count} frames {about}, 1280x720, threads: {threads}", found))
            if "patch_cosine" in found:
                ratio = _ratio(found, "patch_cosine", "wall")
                rates = (f"{statistics.median(found[name]['wall']):.0f}" for name in ("patch_cosine", RELEASED))
                claims.append(
                    Claim(
                        f"patch_cosine compared with the release, frames {about}, threads: {threads}",
                        f"at least {GOAL:.0f}× its frames a second",
                        " against ".join(rates) + " frames/s",
                        f"{ratio:.1f}×",
                        ratio >= GOAL,
                    )
                )
    notes = [
        f"Medians of {rounds} rounds, every run a process of its own; the ratio is the median of the rounds' ratios."
    ]
    seconds = time.monotonic() - began
    save(out_of(args), "scoring", claims, tables, seconds=seconds, quick=args.quick, seeds={"drawn": 5}, notes=notes)


if __name__ == "__main__":
    run(main)
