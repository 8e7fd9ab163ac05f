"""Paths of the model on the simulated GPU, where tensors of two devices cannot be mixed; run as a script.

Prints a line for every path that fails, and ends with status 1 if any does.
"""

import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from keye.aggregation.blocks import make_blocks, timed_blocks
from keye.model.config import KeyeConfig
from keye.model.keye import KeyeForConditionalGeneration
from scripts.bench.gpu.simulated.device import SimulatedGPU

GPU = SimulatedGPU()
IMAGE, VIDEO = 1, 2
# An image of 4×4 patches, and a video of two frames of 2×4 and 4×6 patches between them: sizes that are not sorted.
IDS = [5, *[IMAGE] * 4, 6, *[VIDEO] * 2, 7, *[VIDEO] * 6, 8, *[VIDEO] * 2, 9, 9]
GRIDS = {"image_grid_thw": [[1, 4, 4]], "video_grid_thw": [[1, 2, 4], [1, 4, 6], [1, 2, 4]]}


def model(**vision: Any) -> KeyeForConditionalGeneration:
    """A tiny model in bf16, made on the device."""
    config = KeyeConfig.preset("tiny", vocab_size=300, num_hidden_layers=1)
    config.vision_config.num_hidden_layers = 1
    config.image_token_id, config.video_token_id = IMAGE, VIDEO
    for name, value in vision.items():
        setattr(config.vision_config, name, value)
    with GPU.device:
        return KeyeForConditionalGeneration(config).to(torch.bfloat16).train()


def batch(rows: int = 1, grids_on_host: bool = False, labels: bool = True) -> dict[str, Tensor]:
    """Padded rows, each with the image and the video; pixels are bytes."""
    ids = torch.tensor([[0, *IDS]] * rows)
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    if labels:
        inputs["labels"] = ids.clone()
    for name, sizes in GRIDS.items():
        grids = torch.tensor(sizes * rows)
        pixels = "pixel_values" if name.startswith("image") else "pixel_values_videos"
        inputs |= {name: grids, pixels: torch.zeros(int(grids.prod(1).sum()), 3, 14, 14, dtype=torch.uint8)}
    return {name: value if grids_on_host and "grid" in name else value.to(GPU.device) for name, value in inputs.items()}


def blocks() -> Tensor:
    """Blocks of the video with times, read as they are."""
    entries = [(place, height // 2, width // 2, 0) for place, (_, height, width) in enumerate(GRIDS["video_grid_thw"])]
    return timed_blocks(make_blocks(len(entries), entries), [0, 1, 0], [0.0, 0.5, 1.0])


def padded_rows() -> None:
    made = model()
    made(**batch(2)).loss.backward()
    made(**batch(2, grids_on_host=True)).loss.backward()


def packed_documents() -> None:
    inputs = batch()
    del inputs["attention_mask"]
    inputs["shift_labels"] = inputs.pop("labels")
    made = model()
    for bounds in (torch.tensor([0, 1, len(IDS) + 1]), torch.tensor([0, 1, len(IDS) + 1]).to(GPU.device)):
        made(**inputs, cu_seqlens=bounds).loss.backward()


def another_mixer() -> None:
    model(mixer="hyperzzw")(**batch()).loss.backward()


def motion_pathway() -> None:
    made = model(motion={"size": 16, "blocks": [1]})
    for here in (blocks(), blocks().to(GPU.device)):
        made(**batch(), video_blocks=here).loss.backward()


def tower_features() -> None:
    made, inputs = model().eval(), batch()
    pixels = inputs["pixel_values_videos"], inputs["video_grid_thw"]
    found = made.get_video_features(*pixels, output_hidden_states=True, output_attentions=True)
    assert all(x.device == GPU.device for x in (*found.pooler_output, *found.hidden_states, *found.attentions))


PATHS: tuple[Callable[[], None], ...] = (padded_rows, packed_documents, another_mixer, motion_pathway, tower_features)


def main() -> None:
    failed = []
    # The device's own thread of the backward pass would not have the simulation's modes.
    with GPU, torch.autograd.set_multithreading_enabled(False):
        for path in PATHS:
            try:
                path()
            except Exception:
                failed.append(path.__name__)
                traceback.print_exc()
    print(*failed, sep="\n")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
