"""A reel: shots cut out of real clips in another order, so that real pictures come with exact times of their cuts."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image

from keye.video.clip import open_clip
from keye.world.render import write_mp4
from scripts.bench.encoder.media.corpus import FOLDER, locked
from scripts.bench.encoder.media.scenes import FPS, HEIGHT, WIDTH, Scene, Span


def reel(name: str, sources: Sequence[tuple[Path, float, float]], shots: int, seed: int) -> Scene:
    """`shots` pieces of 1.5 to 5 seconds cut out of (path, from, to seconds) in a drawn order, at 640x360, 10 fps.

    Neighbours are from different sources or at least four seconds apart in one. Times of cuts are exact.
    """
    folder = FOLDER / "scenes"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{shots}-{seed}.mp4"
    record = path.with_suffix(".json")
    with locked(str(path)):
        if not (path.is_file() and record.is_file()):
            draw = np.random.default_rng(seed)
            stock = [[f for f in _small_frames(p) if start <= f[0] < end] for p, start, end in sources]
            weights = np.array([len(frames) for frames in stock], float) ** 0.5
            frames: list[np.ndarray] = []
            cuts: list[float] = []
            last = (-1, 0)
            while len(cuts) < shots:
                pick = int(draw.choice(len(stock), p=weights / weights.sum()))
                count = min(int(draw.integers(15, 51)), len(stock[pick]))
                at = int(draw.integers(0, len(stock[pick]) - count + 1))
                if pick == last[0] and abs(at - last[1]) < 4 * FPS + count:
                    continue
                last = (pick, at)
                cuts.append(len(frames) / FPS)
                frames += [pixels for _, pixels in stock[pick][at : at + count]]
            write_mp4(path, frames, FPS, 26)
            spans = [asdict(Span("cut", time, time)) for time in cuts[1:]]
            record.write_text(json.dumps({"events": spans}, indent=1) + "\n")
    return Scene(name, path, [Span(**span) for span in json.loads(record.read_text())["events"]])


def _small_frames(path: Path) -> list[tuple[float, np.ndarray]]:
    """The (time, pixels [HEIGHT, WIDTH, 3]) of a clip at 10 frames a second, stretched to the reel's shape."""
    with open_clip(str(path), FPS, 1 << 20) as clip:
        size = (WIDTH, HEIGHT)
        return [(f.time, np.asarray(Image.fromarray(f.pixels.permute(1, 2, 0).numpy()).resize(size))) for f in clip]
