"""Long films of the encoder's benches, rendered from one real clip into .cache/bench/films.

All films that the benches read (1.3 GB, minutes): `python -m scripts.bench.encoder.media.films`.
"""

import argparse
import json
import math
import os
import random
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from keye.errors import run
from scripts.bench.common.record import ROOT
from scripts.bench.encoder.media.corpus import FOLDER, locked, real_clips

RATE = 25  # frames per second of a film
LONGEST = 600  # seconds that are rendered; a longer film repeats this one
LONGEST_PIECE = 9.0  # seconds
SEED = 3
FILMED = "trailer_bbb.mp4"
FILMS = ((600, False, (720, 1280)), (600, True, (720, 1280)), (3600, False, (720, 1280)), (600, False, (360, 640)))
"""The films that the parts of the bench ask for: (seconds, B-frames, (height, width))."""


def film(seconds: int, bframes: bool, size: tuple[int, int] = (720, 1280), coloured: bool = True) -> Path:
    """A long H.264 film (25 fps, about 2 Mbit/s at 720p, a key frame at least every 250) of `size` (height, width).

    Made once of the animated trailer: pieces of 1.5 to 9 seconds in a drawn order, each cropped, mirrored and coloured
    in its own way, so that no stretch is repeated. coloured=False keeps the original hues, because recoloured shots
    favour measures of hue. A film longer than ten minutes repeats the packets of the ten-minute film. `film_cuts`
    returns the times of the cuts. Raises CorpusError without the trailer.
    """
    folder = FOLDER / "films"
    folder.mkdir(parents=True, exist_ok=True)
    kind = ("bframes" if bframes else "plain") + ("" if coloured else "-natural")
    path = folder / f"{seconds}s-{size[0]}p-{kind}.mp4"
    if seconds > LONGEST:
        part = film(LONGEST, bframes, size, coloured)
        with locked(path.name):
            if not path.is_file():
                _repeat(part, path, -(-seconds // LONGEST))
        return path
    with locked(path.name):
        if not path.is_file():
            paths = real_clips([FILMED])
            render(paths[FILMED], path, seconds, bframes, size, coloured)
    return path


def film_cuts(path: Path) -> list[float]:
    """The times (seconds, ascending) at which pieces of a rendered film meet."""
    return [piece["time"] for piece in json.loads(path.with_suffix(".json").read_text())["pieces"]][1:]


def film_times(path: Path, moments: Sequence[float]) -> list[float]:
    """When (seconds, ascending) a rendered film shows the given moments (seconds) of the clip it is made of."""
    pieces = json.loads(path.with_suffix(".json").read_text())["pieces"]
    ends = [piece["time"] for piece in pieces[1:]] + [math.inf]
    return [
        piece["time"] + moment - piece["start"]
        for piece, end in zip(pieces, ends, strict=True)
        for moment in sorted(moments)
        if piece["start"] < moment < piece["start"] + min(piece["seconds"], end - piece["time"])
    ]


def render(
    source: Path,
    path: Path,
    seconds: int,
    bframes: bool,
    size: tuple[int, int],
    coloured: bool = True,
    longest: float = LONGEST_PIECE,
) -> None:
    """Write a film of drawn pieces of `source` to `path`, and their origin to a JSON file of the same name.

    longest: seconds of a piece; at most half of the source, so that pieces can begin apart from each other.
    """
    draw, total, pieces = random.Random(SEED), round(seconds * RATE), []

    def frames(clip: av.container.InputContainer) -> Iterator[av.VideoFrame]:
        stream, shown = clip.streams.video[0], 0
        length = float(stream.duration * stream.time_base)
        while True:
            piece = _draw_piece(draw, length, pieces[-1] if pieces else None, longest)
            if not coloured:
                piece |= {"hue": 0.0, "saturation": 1.0}
            pieces.append({"time": shown / RATE, **piece})
            for frame in play(clip, piece, size):
                yield frame
                shown += 1

    with av.open(str(source)) as clip:
        record = {"source": source.name, "seed": SEED, "pieces": pieces}
        write_film(path, frames(clip), total, bframes, size, record)


def write_film(
    path: Path, frames: Iterator[av.VideoFrame], total: int, bframes: bool, size: tuple[int, int], record: dict
) -> None:
    """Encode the first `total` of the yuv420p `frames` of `size` to `path`, and `record` to its JSON file.

    The MP4 is moved into place last, so that an existing film is complete.
    """
    part = path.with_name(f".{os.getpid()}.{path.name}")
    with av.open(str(part), "w", format="mp4") as film_file, _progress() as progress:
        output = film_file.add_stream("libx264", rate=RATE)
        output.height, output.width = size
        output.pix_fmt = "yuv420p"
        output.bit_rate = max(100_000, 2_000_000 * size[0] * size[1] // (720 * 1280))
        output.options = {"preset": "veryfast", "g": "250", "bf": "3" if bframes else "0"}
        wanted = progress.track(islice(frames, total), total, description=f"rendering {path.name}")
        for number, frame in enumerate(wanted):
            frame.pts, frame.time_base = number, Fraction(1, RATE)
            film_file.mux(output.encode(frame))
        film_file.mux(output.encode(None))
    path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    os.replace(part, path)


def _draw_piece(draw: random.Random, length: float, last: dict | None, longest: float) -> dict:
    """A stretch of the source and what is done to it; it never starts within two seconds of where the last one did."""
    seconds = min(draw.uniform(1.5, longest), length)
    start = draw.uniform(0, length - seconds)
    while last is not None and length > 8 and abs(start - last["start"]) < 2:
        start = draw.uniform(0, length - seconds)
    share = draw.uniform(0.6, 1.0)
    return {
        "start": start,
        "seconds": seconds,
        "crop": [share, draw.random(), draw.random()],
        "mirrored": draw.random() < 0.5,
        "hue": draw.uniform(-180, 180) if draw.random() < 0.7 else 0.0,
        "saturation": draw.uniform(0.6, 1.4),
    }


def play(clip: av.container.InputContainer, piece: dict, size: tuple[int, int]) -> Iterator[av.VideoFrame]:
    """The frames of a piece in yuv420p at `size` (height, width), one for each frame of the source."""
    stream = clip.streams.video[0]
    share, x, y = piece["crop"]
    graph = av.filter.Graph()
    steps = [
        ("crop", f"{share}*iw:{share}*ih:{x}*(iw-ow):{y}*(ih-oh)"),
        ("scale", f"{size[1]}:{size[0]}"),
        *([("hflip", None)] if piece["mirrored"] else []),
        ("hue", f"h={piece['hue']}:s={piece['saturation']}"),
        ("format", "yuv420p"),
        ("buffersink", None),
    ]
    nodes = [graph.add_buffer(template=stream), *(graph.add(name, text) for name, text in steps)]
    graph.link_nodes(*nodes).configure()
    clip.seek(round(piece["start"] / stream.time_base), stream=stream)
    stream.codec_context.flush_buffers()
    for frame in clip.decode(stream):
        if frame.time < piece["start"]:
            continue
        if frame.time >= piece["start"] + piece["seconds"]:
            return
        graph.push(frame)
        yield graph.pull()


def _repeat(source: Path, path: Path, times: int) -> None:
    """Write a film `times` over, packet by packet, without coding anything again."""
    part = path.with_name(f".{os.getpid()}.{path.name}")
    with av.open(str(part), "w", format="mp4") as whole:
        output = None
        for turn in range(times):
            with av.open(str(source)) as once:
                stream = once.streams.video[0]
                output = output or whole.add_stream_from_template(stream)
                for packet in once.demux(stream):
                    if packet.dts is None:
                        continue
                    packet.pts += turn * stream.duration
                    packet.dts += turn * stream.duration
                    packet.stream = output
                    whole.mux(packet)
    record = json.loads(source.with_suffix(".json").read_text())
    pieces, length = record["pieces"], LONGEST
    record["pieces"] = [{**p, "time": p["time"] + turn * length} for turn in range(times) for p in pieces]
    path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    os.replace(part, path)


def _progress() -> Progress:
    share = TextColumn("{task.percentage:.0f} %")
    columns = (TextColumn("{task.description}"), BarColumn(), share, TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for seconds, bframes, size in FILMS:
        path = film(seconds, bframes, size)
        print(f"{path.name:28} {path.stat().st_size / 1e6:6.1f} MB  {path.relative_to(ROOT)}")


if __name__ == "__main__":
    run(main)
