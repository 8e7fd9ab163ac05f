"""The released keye-vl-utils 1.5.2, installed only for the benches, in .cache/bench/site.

What the environment has already (torch, numpy, perhaps OpenCV) is used from there. torchvision, which the release
imports and never uses, is stood in for while it is imported. Run it to see the versions.
"""

import hashlib
import importlib.util
import os
import shutil
import sys
import tempfile
import types
from pathlib import Path

from keye.errors import run
from scripts.bench.common.record import versions
from scripts.bench.encoder.media.corpus import FOLDER, call, locked

REQUIREMENTS = Path(__file__).with_name("requirements.txt")
SITE = FOLDER / "site"


def load_released() -> types.ModuleType:
    """The module with `fetch_video` and `extract_slow_fast_frames`; CorpusError when it cannot be installed."""
    _install()
    if str(SITE) not in sys.path:
        sys.path.append(str(SITE))  # last: the environment's own packages go first
    stood_in = [] if importlib.util.find_spec("torchvision") else _stand_in()
    try:
        from keye_vl_utils import vision_process
    finally:
        for name in stood_in:
            sys.modules.pop(name, None)
    return vision_process


def _install() -> None:
    """Install what requirements.txt pins, once for each version of that file and of Python, whole or not at all."""
    about = REQUIREMENTS.read_bytes() + sys.version.encode()
    stamp = hashlib.sha256(about).hexdigest()
    with locked("site"):
        if (SITE / "stamp").is_file() and (SITE / "stamp").read_text() == stamp:
            return
        print("installing keye-vl-utils 1.5.2, decord and OpenCV for the benches …", file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=FOLDER) as scratch:
            target = Path(scratch) / "site"
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target)]
            call([*command, "-r", str(REQUIREMENTS)], "installing what the encoder is compared with")
            (target / "stamp").write_text(stamp)
            shutil.rmtree(SITE, ignore_errors=True)
            os.replace(target, SITE)


def _stand_in() -> list[str]:
    """Put empty modules where the release imports torchvision from; their names, to be taken away again."""
    names = ["torchvision", "torchvision.io", "torchvision.transforms"]
    for name in names:
        sys.modules[name] = types.ModuleType(name)
    for name in names[1:]:
        setattr(sys.modules["torchvision"], name.rpartition(".")[2], sys.modules[name])
    sys.modules["torchvision.transforms"].InterpolationMode = types.SimpleNamespace()
    return names


def main() -> None:
    load_released()
    for name, version in versions().items():
        print(f"{name} {version}")


if __name__ == "__main__":
    run(main)
