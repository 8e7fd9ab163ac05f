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
from keye.model.attention import varlen
from keye.model.config import KeyeConfig
from keye.model.keye import KeyeForConditionalGeneration
from keye.model.vision import FramePart
from rl.losses import Gspo, LossInput
from rl.policy.prefix import PrefixTree
from rl.policy.scoring import row_scores
from rl.rollout.attention import SharedPrompts, shared_attention
from rl.rollout.cache import PromptBlock
from scripts.bench.gpu.simulated.device import SimulatedGPU
from stages.distributed.activation_memory import apply_memory_options

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
    with torch.no_grad():
        made(**batch(2, grids_on_host=True))


def packed_documents() -> None:
    inputs = batch()
    del inputs["attention_mask"]
    inputs["shift_labels"] = inputs.pop("labels")
    made, bounds = model(), torch.tensor([0, 1, len(IDS) + 1])
    with torch.no_grad():
        made(**inputs, cu_seqlens=bounds)
    apply_memory_options(made, checkpointing=True, offload=True, mlp_tiles=2)
    made(**inputs, cu_seqlens=bounds.to(GPU.device)).loss.backward()


def another_mixer() -> None:
    model(mixer="hyperzzw")(**batch()).loss.backward()


def motion_pathway() -> None:
    made = model(motion={"size": 16, "blocks": [1]})
    made(**batch(), video_blocks=blocks().to(GPU.device)).loss.backward()
    with torch.no_grad():
        made(**batch(), video_blocks=blocks())


def tower_features() -> None:
    made, inputs = model().eval(), batch()
    pixels = inputs["pixel_values_videos"], inputs["video_grid_thw"]
    found = made.get_video_features(*pixels, output_hidden_states=True, output_attentions=True)
    assert all(x.device == GPU.device for x in (*found.pooler_output, *found.hidden_states, *found.attentions))


def parts_of_frames() -> None:
    part = FramePart(torch.zeros(16, 3, 14, 14, dtype=torch.uint8, device=GPU.device), 4, 4, 0, 16, whole)
    made = model()
    made.encode_vision(None, None, [part]).float().sum().backward()


def whole(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool) -> Tensor:
    """The attention of a part that is the complete frame."""
    assert cu_seqlens.tolist() == [0, len(q)]
    return varlen(q, k, v, cu_seqlens, causal)


def policy_update() -> None:
    made, tree = model(), PrefixTree([4, 3], [[2, 5], [1, 3]])
    ids = torch.arange(3, 3 + tree.length)[None].to(GPU.device)
    log_probs, _ = made(
        input_ids=ids,
        position_ids=torch.arange(tree.length).expand(3, 1, -1).to(GPU.device),
        cu_seqlens=tree.cu_seqlens().to(GPU.device),
        varlen=tree.attention,
        logits_to_keep=tree.predictors().to(GPU.device),
        row_targets=torch.full((11,), 7).to(GPU.device),
        row_scores=row_scores(made, 1.0),
    ).scores
    owner, advantages = tree.owner().to(GPU.device), torch.ones(4, device=GPU.device)
    Gspo()(LossInput(log_probs, log_probs.detach(), owner, advantages, 4, 11)).loss.backward()


def sampled_answers() -> None:
    inputs = batch(labels=False)
    found = model().eval().generate(**inputs, max_new_tokens=2, do_sample=True, num_return_sequences=2)
    assert found.device == GPU.device and found.shape == (2, inputs["input_ids"].shape[1] + 2)


def shared_prompts() -> None:
    prompts = PromptBlock([0, 1], [7, 3], [(torch.empty(2, 2, 7, 16, device=GPU.device),) * 2])
    members = prompts.members({0: [2, 0], 1: [1]}, GPU.device)
    own = torch.empty(3, 2, 4, 16, device=GPU.device)
    ends = torch.zeros(3, 4, dtype=torch.bool, device=GPU.device)
    GPU.waits.clear()
    for _ in range(2):  # layers
        blocks = [SharedPrompts(members, *prompts.layers[0])]
        assert shared_attention(torch.empty(3, 4, 16, device=GPU.device), own, own, ends, blocks).shape == (3, 4, 16)
    assert not GPU.waits, GPU.waits


PATHS: tuple[Callable[[], None], ...] = (
    padded_rows, packed_documents, another_mixer, motion_pathway, tower_features, parts_of_frames, policy_update,
    sampled_answers, shared_prompts,
)  # fmt: skip


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
