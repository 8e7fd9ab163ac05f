"""Every path of the model keeps its tensors on one device. There is no GPU: `device_paths` uses the simulated one."""

import subprocess
import sys

import pytest
import torch

from keye.model.config import KeyeConfig
from keye.model.keye import KeyeForConditionalGeneration
from scripts.bench.common.record import ROOT


def test_no_path_mixes_tensors_of_two_devices() -> None:
    command = [sys.executable, "-m", "tests.keye.model.device_paths"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert not done.returncode, f"{done.stdout}\n{done.stderr[-5000:]}"


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.float32])
def test_ids_labels_and_grids_of_another_type_give_the_same_result(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = KeyeConfig.preset("tiny", vocab_size=300, num_hidden_layers=1)
    config.image_token_id, config.video_token_id = 1, 2
    model = KeyeForConditionalGeneration(config).eval()
    grids = torch.tensor([[1, 2, 4], [1, 4, 6], [1, 2, 4]])
    ids = torch.tensor([[5, *[2] * 2, 7, *[2] * 6, 8, *[2] * 2, 9]])
    pixels = {"pixel_values_videos": torch.randint(0, 256, (40, 3, 14, 14), dtype=torch.uint8)}
    results = []
    for kind in (torch.long, dtype):
        given = ids.to(torch.int32 if kind == torch.int32 else torch.long)
        inputs = {"input_ids": given, "video_grid_thw": grids.to(kind), **pixels}
        with torch.no_grad():
            output = model(**inputs, labels=inputs["input_ids"])
            tokens = model.generate(**inputs, max_new_tokens=2, do_sample=False)
        features = torch.cat(model.get_video_features(pixels["pixel_values_videos"], grids.to(kind)).pooler_output)
        results.append((output.loss, output.logits, tokens, features))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
