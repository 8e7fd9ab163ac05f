"""A film with continuity: ten minutes of animation, cut as an editor cuts, most cuts within one place and its palette.

The film of films.py sets unrelated pieces side by side, so that most colours change at each cut and a measure that
looks at hue has it easy. In edited films most cuts stay in a scene: the same things in the same light from another
distance or side. The design below was fixed before any measure had been run on the film, and is not changed for scores.

- Places: stretches of the animated trailer in their own colours. Those of a place are from one shot or from
  neighbouring shots of the same meadow. Stretches with captions, titles and fades are left out (a caption that jumps
  with the framing would mark the cut), and so are the opening clouds, in which there is nothing to frame.
- A scene is 4 to 8 sub-shots of one place; the next scene is at another place.
- A sub-shot is long as shots are: log-normal with a median of 3.4 s and sigma 0.5, between 1 and 12 s.
- Its framing is wide, medium or close (1.0, 0.6 or 0.4 of the picture's sides, each as likely): three in four about one
  of the things that the stretch is of (their places were read off its pictures; off centre by at most 0.08 of the
  picture), one in four anywhere, as a cutaway. A cut that stays in a stretch must change the scale, or move the window
  by a third of its size at least, across or up, as the 30-degree rule asks for. One in four is mirrored, as a reverse
  angle.
- Time goes on: where a stretch is shown again in a scene, it goes on 0.2 to 1 s later than it was left. A sub-shot
  longer than its stretch is shown at half speed, and what comes to an end of its stretch turns back.
- One frame of the source (24 a second) for one of the film (25 a second); one seed for everything.
"""

import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import av

from scripts.bench.common.record import ROOT
from scripts.bench.encoder.media.corpus import FOLDER, locked, real_clips
from scripts.bench.encoder.media.films import FILMED, RATE, play, write_film

SEED = 11
SOURCE_RATE = 24
SHORTEST, MEDIAN, SIGMA, LONGEST = 1.0, 3.4, 0.5, 12.0  # seconds of a sub-shot
SCALES = (1.0, 0.6, 0.4)
OFF_CENTRE, CUTAWAYS, MIRRORED = 0.08, 0.25, 0.25
Stretch = tuple[float, float]
"""From and to, in seconds of the trailer; no cut, caption or fade lies between."""
PLACES: dict[str, dict[Stretch, tuple[tuple[float, float], ...]]] = {
    "burrow": {(14.9, 16.05): ((0.5, 0.65), (0.2, 0.4)), (23.0, 24.65): ((0.5, 0.45), (0.2, 0.4))},
    "hill": {(24.75, 31.0): ((0.35, 0.3), (0.35, 0.6))},
    "meadow": {
        (36.02, 37.45): ((0.25, 0.55), (0.7, 0.6)),
        (37.5, 41.15): ((0.65, 0.3), (0.5, 0.6)),
        (41.2, 43.68): ((0.47, 0.45), (0.65, 0.55)),
        (43.75, 45.9): ((0.45, 0.35), (0.5, 0.65)),
    },
}
"""Each place's stretches, and where (across, down, as shares of the picture) the things are that they are of."""


@dataclass(frozen=True)
class SubShot:
    """`frames` frames of the film, from film frame `first`, that show a part of one stretch of the trailer.

    at: the stretch's frame at which it starts, counted on through every turning back. crop: scale, and where the window
    lies in what it leaves free, across and down (0 to 1).
    """

    first: int
    frames: int
    scene: int
    place: str
    stretch: Stretch
    at: int
    speed: float
    crop: tuple[float, float, float]
    mirrored: bool


def draw_film(total: int, seed: int = SEED) -> list[SubShot]:
    """The sub-shots of a film of `total` frames."""
    draw = random.Random(seed)
    shots: list[SubShot] = []
    scene, place, first = 0, "", 0
    while first < total:
        place = draw.choice([other for other in PLACES if other != place])
        heads = {stretch: draw.randrange(2 * _length(stretch)) for stretch in PLACES[place]}
        last = None
        for _ in range(draw.randint(4, 8)):
            last = _draw_sub_shot(draw, total, first, scene, place, heads, last)
            shots.append(last)
            first += last.frames
            if first == total:
                break
        scene += 1
    return shots


def _draw_sub_shot(
    draw: random.Random,
    total: int,
    first: int,
    scene: int,
    place: str,
    heads: dict[Stretch, int],
    last: SubShot | None,
) -> SubShot:
    """The next sub-shot of a scene; `heads`, where each stretch goes on, is moved on. last: the scene's latest."""
    stretch = draw.choice(list(PLACES[place]))
    seconds = min(max(draw.lognormvariate(math.log(MEDIAN), SIGMA), SHORTEST), LONGEST)
    frames = round(seconds * RATE)
    if total - first - frames < SHORTEST * RATE:
        frames = total - first
    crop = _draw_framing(draw, PLACES[place][stretch], last.crop if last and last.stretch == stretch else None)
    speed = 0.5 if frames > _length(stretch) else 1.0
    at = heads[stretch]
    heads[stretch] = at + math.ceil(frames * speed) + draw.randint(RATE // 5, RATE)
    return SubShot(first, frames, scene, place, stretch, at, speed, crop, draw.random() < MIRRORED)


def _draw_framing(
    draw: random.Random, things: Sequence[tuple[float, float]], last: tuple[float, float, float] | None
) -> tuple[float, float, float]:
    """Scale and place of a window about one of the `things` that differs enough from the `last` one."""
    while True:
        scale = draw.choice(SCALES)
        centre = [at + draw.uniform(-OFF_CENTRE, OFF_CENTRE) for at in draw.choice(things)]
        if draw.random() < CUTAWAYS:
            centre = [draw.random(), draw.random()]
        corner = [min(max(at - scale / 2, 0.0), 1 - scale) for at in centre]
        x, y = (at / (1 - scale) if scale < 1 else 0.0 for at in corner)
        if last is None or differs((scale, x, y), last):
            return scale, x, y


def differs(one: tuple[float, float, float], other: tuple[float, float, float]) -> bool:
    """Are two framings a scale apart, or a third of the window's size across or up?"""
    scale = one[0]
    if scale != other[0]:
        return True
    return max(abs(a - b) * (1 - scale) for a, b in zip(one[1:], other[1:], strict=True)) >= scale / 3


def _length(stretch: Stretch) -> int:
    """The number of frames of a stretch of the trailer."""
    return round((stretch[1] - stretch[0]) * SOURCE_RATE)


def continuity_film(seconds: int = 600, size: tuple[int, int] = (360, 640)) -> Path:
    """The film, H.264 of `size` (height, width), rendered once; `cuts` are the times of its cuts.

    Raises CorpusError without the trailer.
    """
    folder = FOLDER / "films"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{seconds}s-{size[0]}p-continuity-{SEED}.mp4"
    with locked(path.name):
        if not path.is_file():
            render(real_clips([FILMED])[FILMED], path, draw_film(seconds * RATE), size)
    return path


def render(source: Path, path: Path, shots: Sequence[SubShot], size: tuple[int, int]) -> None:
    """Write the sub-shots of `source` to `path`, and their content and times (seconds) to a JSON file."""
    pieces = [{"time": shot.first / RATE, **asdict(shot)} for shot in shots]
    record = {"source": source.name, "seed": SEED, "pieces": pieces}
    with av.open(str(source)) as clip:
        write_film(path, _frames(clip, shots, size), sum(shot.frames for shot in shots), False, size, record)


def _frames(
    clip: av.container.InputContainer, shots: Sequence[SubShot], size: tuple[int, int]
) -> Iterator[av.VideoFrame]:
    for shot in shots:
        start, end = shot.stretch
        piece = {"start": start, "seconds": end - start, "crop": shot.crop, "mirrored": shot.mirrored}
        pictures = list(play(clip, piece | {"hue": 0.0, "saturation": 1.0}, size))
        for number in range(shot.frames):
            picture = pictures[turning(shot.at + int(number * shot.speed), len(pictures))]
            picture.pict_type = av.video.frame.PictureType.NONE  # the encoder's own choice: the source's is of no use
            yield picture


def turning(position: int, count: int) -> int:
    """The frame of `count` at a position that goes to and fro: 0 1 2 1 0 1 …"""
    position %= max(2 * count - 2, 1)
    return min(position, 2 * count - 2 - position)


def cuts(path: Path) -> list[tuple[float, bool]]:
    """The times (seconds, ascending) of a rendered film's cuts, and whether each stays within its scene."""
    pieces = json.loads(path.with_suffix(".json").read_text())["pieces"]
    return [(now["time"], now["scene"] == last["scene"]) for last, now in zip(pieces, pieces[1:], strict=False)]


if __name__ == "__main__":
    found = cuts(continuity_film())
    print(f"{continuity_film().relative_to(ROOT)}: {len(found)} cuts, {sum(same for _, same in found)} within a scene")
