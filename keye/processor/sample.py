"""What the processor returns: `Sample`, one conversation for training, and `KeyeInputs`, a batch for the model."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature

from keye.aggregation.blocks import join_blocks, whole_frames
from keye.aggregation.plans import encoded_sizes
from keye.model.placeholders import read_grids
from keye.processor.stream import IGNORED
from keye.slowfast.pixels import join, normalised
from keye.slowfast.plan import VideoPlan

PIXELS = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw", "video_blocks")


@dataclass
class Sample:
    """One conversation, ready for the model.

    input_ids, labels: LongTensor `[L]`; labels are not shifted, −100 outside the assistant's words. position_ids:
    LongTensor `[3, L]`. pixel_values, pixel_values_videos: uint8 `[N, 3, 14, 14]` (or floats of a video given as
    encoded that uint8 cannot represent), with grids `[F, 3]` of the images and of all videos' frames, in stream order.
    video_blocks: `[K, 7]`, which tokens are read of the videos' frames (`keye.aggregation`); None for all.
    plans: the plan of each video. warnings: messages about images made smaller to fit. thinned: visual tokens removed
    to fit `max_length`.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    pixel_values: Tensor | None = None
    image_grid_thw: Tensor | None = None
    pixel_values_videos: Tensor | None = None
    video_grid_thw: Tensor | None = None
    video_blocks: Tensor | None = None
    plans: list[VideoPlan] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    thinned: int = 0

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def visual_tokens(self) -> int:
        """The number of visual tokens."""
        return sum(int(sizes.prod(1).sum()) for sizes in self.read_grids if sizes is not None)

    @property
    def read_grids(self) -> tuple[Tensor | None, Tensor | None]:
        """Rows and columns `[n, 2]` of tokens of each image, and of each frame or block of the videos."""
        return read_grids(self.image_grid_thw), read_grids(self.video_grid_thw, self.video_blocks)

    @property
    def all_warnings(self) -> list[str]:
        """The warnings of its plans, then its own."""
        return [*(warning for plan in self.plans for warning in plan.warnings), *self.warnings]


def collate(
    samples: Sequence[Sample], pad_token_id: int, padding_side: str = "right", length: int | None = None
) -> dict[str, Tensor]:
    """One padded batch, see `KeyeProcessor.collate`."""
    longest = max(len(s) for s in samples)
    length, rows = max(longest, length or 0), len(samples)
    batch = {
        "input_ids": torch.full((rows, length), pad_token_id),
        "attention_mask": torch.zeros(rows, length, dtype=torch.long),
        "labels": torch.full((rows, length), IGNORED),
        "position_ids": torch.zeros(3, rows, length, dtype=torch.long),
    }
    for row, sample in enumerate(samples):
        at = slice(length - len(sample), length) if padding_side == "left" else slice(0, len(sample))
        batch["input_ids"][row, at] = sample.input_ids
        batch["attention_mask"][row, at] = 1
        batch["labels"][row, at] = sample.labels
        batch["position_ids"][:, row, at] = sample.position_ids
    if (blocks := batch_blocks(samples)) is not None:
        batch["video_blocks"] = blocks
    for name in PIXELS[:4]:
        parts = [getattr(s, name) for s in samples if getattr(s, name) is not None]
        if parts:
            batch[name] = normalised(join(parts)) if name.startswith("pixel") else torch.cat(parts)
    return batch


def batch_blocks(samples: Sequence[Sample]) -> Tensor | None:
    """`video_blocks` of several samples; None if no sample has any.

    Where only some have them, the frames of the others are read as they are.
    """
    if all(sample.video_blocks is None for sample in samples):
        return None
    videos = [sample for sample in samples if sample.video_grid_thw is not None]
    return join_blocks([whole_frames(s.read_grids[1]) if s.video_blocks is None else s.video_blocks for s in videos])


class KeyeInputs(BatchFeature):
    """Inputs for `model(**inputs)` and `generate(**inputs)`, and the plans of the videos.

    plans: the `VideoPlan`s of each row's videos, in stream order. num_frames: LongTensor `[videos]`, how many rows of
    `video_grid_thw` belong to each. warnings: of each row, of its plans and images. These are attributes, not entries,
    because `generate` refuses unknown entries.
    """

    def __init__(
        self, data: dict[str, Any] | None = None, tensor_type: str | None = None, samples: Sequence[Sample] = ()
    ) -> None:
        super().__init__(data, tensor_type)  # moving a batch to a device makes a new one of its entries only
        self.plans = [sample.plans for sample in samples]
        frames = [len(encoded_sizes(plan)) for plans in self.plans for plan in plans]
        self.num_frames = torch.tensor(frames, dtype=torch.long)
        self.warnings = [sample.all_warnings for sample in samples]

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)  # a worker process also sends the plans

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
