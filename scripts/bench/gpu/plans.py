"""Slow-fast plans of real clips, decoded: the patches, grids and seconds that the tower and the decoder get.

A file holds one plan: `pixels` uint8 [N, 3, 14, 14], `grid` int64 [T, 3], `seconds` float32 [T], `types` int64 [T]
(0 slow, 1 fast). The parts build their packs from these files, so they need no video library. The files are made once
from the clips of `scripts/clips.py`; an archive of `scripts.bench.gpu.pack` carries them compressed.
"""

import lzma
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import Tensor

from keye.errors import KeyeError
from keye.files import atomic_file
from keye.model.rope import stream_positions

MOST = 3072  # tokens of a plan: the plans of all clips fill a pack of 8,192, and an archive
STAMP = 4  # tokens of a time stamp
SUFFIX = ".safetensors.xz"
FIRST_WORD, LAST_WORD = 64, 8  # ids at the ends of the vocabulary that stand for no word


@dataclass(frozen=True)
class DecodedPlan:
    """One video as the model gets it; tensors as in the module's docstring."""

    name: str
    pixels: Tensor
    grid: Tensor
    seconds: Tensor
    types: Tensor

    @property
    def tokens(self) -> int:
        """Visual tokens."""
        return len(self.pixels) // 4

    @property
    def frames(self) -> list[tuple[int, int]]:
        """(height, width) in patches of each frame."""
        return [(height, width) for _, height, width in self.grid.tolist()]

    def save(self, path: Path) -> None:
        """Write the plan, compressed."""
        names = ("pixels", "grid", "seconds", "types")
        blob = save({name: getattr(self, name).contiguous() for name in names}, {"name": self.name})
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as part:
            part.write_bytes(lzma.compress(blob, preset=3))

    @classmethod
    def open(cls, path: Path) -> "DecodedPlan":
        """Read a plan that `save` wrote.

        Raises:
            KeyeError: the file is damaged or of another kind.
        """
        try:
            return cls(path.name.removesuffix(SUFFIX), **load(lzma.decompress(path.read_bytes())))
        except (lzma.LZMAError, ValueError, TypeError, OSError) as error:
            raise KeyeError(f"{path} holds no decoded plan ({error}); remove it, it is made again") from error


def decode(clip: Path, **settings: Any) -> DecodedPlan:
    """Plan and encode a clip with the default encoder; settings: of `EncoderConfig`."""
    from keye import SlowFastEncoder

    video = SlowFastEncoder(**{"max_tokens": MOST, **settings})(clip, dtype=torch.uint8)
    return DecodedPlan(clip.stem, video.pixel_values, video.grid_thw, video.plan.timestamps, video.plan.frame_types)


def make(folder: Path, clips: Sequence[Path]) -> list[Path]:
    """The files of the clips' plans in a folder; those that are not there are made."""
    paths = [folder / f"{clip.stem}{SUFFIX}" for clip in clips]
    for path, clip in zip(paths, clips, strict=True):
        if not path.exists():
            decode(clip).save(path)
    return paths


def plans_in(folder: Path, small: bool = False) -> list[DecodedPlan]:
    """The plans of a folder by name, made from the clips of `scripts/clips.py` if there are none.

    small: frames of at most 12 tokens, cut from the middle of the frames, for small shapes.

    Raises:
        KeyeError: there are no plans, and they cannot be made here.
    """
    paths = sorted(folder.glob(f"*{SUFFIX}"))
    if not paths:
        try:
            from scripts.clips import ClipsMissing, fetch_clips

            paths = make(folder, fetch_clips())
        except (ModuleNotFoundError, ClipsMissing) as error:
            raise KeyeError(
                f"{folder} has no decoded plans, and they cannot be made here ({error}); make them elsewhere with "
                "python -m scripts.bench.gpu.pack, and give their folder with --plans"
            ) from error
    found = [DecodedPlan.open(path) for path in paths]
    return [middle(plan) for plan in found] if small else found


def middle(plan: DecodedPlan, most: int = 6) -> DecodedPlan:
    """The plan with the middle of each frame: at most `most` patches high and wide, at an even place."""
    parts, grids = [], []
    for frame, (height, width) in zip(plan.pixels.split(plan.grid.prod(1).tolist()), plan.frames, strict=True):
        rows, columns = min(most, height), min(most, width)
        top, left = (height - rows) // 4 * 2, (width - columns) // 4 * 2
        grid = frame.unflatten(0, (height, width))
        parts.append(grid[top : top + rows, left : left + columns].flatten(0, 1))
        grids.append((1, rows, columns))
    return DecodedPlan(plan.name, torch.cat(parts), torch.tensor(grids), plan.seconds, plan.types)


def frames_of(plans: Sequence[DecodedPlan]) -> Iterator[tuple[Tensor, tuple[int, int]]]:
    """Frames of all plans in turn, without end: patches uint8 [n, 3, 14, 14] and (height, width)."""
    for plan in cycle(plans):
        yield from zip(plan.pixels.split(plan.grid.prod(1).tolist()), plan.frames, strict=True)


def document(plans: Sequence[DecodedPlan], config: Any, length: int, visual: float, seed: int) -> dict[str, Tensor]:
    """A document of `length` tokens: frames with their time stamps, at most a share `visual` of it, then text.

    The text is random, and all of it is learnt. The frames are those of the plans in order, from a plan that the seed
    chooses, and repeated where they do not suffice.

    Args:
        config: a KeyeConfig, whose vocabulary and video token are used.

    Returns:
        The fields of a `keye.processor.processor.Sample`, which needs a video library: input_ids and labels int64
        [length], position_ids int64 [3, length], and if there is a frame, pixel_values_videos uint8 [N, 3, 14, 14] and
        video_grid_thw int64 [T, 3].
    """
    draw, parts, pixels, grids, used = torch.Generator().manual_seed(seed), [], [], [], 0
    first = seed % len(plans)
    for patches, (height, width) in frames_of([*plans[first:], *plans[:first]]):
        tokens = height * width // 4
        if used + tokens + STAMP > visual * length:
            break
        parts += [words(config, STAMP, draw), torch.full((tokens,), config.video_token_id)]
        pixels.append(patches)
        grids.append((1, height, width))
        used += tokens + STAMP
    ids = torch.cat([*parts, words(config, length - used, draw)])
    grid = torch.tensor(grids, dtype=torch.long).reshape(-1, 3)
    made = {
        "input_ids": ids,
        "labels": torch.where(ids == config.video_token_id, -100, ids),
        "position_ids": stream_positions(ids, [(config.video_token_id, grid[:, 1:] // 2)] if grids else []),
    }
    return made | ({"pixel_values_videos": torch.cat(pixels), "video_grid_thw": grid} if grids else {})


def pack(documents: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Documents in one row, as `stages.data.collate.pack` joins samples, without its imports."""
    lengths = torch.tensor([0, *(len(made["input_ids"]) for made in documents)])
    row = {
        "input_ids": torch.cat([made["input_ids"] for made in documents])[None],
        "position_ids": torch.cat([made["position_ids"] for made in documents], 1)[:, None],
        "shift_labels": torch.cat([F.pad(made["labels"][1:], (0, 1), value=-100) for made in documents])[None],
        "cu_seqlens": lengths.cumsum(0).to(torch.int32),
    }
    for name in ("pixel_values_videos", "video_grid_thw"):
        if parts := [made[name] for made in documents if name in made]:
            row[name] = torch.cat(parts)
    return row


def words(config: Any, count: int, draw: torch.Generator) -> Tensor:
    """Random ids int64 [count] without those of special tokens, which are at the ends of the vocabulary."""
    return torch.randint(FIRST_WORD, config.text_config.vocab_size - LAST_WORD, (count,), generator=draw)
