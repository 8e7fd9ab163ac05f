"""The same clips coded in seven ways, for benches of what packets say; made once, in .cache/bench/encodes.

The encodes for tuning and for reporting differ in presets, quality and groups of pictures. VP9 is coded in two passes,
without which libvpx makes no alternate references; PyAV has no two passes, so that FFmpeg of the package imageio-ffmpeg
is used.
"""

import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import av

from scripts.bench.encoder.media.corpus import FOLDER, Package, locked, unpacked
from scripts.bench.encoder.media.mutations import kept_scheduling

ROWS = 240  # of an encode, at most
_FFMPEG = Package("wheel", "imageio-ffmpeg==0.8.1", "imageio_ffmpeg/binaries/", ("ffmpeg-linux-x86_64-v9.0.2",), 68)


@dataclass(frozen=True)
class Recipe:
    """How a clip is coded: encoder, its options, and the container's suffix."""

    encoder: str
    options: dict[str, str]
    suffix: str


def _x264(suffix: str = "mp4", **options: str) -> Recipe:
    return Recipe("libx264", options, suffix)


def _x265(preset: str, crf: str) -> Recipe:
    return Recipe("libx265", {"preset": preset, "crf": crf, "x265-params": "log-level=none:pools=1"}, "mp4")


def _svt(preset: str, crf: str) -> Recipe:
    return Recipe("libsvtav1", {"preset": preset, "crf": crf, "svtav1-params": "lp=1"}, "mp4")


def _vpx(crf: str, group: str) -> Recipe:
    options = {"deadline": "good", "cpu-used": "5", "crf": crf, "b:v": "0", "g": group, "auto-alt-ref": "1"}
    return Recipe("libvpx-vp9", {**options, "lag-in-frames": "25"}, "webm")


RECIPES = {
    "tuning": {
        "h264 scene cuts": _x264(preset="veryfast", crf="24", bf="2", g="250"),
        "h264 fixed groups": _x264(preset="veryfast", crf="24", bf="0", g="50", sc_threshold="0"),
        "h264 open groups": _x264("mkv", preset="veryfast", crf="24", bf="3", g="60", **{"x264-params": "open-gop=1"}),
        "h264 bit rate": _x264(preset="veryfast", b="300k", bf="2", g="100", maxrate="450k", bufsize="600k"),
        "hevc": _x265("ultrafast", "27"),
        "vp9": _vpx("34", "128"),
        "av1": _svt("11", "38"),
    },
    "held-out": {
        "h264 scene cuts": _x264(preset="faster", crf="22", bf="3", g="240"),
        "h264 fixed groups": _x264(preset="faster", crf="26", bf="2", g="48", sc_threshold="0"),
        "h264 open groups": _x264("ts", preset="faster", crf="22", bf="3", g="72", **{"x264-params": "open-gop=1"}),
        "h264 bit rate": _x264(preset="superfast", b="400k", bf="3", g="90", maxrate="600k", bufsize="800k"),
        "hevc": _x265("superfast", "25"),
        "vp9": _vpx("31", "150"),
        "av1": _svt("10", "34"),
    },
}
"""Split → name → recipe. Groups of pictures end at cuts, have a fixed length, or are open (led by B-frames)."""


def encode(source: Path, split: str, name: str, start: float, seconds: float) -> Path:
    """A part of a clip, from `start` on, coded by a recipe with at most `ROWS` rows and the times of its frames."""
    recipe = RECIPES[split][name]
    folder = FOLDER / "encodes" / split / name.replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{source.stem}.{recipe.suffix}"
    with locked(str(path)):
        if not path.is_file():
            part = path.with_name(f"part-{path.name}")
            make = _two_passes if recipe.encoder == "libvpx-vp9" else _one_pass
            make(source, part, recipe, start, seconds)
            os.replace(part, path)
    return path


def _one_pass(source: Path, target: Path, recipe: Recipe, start: float, seconds: float) -> None:
    with kept_scheduling(), av.open(str(source)) as clip, av.open(str(target), "w") as output:
        stream = clip.streams.video[0]
        coded = stream.codec_context
        made = output.add_stream(recipe.encoder, rate=stream.average_rate)
        made.height = min(ROWS, coded.height) // 2 * 2
        made.width = round(coded.width * made.height / coded.height / 2) * 2
        made.pix_fmt, made.options = "yuv420p", {"threads": "1", **recipe.options}
        made.codec_context.time_base = stream.time_base
        clip.seek(round(start / stream.time_base), stream=stream)
        for frame in clip.decode(stream):
            if frame.time < start:
                continue
            if frame.time >= start + seconds:
                break
            frame.pts -= round(start / stream.time_base)
            frame = frame.reformat(width=made.width, height=made.height, format="yuv420p")
            frame.pict_type = av.video.frame.PictureType.NONE  # the encoder's own choice
            output.mux(made.encode(frame))
        output.mux(made.encode(None))


def _two_passes(source: Path, target: Path, recipe: Recipe, start: float, seconds: float) -> None:
    (binary,) = unpacked(_FFMPEG).values()
    binary.chmod(0o755)
    options = [word for key, value in recipe.options.items() for word in (f"-{key}", value)]
    read = ["-ss", str(start), "-t", str(seconds), "-i", str(source), "-an", "-vf", f"scale=-2:'min({ROWS},ih)'"]
    with tempfile.TemporaryDirectory() as scratch:
        for number, output in ((1, ["-f", "null", "-"]), (2, [str(target)])):
            passes = ["-pass", str(number), "-passlogfile", str(Path(scratch) / "log")]
            command = [str(binary), "-v", "error", "-y", *read, "-c:v", recipe.encoder, *options, "-threads", "1"]
            subprocess.run([*command, "-fps_mode", "passthrough", *passes, *output], check=True)
