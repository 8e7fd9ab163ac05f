"""Are the frame types those of keye-vl-utils 1.5.2 on the same frames, at every threshold?

Its `extract_slow_fast_frames` runs as released; the similarities it computes on the way are written down and compared,
too. Frames: of every real clip at 2 a second, of 200 clips drawn by keye.world, and of some that nobody would film.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from keye.encoder import SlowFastEncoder
from keye.errors import run
from keye.video.clip import open_clip
from keye.world import FAMILIES, Setting
from scripts.bench.common.record import Claim, Table, arguments, out_of, save
from scripts.bench.encoder.media.corpus import real_clips
from scripts.bench.encoder.media.released import load_released

THRESHOLDS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.97, 0.99)
FILMED = ("read", "count", "order", "when", "motion", "find")
SIZES = ((112, 112), (180, 320), (270, 480), (320, 180), (90, 630), (56, 84))
DRAWN = 200
SEED = 20


def compare(released: ModuleType, frames: torch.Tensor, threshold: float) -> tuple[int, int, int]:
    """On frames [T, 3, H, W] uint8: (types that differ, similarities that differ in float32, similarities compared)."""
    theirs, scores = _released_types(released, frames, threshold)
    plan = SlowFastEncoder(threshold, measure="patch_cosine", policy="adaptive").plan(frames)
    types = int((plan.frame_types != theirs.long()).sum())
    seen = np.isfinite(scores)  # a pair that is black in both frames has no similarity there
    ours = plan.similarity.numpy()[1:]
    return types, int((ours[seen] != scores[seen]).sum()), int(seen.sum())


def _released_types(released: ModuleType, frames: torch.Tensor, threshold: float) -> tuple[torch.Tensor, np.ndarray]:
    """The released frame types [T], and the similarity of each frame but the first, float32 [T - 1]."""
    scores: list[float] = []
    plain = released.get_frame_sim

    def noted(*pair: torch.Tensor) -> float:
        scores.append(plain(*pair))
        return scores[-1]

    released.get_frame_sim = noted
    try:
        types = released.extract_slow_fast_frames(frames, threshold)
    finally:
        released.get_frame_sim = plain
    return types, np.array(scores, np.float32)


def frames_of(path: Path, most: int = 400) -> torch.Tensor:
    """A clip's frames at 2 a second, at most so many, uint8 [T, 3, H, W]."""
    with open_clip(path, 2.0, most) as clip:
        return torch.stack([frame.pixels for frame in clip])


def drawn(count: int) -> Iterator[torch.Tensor]:
    """Clips of keye.world at several sizes and difficulties, 2 frames a second, uint8 [T, 3, H, W]."""
    for index in range(count):
        rng = np.random.default_rng([SEED, index])
        size = SIZES[int(rng.integers(len(SIZES)))]
        setting = Setting(size, duration=6.0, fps=2, difficulty=float(rng.random()))
        draft = FAMILIES[FILMED[index % len(FILMED)]](rng, setting, _answer(FILMED[index % len(FILMED)], rng), index)
        yield _stack([draft.draw(number) for number in range(draft.frames)])


def _answer(family: str, rng: np.random.Generator) -> str | None:
    from keye.world.families import deal

    return deal(family, Setting(duration=6.0, fps=2), SEED, int(rng.integers(60)))


def extremes() -> Iterator[tuple[str, torch.Tensor]]:
    """(name, frames) that nobody would film: black, almost black, noise, flat colours, fades, ribbons, one frame."""
    rng = np.random.default_rng(SEED)
    noise = rng.integers(0, 256, (8, 84, 140, 3), np.uint8)
    black = np.zeros((8, 84, 140, 3), np.uint8)
    flat = np.broadcast_to(rng.integers(0, 256, (8, 1, 1, 3), np.uint8), black.shape)
    fade = (noise[:1] * np.linspace(0, 1, 8)[:, None, None, None]).astype(np.uint8)
    half = noise.copy()
    half[:, :, 70:] = 0
    cases = {
        "black": black,
        "black and noise in turn": np.where((np.arange(8) % 2)[:, None, None, None] == 1, noise, black),
        "values 0 and 1": noise % 2,
        "noise": noise,
        "flat colours": flat,
        "fade from black": fade,
        "half black": half,
        "one frame": noise[:1],
        "still": np.repeat(noise[:1], 8, 0),
        "one patch high": rng.integers(0, 256, (6, 28, 1400, 3), np.uint8),
        "ribbon": rng.integers(0, 256, (6, 56, 1400, 3), np.uint8),
        "odd sides": rng.integers(0, 256, (6, 301, 403, 3), np.uint8),
    }
    for name, frames in cases.items():
        yield name, _stack(list(frames))


def _stack(frames: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).contiguous()


def _raised_in(error: Exception, module: ModuleType) -> bool:
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame.f_code.co_filename == module.__file__


class Tally:
    """Adds up what was compared for one row of the table."""

    def __init__(self, thresholds: Sequence[float]) -> None:
        self.thresholds = thresholds
        self.clips = self.frames = self.types = self.scores = self.compared = 0
        self.failed: list[str] = []

    def add(self, released: ModuleType, frames: torch.Tensor, name: str) -> None:
        """Compare one clip at every threshold; where the release fails there is nothing to compare with."""
        self.clips += 1
        for threshold in self.thresholds:
            try:
                types, scores, compared = compare(released, frames, threshold)
            except IndexError as error:
                if not _raised_in(error, released):
                    raise
                self.failed.append(f"{name}: {error}")
                return
            self.frames += len(frames)
            self.types += types
            self.scores += scores
            self.compared += compared

    def found(self) -> str:
        """What has been compared so far, for the log."""
        return f"  {self.clips} clips: {self.types} of {self.frames:,} types and {self.scores} similarities differ"


def measure(
    clips: dict[str, Path], count: int, most: int, thresholds: Sequence[float], say: Callable[[str], None]
) -> list[tuple[str, Tally]]:
    """A tally for each real clip (at most `most` frames), one for all `count` drawn clips, one for the extremes."""
    released = load_released()
    rows: list[tuple[str, Tally]] = []
    for name, path in clips.items():
        say(name)
        rows.append((name, Tally(thresholds)))
        rows[-1][1].add(released, frames_of(path, most), name)
        say(rows[-1][1].found())
    say(f"{count} drawn clips")
    rows.append((f"{count} clips of keye.world", Tally(thresholds)))
    for index, frames in enumerate(drawn(count)):
        rows[-1][1].add(released, frames, f"drawn clip {index}")
        if index % 20 == 19:
            say(rows[-1][1].found())
    rows.append(("extremes", Tally(thresholds)))
    for name, frames in extremes():
        rows[-1][1].add(released, frames, name)
    return rows


def main() -> None:
    args = arguments(__doc__).parse_args()
    began = time.monotonic()
    clips = real_clips()
    if args.quick:
        clips = dict(list(clips.items())[:3])
    thresholds = THRESHOLDS[::5] if args.quick else THRESHOLDS
    count, most = (6, 8) if args.quick else (DRAWN, 400)
    rows = measure(clips, count, most, thresholds, lambda what: print(what, flush=True))
    frames, types = sum(row.frames for _, row in rows), sum(row.types for _, row in rows)
    compared, scores = sum(row.compared for _, row in rows), sum(row.scores for _, row in rows)
    claims = [
        Claim(
            f"frame types of patch_cosine that differ from the release's, {len(thresholds)} thresholds from"
            f" {thresholds[0]} to {thresholds[-1]}, {len(clips)} real and {rows[-2][1].clips} rendered clips",
            "0",
            f"{types} of {frames:,}",
            met=types == 0,
        ),
        Claim(
            "similarities that differ from the release's in any bit", "0", f"{scores} of {compared:,}", met=scores == 0
        ),
    ]
    columns = ("clip", "clips", "frames × thresholds", "types that differ", "similarities that differ", "of")
    cells = [(name, row.clips, row.frames, row.types, row.scores, row.compared) for name, row in rows]
    notes = [f"Extremes: {', '.join(name for name, _ in extremes())}."]
    failed = [text for _, row in rows for text in row.failed]
    if failed:
        notes.append(f"The release fails on {len(failed)} of them, which are left out: {'; '.join(failed)}.")
    save(
        out_of(args),
        "identity",
        claims,
        [Table("Frames compared", columns, cells)],
        seconds=time.monotonic() - began,
        quick=args.quick,
        seeds={"drawn clips": SEED},
        notes=notes,
    )


if __name__ == "__main__":
    run(main)
