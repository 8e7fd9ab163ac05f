"""Makes one archive of what the parts of `scripts.bench.gpu` need on a machine with a GPU and without a network.

The machine has torch, transformers and triton, pytest and the usual scientific packages. The archive holds wheels of
the packages that it lacks, DeepSpeed without compiled operators, the code with its tests, real clips, and their decoded
slow-fast plans. The world of part h is not in it: it is drawn there from its seed. `run.sh` installs and starts the
parts.
"""

import argparse
import hashlib
import importlib.metadata
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from keye.errors import KeyeError, run
from keye.files import atomic_file
from scripts.bench.common.record import ROOT
from scripts.bench.gpu.journal import PLANS, say
from scripts.bench.gpu.plans import make

LIMIT = 60 << 20  # bytes of an archive
LARGE = 3 << 20  # bytes of a wheel that is compressed again
PACKAGES = (
    "av", "datasets", "dill", "multiprocess", "hjson", "pydantic", "pydantic-core", "typing-inspection",
    "annotated-types",
)  # fmt: skip
"""What a machine with the usual packages lacks; each in the version that is installed here."""
WHEELS = ROOT / ".cache" / "bench" / "gpu_wheels"
TREES = ("keye", "stages", "rl", "scripts", "tests")
FILES = ("pyproject.toml", "LICENSE")
EXAMPLES = """examples:
  python -m scripts.bench.gpu.pack --out gpu.tar                  for Python 3.12 on Linux x86_64
  python -m scripts.bench.gpu.pack --out gpu.tar --python 3.11    for another Python
  python -m scripts.bench.gpu.pack --out gpu.tar --leave-out code plans   for a machine that has a checkout

On the machine:
  tar -xf gpu.tar && bash gpu/run.sh results "a b c"              the parts; the same command continues
  bash gpu/run.sh results "a b c" --within 570                    what the time suffices for
  bash gpu/run.sh results "a" --small --device cpu                the same code on small shapes
  CODE=. bash gpu/run.sh results "a b c"                          the code of a checkout
"""
RUN = """#!/usr/bin/env bash
# run.sh RESULTS "PARTS" [options of python -m scripts.bench.gpu]: installs the wheels beside this file, then runs the
# parts one after the other. RESULTS has one file, results.tar: records, rows, logs and the document. It is kept up to
# date while parts run, and a call on another machine that finds it there continues.
# CODE: a checkout to run instead of the code beside this file. PYTHON: the interpreter (python3).
set -u
began=$(date +%s)
[ $# -gt 0 ] || { sed -n 2,6p "$0"; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
code=$(cd "${CODE:-$here/code}" && pwd) || exit 2
mkdir -p "$1" && results=$(cd "$1" && pwd) || exit 2
parts=${2:-a b c d e f g h}
shift $(($# < 2 ? $# : 2))
python=${PYTHON:-python3}
if [ ! -e "$here/site/installed" ]; then
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$here/site" \\
    "$here"/wheels/*.whl && touch "$here/site/installed" || exit 2
fi
mkdir -p "$code/.cache" && cp -ru "$here/cache/." "$code/.cache/" || exit 2
if [ -e "$results/results.tar" ] && [ ! -e "$here/results" ]; then
  mkdir "$here/results" && tar -xf "$results/results.tar" -C "$here/results" || exit 2
fi
export PYTHONPATH="$code:$here/site" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
cd "$code" || exit 2
exec "$python" -m scripts.bench.gpu --part $parts --out "$here/results/gpu" --bundle "$results/results.tar" \\
  --since "$began" "$@"
"""


def wheels(folder: Path, python: str) -> list[str]:
    """Download the wheels for a version of Python on Linux x86_64, and build DeepSpeed's.

    Returns:
        Sentences about what is missing.

    Raises:
        KeyeError: a wheel cannot be downloaded.
    """
    pinned = [f"{name}=={importlib.metadata.version(name)}" for name in PACKAGES]
    platforms = [word for n in (28, 27, 24, 17) for word in ("--platform", f"manylinux_2_{n}_x86_64")]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", python, "--implementation", "cp", *platforms]
    command += ["--platform", "manylinux2014_x86_64", "--dest", str(folder), *pinned]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise KeyeError(f"pip could not download the wheels ({last_line(done.stderr)}); check the network")
    version = importlib.metadata.version("deepspeed")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    environment = {**os.environ, "DS_BUILD_OPS": "0", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [*build, str(folder), f"deepspeed=={version}"], capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode:
        return [f"without deepspeed ({last_line(done.stderr)}): the parts d, e, g and h will fail and say so"]
    for wheel in folder.glob("deepspeed-*.whl"):  # no compiled operator is in it: it runs on any Python 3
        wheel.rename(wheel.with_name(f"deepspeed-{version}-py3-none-any.whl"))
    return []


def smaller(wheel: Path, folder: Path) -> Path:
    """The wheel compressed with LZMA, which pip reads, made once into a folder of its digest in `folder`.

    It takes a minute for the video libraries and saves a quarter of them. A small wheel is returned as it is.
    """
    if wheel.stat().st_size < LARGE:
        return wheel
    with wheel.open("rb") as file:
        made = folder / hashlib.file_digest(file, "sha256").hexdigest()[:16] / wheel.name
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        say(f"compressing {wheel.name}; a minute or two, once")
        with atomic_file(made) as part, zipfile.ZipFile(wheel) as source, zipfile.ZipFile(part, "w") as target:
            for entry in source.infolist():
                copy = zipfile.ZipInfo(entry.filename, entry.date_time)
                copy.external_attr = entry.external_attr
                target.writestr(copy, source.read(entry), zipfile.ZIP_LZMA)
    return made


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[-1][:200]


def checkout(*within: str) -> list[Path]:
    """The files of the repository in these files and folders, tracked or new, that git does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *within]
    done = subprocess.run(command, capture_output=True, check=False, cwd=ROOT)
    if done.returncode:
        raise KeyeError(f"{ROOT} is not a git checkout ({last_line(done.stderr.decode())}); pack from one")
    return [path for name in done.stdout.decode().split("\0") if name and (path := ROOT / name).is_file()]


def sections(scratch: Path, python: str, clips: list[Path]) -> tuple[dict[str, list[tuple[Path, str]]], list[str]]:
    """Section → files with their names in the archive, and sentences about what is missing."""
    built = scratch / "wheels"
    built.mkdir()
    missing = wheels(built, python)
    script = scratch / "run.sh"
    script.write_text(RUN, encoding="utf-8")
    script.chmod(0o755)
    plans = make(PLANS, clips)
    found = {
        "wheels": [(smaller(path, WHEELS), f"wheels/{path.name}") for path in sorted(built.glob("*.whl"))],
        "code": [(path, f"code/{path.relative_to(ROOT)}") for path in checkout(*TREES, *FILES)],
        "clips": [(path, f"cache/clips/{path.name}") for path in clips],
        "plans": [(path, f"cache/bench/gpu_plans/{path.name}") for path in plans],
        "script": [(script, "run.sh")],
    }
    return found, missing


def write(out: Path, found: dict[str, list[tuple[Path, str]]], missing: list[str]) -> dict[str, int]:
    """Write the archive; section → bytes.

    Raises:
        KeyeError: the archive is larger than it may be; it is removed.
    """
    sizes = {name: sum(path.stat().st_size for path, _ in files) for name, files in found.items()}
    with tempfile.TemporaryDirectory() as scratch:
        listing = Path(scratch) / "CONTENTS.txt"
        lines = [f"{path.stat().st_size:>10}  {name}" for files in found.values() for path, name in files]
        listing.write_text("\n".join([*missing, *lines]) + "\n", encoding="utf-8")
        with tarfile.open(out, "w") as archive:
            for path, name in [*(one for files in found.values() for one in files), (listing, "CONTENTS.txt")]:
                archive.add(path, f"gpu/{name}", filter=anonymous)
    total = out.stat().st_size
    if total > LIMIT:
        out.unlink()
        largest = max(sizes, key=lambda name: sizes[name])
        raise KeyeError(f"the archive would have {total >> 20} MiB, above {LIMIT >> 20}; most of it is {largest}")
    return sizes


def anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """An entry without the name of the user."""
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = "root"
    return entry


def main() -> int:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=layout)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the archive, a .tar")
    parser.add_argument("--python", default="3.12", metavar="VERSION", help="of the machine with the GPU (3.12)")
    parser.add_argument(
        "--leave-out", nargs="*", default=[], choices=("code", "plans"),
        help="code: CODE names a checkout; plans: they are made there from the clips",
    )  # fmt: skip
    args = parser.parse_args()
    from scripts.clips import ClipsMissing, fetch_clips

    try:
        clips = fetch_clips()
    except ClipsMissing as error:
        raise KeyeError(str(error)) from error
    with tempfile.TemporaryDirectory() as scratch:
        say(f"downloading {len(PACKAGES)} wheels for Python {args.python} and building DeepSpeed's; about a minute")
        found, missing = sections(Path(scratch), args.python, clips)
        found = {name: files for name, files in found.items() if name not in args.leave_out}
        sizes = write(args.out, found, missing)
    for name, size in sizes.items():
        say(f"{name:8} {size / 2**20:6.1f} MiB  {len(found[name])} files")
    for sentence in missing:
        say(sentence)
    size, tree = args.out.stat().st_size / 2**20, sum(path.stat().st_size for path in checkout()) / 2**20
    say(f"{args.out}: {size:.1f} MiB of at most {LIMIT >> 20}; with a checkout of {tree:.1f} MiB {size + tree:.1f}")
    return 0


if __name__ == "__main__":
    run(main)
