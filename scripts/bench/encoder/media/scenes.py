"""Clips drawn with exact ground truth: when the picture really changes, and when only light, noise or coding does.

Thirteen kinds of ten-second clips at 640x360 over the photographs inside scikit-image, coded as H.264: cuts, dissolves,
slides and screencasts that grow line by line, small walkers and objects before a still background; and what must not
count: light, sensor noise, flicker of low bit rates, fades, a trembling camera. Seeds and photographs are split: tune
a measure on `TUNING_SEEDS` only, report `HELD_OUT_SEEDS`.
Run it to render all: `python -m scripts.bench.encoder.media.scenes`.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from keye.errors import run
from keye.world.render import write_mp4
from scripts.bench.common.record import ROOT
from scripts.bench.encoder.media.corpus import FOLDER, locked
from scripts.bench.encoder.media.drawing import (
    FPS,
    HEIGHT,
    HELD_OUT_SEEDS,
    SECONDS,
    TUNING_SEEDS,
    WIDTH,
    WORDS,
    Drawing,
    Scene,
    Span,
    font,
)

Frames = Iterator[np.ndarray]


def _clock() -> list[float]:
    return [i / FPS for i in range(SECONDS * FPS)]


def _cuts(draw: Drawing) -> Frames:
    """Hard cuts between photographs, each slowly panned."""
    times = draw.times(5)
    shots = draw.photographs_in_turn(6, 1.15)
    for time in times:
        draw.event("cut", time)
    for t in _clock():
        shot = sum(t >= time for time in times)
        since = t - ([0.0, *times][shot])
        left = int(since * 12) % (shots[shot].shape[1] - WIDTH)
        yield shots[shot][:, left : left + WIDTH]


def _dissolves(draw: Drawing) -> Frames:
    """Cross-dissolves of 0.6 to 1.4 seconds between still photographs."""
    times = draw.times(3, gap=2.6, last=SECONDS - 2.4)
    lengths = draw.random.uniform(0.6, 1.4, 3)
    shots = draw.photographs_in_turn(4)
    for time, length in zip(times, lengths, strict=True):
        draw.event("dissolve", time + length / 2, time + length)
    for t in _clock():
        picture = shots[0]
        for shot, time, length in zip(shots[1:], times, lengths, strict=True):
            share = min(max((t - time) / length, 0), 1)
            picture = picture * (1 - share) + shot * share
        yield picture


def _line(draw: Drawing) -> str:
    return " ".join(draw.random.choice(WORDS, int(draw.random.integers(2, 6))))


def _slides(draw: Drawing) -> Frames:
    """A slide that gains a line of text at a time."""
    times = draw.times(5)
    paper = draw.random.choice([[250, 250, 245], [20, 25, 45], [235, 240, 250], [40, 40, 40]])
    ink = (20, 20, 30) if paper[0] > 128 else (240, 240, 230)
    size = int(draw.random.integers(14, 30))
    image = Image.new("RGB", (WIDTH, HEIGHT), tuple(int(v) for v in paper))
    canvas = ImageDraw.Draw(image)
    canvas.text((30, 20), _line(draw), fill=ink, font=font(32))
    pictures = [np.asarray(image).astype(np.float32)]
    for i, time in enumerate(times):
        draw.event("text", time)
        canvas.text((40, 75 + i * 52), "- " + _line(draw), fill=ink, font=font(size))
        pictures.append(np.asarray(image).astype(np.float32))
    for t in _clock():
        yield pictures[sum(t >= time for time in times)]


def _subtitles(draw: Drawing) -> Frames:
    """Subtitles over a photograph: each is replaced by the next."""
    times = draw.times(4, gap=1.6)
    texts = ["", *(_line(draw) for _ in times)]
    picture = draw.photograph()
    for time in times:
        draw.event("text", time)
    for t in _clock():
        image = Image.fromarray(picture.astype(np.uint8))
        text = texts[sum(t >= time for time in times)]
        ImageDraw.Draw(image).text(
            (WIDTH / 2, 325), text, fill="white", font=font(24), anchor="mm", stroke_width=2, stroke_fill="black"
        )
        yield np.asarray(image).astype(np.float32)


def _screencast(draw: Drawing) -> Frames:
    """A desktop: windows and menus open and close, the pointer wanders (which is no change)."""
    times = draw.times(5)
    desk = draw.photograph() * 0.4 + 60
    boxes = []
    for i, time in enumerate(times):
        width, height = int(draw.random.integers(70, 300)), int(draw.random.integers(50, 200))
        x, y = int(draw.random.integers(10, WIDTH - width)), int(draw.random.integers(30, HEIGHT - height))
        closes = time if i and draw.random.random() < 0.4 else None
        boxes.append((time, x, y, width, height, [_line(draw) for _ in range(height // 24)]))
        if closes is not None:
            boxes[-2] = (*boxes[-2], closes)
        draw.event("window", time)
    draw.nuisance("pointer")
    path = np.cumsum(draw.random.normal(0, 9, (SECONDS * FPS, 2)), 0) % [HEIGHT - 20, WIDTH - 20]
    for i, t in enumerate(_clock()):
        image = Image.fromarray(desk.clip(0, 255).astype(np.uint8))
        canvas = ImageDraw.Draw(image)
        canvas.rectangle((0, 0, WIDTH, 18), fill=(30, 30, 30))
        for time, x, y, width, height, lines, *closes in boxes:
            if time <= t and not (closes and closes[0] <= t):
                canvas.rectangle((x, y, x + width, y + height), fill=(238, 238, 236), outline=(90, 90, 90))
                for row, text in enumerate(lines):
                    canvas.text((x + 8, y + 6 + row * 22), text[: width // 8], fill=(40, 40, 40), font=font(14))
        y, x = path[i]
        canvas.polygon([(x, y), (x, y + 14), (x + 9, y + 10)], fill="white", outline="black")
        yield np.asarray(image).astype(np.float32)


def _walker(picture: np.ndarray, x: float, foot: float, height: float, colours: np.ndarray, phase: float) -> None:
    """Paint a person of `height` pixels whose feet are at (x, foot): head, body, two swinging legs."""
    y, xs = np.mgrid[:HEIGHT, :WIDTH].astype(np.float32)
    up = (foot - y) / height  # 0 at the feet, 1 at the top of the head
    across = (xs - x) / height
    stride = 0.1 * np.sin(phase) * (1 - up / 0.45)
    legs = (up > 0) & (up <= 0.45) & (np.minimum(abs(across - stride), abs(across + stride)) < 0.055)
    body = (up > 0.4) & (up <= 0.84) & (abs(across) < 0.125)
    head = ((up - 0.92) / 0.08) ** 2 + (across / 0.07) ** 2 < 1
    for mask, colour in zip((legs, body, head), colours, strict=True):
        picture[mask] = colour


def _walkers(draw: Drawing) -> Frames:
    """A still view; people of 0.3 to 3 % of the picture walk in from the sides and out again."""
    view = draw.photograph()
    people = []
    for time in draw.times(3, gap=2.0, last=SECONDS - 2.5):
        height = float(np.sqrt(draw.random.uniform(0.003, 0.03) * HEIGHT * WIDTH / 0.22))
        speed = draw.random.uniform(45, 110) * draw.random.choice([-1, 1])
        colours = draw.random.uniform(0, 1, (3, 3)) * [60, 60, 80] + [[20, 20, 25], [30, 30, 40], [150, 110, 90]]
        foot = draw.random.uniform(max(height + 5, 0.55 * HEIGHT), HEIGHT - 5)
        half = 0.13 * height
        people.append((time, speed, height, foot, colours, -half if speed > 0 else WIDTH + half))
        wholly = 2 * half / abs(speed)
        draw.event("enter", time + wholly / 2, time + max(wholly, 0.1))
    for t in _clock():
        picture = view.copy()
        for time, speed, height, foot, colours, start in people:
            if t >= time:
                _walker(picture, start + speed * (t - time), foot, height, colours, 8 * t)
        yield picture


def _paint_object(draw: Drawing, picture: np.ndarray) -> np.ndarray:
    """The picture with a box or disc of 0.3 to 3 % of its area in a colour that differs from the background."""
    side = np.sqrt(draw.random.uniform(0.003, 0.03) * HEIGHT * WIDTH)
    y, x = draw.random.uniform(side, HEIGHT - side), draw.random.uniform(side, WIDTH - side)
    ys, xs = np.mgrid[:HEIGHT, :WIDTH]
    disc = draw.random.random() < 0.5
    mask = np.hypot(ys - y, xs - x) < side * 0.56 if disc else np.maximum(abs(ys - y), abs(xs - x)) < side / 2
    colour = (picture[mask].mean(0) + draw.random.uniform(60, 190, 3)) % 256
    painted = picture.copy()
    painted[mask] = colour * 0.85 + 0.15 * picture[mask]
    return painted


def _objects(draw: Drawing, count: int = 4) -> Frames:
    """A still view in which objects appear, and some vanish again."""
    times = draw.times(count)
    pictures = [draw.photograph()]
    for i, time in enumerate(times):
        draw.event("object", time)
        vanish = i and draw.random.random() < 0.35
        pictures.append(pictures[-2] if vanish else _paint_object(draw, pictures[-1]))
    for t in _clock():
        yield pictures[sum(t >= time for time in times)]


def _lights(draw: Drawing) -> Frames:
    """Exposure ramps, steps, flashes, white balance and a lamp, while two objects appear."""
    kinds = list(draw.random.permutation(["ramp", "step", "flash", "warm", "lamp", "wave"]))[:3]
    strength = draw.random.uniform(0.6, 1.0)
    starts = draw.times(3, gap=2.2, first=0.8, last=SECONDS - 2.2)
    y, x = np.mgrid[:HEIGHT, :WIDTH].astype(np.float32)
    centre = draw.random.uniform(0.2, 0.8, 2) * [HEIGHT, WIDTH]
    spot = np.exp(-(((y - centre[0]) / 130) ** 2 + ((x - centre[1]) / 180) ** 2))[..., None]
    draw.nuisance("light")
    for t, picture in zip(_clock(), _objects(draw, 2), strict=True):
        gain: np.ndarray | float = 1.0
        for kind, start in zip(kinds, starts, strict=True):
            since = t - start
            if since < 0:
                continue
            if kind == "ramp":
                gain = gain * (1 - 0.5 * strength * min(since / 1.5, 1))
            elif kind == "step":
                gain = gain * (1 - 0.35 * strength)
            elif kind == "flash" and since < 0.6:
                gain = gain * (1 + 0.7 * strength)
            elif kind == "warm":
                gain = gain * np.array([1 + 0.15 * strength, 1, 1 - 0.2 * strength])
            elif kind == "lamp":
                gain = gain * (1 + 0.5 * strength * spot)
            elif kind == "wave":
                gain = gain * (1 + 0.2 * strength * np.sin(2 * np.pi * since / 1.7))
        yield picture * gain


def _noise(draw: Drawing) -> Frames:
    """Sensor noise, stronger where it is dark, while two objects appear."""
    sigma = draw.random.uniform(6, 14)
    draw.nuisance("noise")
    draw.crf = 23
    for picture in _objects(draw, 2):
        grain = draw.random.normal(0, 1, (HEIGHT, WIDTH, 3)).astype(np.float32)
        yield picture + grain * sigma * (1.3 - picture.mean(-1, keepdims=True) / 255)


def _flicker(draw: Drawing) -> Frames:
    """A bit rate so low that every key frame is visible, over slight noise, while two objects appear."""
    draw.crf = int(draw.random.integers(36, 42))
    draw.nuisance("flicker")
    for picture in _objects(draw, 2):
        yield picture + draw.random.normal(0, 4, (HEIGHT, WIDTH, 1)).astype(np.float32)


def _jitter(draw: Drawing) -> Frames:
    """A camera that trembles by up to 1.5 pixels, while two objects appear."""
    draw.nuisance("jitter")
    for picture in _objects(draw, 2):
        yield ndimage.shift(picture, (*draw.random.uniform(-1.5, 1.5, 2), 0), order=1, mode="nearest")


def _fades(draw: Drawing) -> Frames:
    """Twice down to a fifth of the brightness and back to the same picture, once through black to another."""
    one, two = draw.photographs_in_turn(2)
    dips = [1.0, 4.0]
    change = 7.0
    for dip in dips:
        draw.nuisance("fade", dip, dip + 2.2)
    draw.event("fade", change + 0.8, change + 1.2)
    for t in _clock():
        light = min([1.0, *(0.2 + 0.8 * abs(t - dip - 1.0) for dip in dips if abs(t - dip - 1.0) < 1)])
        through = min(abs(t - change - 0.4) / 0.8, 1) if t < change + 0.4 else min(abs(t - change - 0.4) / 0.8, 1)
        yield (one if t < change + 0.4 else two) * min(light, through)


def _pans(draw: Drawing) -> Frames:
    """A camera that pans steadily, with two cuts: what the pan costs is not judged, the cuts must be seen."""
    times = draw.times(2, gap=3.0)
    shots = draw.photographs_in_turn(3, 1.6)
    speed = draw.random.uniform(20, 45)
    for time in times:
        draw.event("cut", time)
    for t in _clock():
        shot = sum(t >= time for time in times)
        left = min(int((t - [0.0, *times][shot]) * speed), shots[shot].shape[1] - WIDTH)
        yield shots[shot][:, left : left + WIDTH]


SCENE_KINDS: dict[str, Callable[[Drawing], Frames]] = {
    "cuts": _cuts,
    "dissolves": _dissolves,
    "slides": _slides,
    "subtitles": _subtitles,
    "screencast": _screencast,
    "walkers": _walkers,
    "objects": _objects,
    "lights": _lights,
    "noise": _noise,
    "flicker": _flicker,
    "jitter": _jitter,
    "fades": _fades,
    "pans": _pans,
}


def scene(kind: str, seed: int) -> Scene:
    """The clip of a kind and seed, rendered into .cache/bench/scenes unless it is there already."""
    return rendered(FOLDER / f"scenes/{kind}-{seed}.mp4", lambda: Drawing(kind, seed), SCENE_KINDS[kind], FPS)


def rendered(path: Path, draw: "Callable[[], Drawing]", kind: Callable[..., Iterator[np.ndarray]], fps: int) -> Scene:
    """The clip at `path` with its changes and nuisances, rendered unless it is there already."""
    path.parent.mkdir(parents=True, exist_ok=True)
    record = path.with_suffix(".json")
    with locked(str(path)):
        if not (path.is_file() and record.is_file()):
            drawing = draw()
            # A kind sets the coding and the truth of its drawing while it draws: all frames come first.
            frames = [np.rint(picture.clip(0, 255)).astype(np.uint8) for picture in kind(drawing)]
            write_mp4(path, frames, fps, drawing.crf)
            truth = {key: [asdict(span) for span in getattr(drawing, key)] for key in ("events", "nuisances")}
            record.write_text(json.dumps(truth, indent=1) + "\n")
    truth = json.loads(record.read_text())
    return Scene(path.stem, path, *([Span(**span) for span in truth[key]] for key in ("events", "nuisances")))


def scenes(seeds: Sequence[int], kinds: Sequence[str] = tuple(SCENE_KINDS)) -> list[Scene]:
    """The clips of all kinds and of the given seeds."""
    return [scene(kind, seed) for seed in seeds for kind in kinds]


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for clip in scenes((*TUNING_SEEDS, *HELD_OUT_SEEDS)):
        print(f"{clip.path.relative_to(ROOT)}  {len(clip.events)} changes, {len(clip.nuisances)} nuisances")


if __name__ == "__main__":
    run(main)
