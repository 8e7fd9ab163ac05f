"""Hugging Face's Trainer on two processes, in each of its ways to split the work, against one process.

The rows are clips and stills that are decoded during training, and a clip is half read when the programs end.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from keye import KeyeConfig, KeyeForConditionalGeneration, KeyeProcessor
from keye.processor.tokenizer import train_tokenizer
from tests.distributed import free_port
from tests.keye.model.trainer_run import ROWS, STEPS
from tests.keye.video.make import write_video

PROGRAM = "tests.keye.model.trainer_run"
TOLERANCE = 1e-4  # of losses of about 6 in fp32: sums in another order
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, its processor and the clips."""
    path = tmp_path_factory.mktemp("rows")
    tokenizer = train_tokenizer(["user assistant Which colour? red or blue 0.5"] * 3, 400)
    limits = {"min_tokens_per_frame": 4, "max_tokens_per_frame": 16, "max_tokens": 256}
    processor = KeyeProcessor(tokenizer, encoder=limits, image={"min_tokens": 4, "max_tokens": 16})
    torch.manual_seed(0)
    config = processor.configure(KeyeConfig.preset("tiny", vocab_size=len(tokenizer)))
    KeyeForConditionalGeneration(config).save_pretrained(path)
    processor.save_pretrained(path)
    random = np.random.default_rng(0)
    for index in range(ROWS):
        pictures = random.integers(0, 255, (2, 4, 4, 3), dtype=np.uint8).repeat(16, 1).repeat(16, 2)
        write_video(path / f"{index}.mp4", pictures[(np.arange(50 + 10 * (index % 3)) > 25).astype(int)])
    return path


@pytest.fixture(scope="module")
def alone(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The result of one process on the same batches: of the complete model, and of adapters."""
    out = tmp_path_factory.mktemp("alone")
    return {mode: run(folder, f"{mode}-alone", out / f"{mode}.json", 1) for mode in ("ddp", "lora")}


def run(folder: Path, mode: str, out: Path, processes: int) -> dict[str, Any]:
    """One run, which must succeed; returns what its first process wrote."""
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", str(free_port())]
    command = [sys.executable, *(torchrun if processes > 1 else []), "-m", PROGRAM, str(folder), mode, str(out)]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    for word in ("terminate called", "Fatal Python error", "Aborted", "Segmentation"):
        assert word not in done.stderr, done.stderr[-6000:]
    return {**json.loads(out.read_text()), "saved": str(out.with_suffix(""))}


@pytest.mark.parametrize(
    ("mode", "wrapped"),
    [
        ("ddp", "DistributedDataParallel"),
        ("lora", "DistributedDataParallel"),
        ("zero2", "DeepSpeedEngine"),
        ("zero3", "DeepSpeedEngine"),
        ("fsdp", "FSDPKeyeForConditionalGeneration"),
    ],
)
def test_steps_are_those_of_one_process(
    mode: str, wrapped: str, folder: Path, alone: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    expected = alone["lora" if mode == "lora" else "ddp"]
    found = run(folder, mode, tmp_path / "steps.json", 2)
    assert (found["world"], expected["world"]) == (2, 1) and found["wrapped"] == wrapped
    print(mode, found["losses"], expected["losses"])
    assert len(found["losses"]) == STEPS and found["losses"] == pytest.approx(expected["losses"], abs=TOLERANCE)
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-3)
    assert expected["losses"][-1] < expected["losses"][0]
    saved, whole = weights(found["saved"]), weights(expected["saved"])
    if mode in ("zero2", "fsdp"):  # these write the tied head a second time
        assert torch.equal(saved.pop("lm_head.weight"), saved["model.language_model.embed_tokens.weight"])
    assert saved.keys() == whole.keys()
    ours, theirs = (torch.cat([one[name].flatten() for name in whole]) for one in (saved, whole))
    error = float((ours - theirs).norm() / theirs.norm())
    print(mode, "relative error of the weights", error)
    assert error < 1e-3


def weights(folder: str) -> dict[str, torch.Tensor]:
    """The content of a model's or adapter's directory."""
    files = sorted(Path(folder).glob("*.safetensors"))
    assert files, f"nothing is saved in {folder}"
    return {name: weight.float() for path in files for name, weight in load_file(path).items()}
