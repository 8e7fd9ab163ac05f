"""SlowFastEncoder, the face of the package: video → plan → patches (→ features, when it holds a vision tower)."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from keye.errors import CheckpointError, KeyeError
from keye.slowfast.budget import PATCH, allocate, fit_size, most_frames, size_tokens
from keye.slowfast.image import ImageSource, load_image
from keye.slowfast.pathways import SLOW, Policy, Walk, get_policy
from keye.slowfast.plan import VideoPlan
from keye.slowfast.similarity import Measure, get_measure, patches, resize
from keye.slowfast.video import Clip, Frame, Source, open_clip

KEPT_WHOLE = 256 << 20  # bytes of uint8 frames

Tower = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(pixel_values [N, 3, 14, 14], grid_thw [F, 3]) -> features [N / 4, hidden]"""


@dataclass(frozen=True)
class EncodedVideo:
    """A video as the model reads it.

    pixel_values: float32 [N, 3, 14, 14] in [-1, 1], frame after frame in time order, raster patch order in each.
    grid_thw: LongTensor [T, 3], a row (1, height / 14, width / 14) per frame. plan: the VideoPlan.
    features: [plan.tokens, hidden] when the encoder holds a vision tower, else None.
    """

    pixel_values: torch.Tensor
    grid_thw: torch.Tensor
    plan: VideoPlan
    features: torch.Tensor | None = None

    def pictures(self) -> list[torch.Tensor]:
        """The frames as the model sees them, uint8 [3, h, w] each."""
        frames, start = [], 0
        for _, rows, columns in self.grid_thw.tolist():
            grid = self.pixel_values[start : start + rows * columns].reshape(rows, columns, 3, PATCH, PATCH)
            start += rows * columns
            picture = grid.permute(2, 0, 3, 1, 4).reshape(3, rows * PATCH, columns * PATCH)
            frames.append(((picture + 1) * 127.5).round().clamp(0, 255).to(torch.uint8))
        return frames


class SlowFastEncoder:
    """Adaptive slow-fast video encoding (report §3.1), usable without any model.

    measure: "patch_l1", "patch_cosine", "ssim", a name you registered, or a Measure.
    threshold: a frame less similar than this to the latest slow frame is slow; None takes the measure's own.
    policy: "adaptive", "all_slow", "uniform:N", or a Policy.
    fast_ratio: tokens of a fast frame as a share of a slow one's. max_tokens: the whole video's budget, never exceeded.
    min_tokens_per_frame, max_tokens_per_frame: limits of one frame; a token is 28x28 pixels.
    fps: sampling rate. max_frames: at most so many frames, spread evenly; None takes all that the budget can hold.
    tower: (pixel_values, grid_thw) -> features, what `from_pretrained` attaches.
    """

    def __init__(
        self,
        threshold: float | None = None,
        measure: str | Measure = "patch_l1",
        policy: str | Policy = "adaptive",
        fast_ratio: float = 0.3,
        max_tokens: int = 65_536,
        min_tokens_per_frame: int = 48,
        max_tokens_per_frame: int = 768,
        fps: float = 2.0,
        max_frames: int | None = None,
        tower: Tower | None = None,
    ):
        self.measure = get_measure(measure) if isinstance(measure, str) else measure
        self.threshold = self.measure.threshold if threshold is None else threshold
        self.policy = get_policy(policy, self.threshold) if isinstance(policy, str) else policy
        self.fast_ratio = fast_ratio
        self.max_tokens = max_tokens
        self.min_tokens_per_frame, self.max_tokens_per_frame = min_tokens_per_frame, max_tokens_per_frame
        self.fps, self.max_frames = fps, max_frames
        self.tower = tower
        self._check()

    def _check(self) -> None:
        if not 0 < self.fast_ratio <= 1:
            raise KeyeError(f"fast_ratio is {self.fast_ratio}; give a share above 0 and at most 1")
        if not 1 <= self.min_tokens_per_frame <= self.max_tokens_per_frame:
            raise KeyeError(
                f"min_tokens_per_frame={self.min_tokens_per_frame} and max_tokens_per_frame={self.max_tokens_per_frame}"
                " leave no size for a frame; give 1 <= min <= max"
            )
        if self.max_tokens < self.min_tokens_per_frame:
            raise KeyeError(
                f"max_tokens={self.max_tokens} holds not one frame of min_tokens_per_frame={self.min_tokens_per_frame};"
                " raise the one or lower the other"
            )
        if not self.fps > 0:
            raise KeyeError(f"fps is {self.fps}; give a rate above 0")
        if self.max_frames is not None and self.max_frames < 1:
            raise KeyeError(f"max_frames is {self.max_frames}; give 1 or more, or none for no limit but the budget's")

    @classmethod
    def released(cls, **overrides: object) -> "SlowFastEncoder":
        """The decisions of keye-vl-utils 1.5.2: patch_cosine, 0.9, 0.3, 48–768 tokens a frame, 65,536 in all, 2 fps."""
        settings = {"measure": "patch_cosine", "threshold": 0.9, "max_tokens": 65_536}
        return cls(**{**settings, **overrides})

    @classmethod
    def report(cls, **overrides: object) -> "SlowFastEncoder":
        """The report's threshold of 0.95 and budget of 75,000; what it leaves open is as released."""
        settings = {"measure": "patch_cosine", "threshold": 0.95, "max_tokens": 75_000}
        return cls(**{**settings, **overrides})

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike) -> "SlowFastEncoder":
        """The encoder of a model directory: its settings and its vision tower, so that `features` are filled."""
        path = Path(directory) / "preprocessor_config.json"
        if not path.is_file():
            raise CheckpointError(f"{directory} holds no preprocessor_config.json; give a directory that a stage wrote")
        settings = json.loads(path.read_text(encoding="utf-8")).get("encoder")
        if not isinstance(settings, dict):
            raise CheckpointError(f'{path} has no key "encoder"; save the processor again')
        from keye.model.keye import KeyeForConditionalGeneration

        model = KeyeForConditionalGeneration.from_pretrained(directory).eval()
        return cls(**settings, tower=model.encode_vision)

    @property
    def settings(self) -> dict:
        """Plain values that build the same encoder again: `SlowFastEncoder(**encoder.settings)`."""
        return {
            "threshold": self.threshold,
            "measure": self.measure.name,
            "policy": self.policy.spec,
            "fast_ratio": self.fast_ratio,
            "max_tokens": self.max_tokens,
            "min_tokens_per_frame": self.min_tokens_per_frame,
            "max_tokens_per_frame": self.max_tokens_per_frame,
            "fps": self.fps,
            "max_frames": self.max_frames,
        }

    def plan(
        self,
        source: Source,
        *,
        timestamps: Sequence[float] | torch.Tensor | None = None,
        source_fps: float | None = None,
    ) -> VideoPlan:
        """Decide about a video without encoding it; no frame is kept. Arguments and errors: see `open_clip`."""
        with self._open(source, timestamps, source_fps) as clip:
            return self._walk(clip, None)

    def __call__(
        self,
        source: Source,
        *,
        timestamps: Sequence[float] | torch.Tensor | None = None,
        source_fps: float | None = None,
    ) -> EncodedVideo:
        """Plan and encode a video in one pass over it. Arguments and errors: see `open_clip`."""
        kept: list[torch.Tensor] = []
        with self._open(source, timestamps, source_fps) as clip:
            plan = self._walk(clip, kept)
        pixel_values, grid_thw = _encode(kept, plan.frame_sizes)
        features = None
        if self.tower is not None:
            with torch.inference_mode():
                features = self.tower(pixel_values, grid_thw)
        return EncodedVideo(pixel_values, grid_thw, plan, features)

    def image(
        self, source: ImageSource, *, max_tokens: int = 20_480, min_tokens: int = 4
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A still as (pixel_values [N, 3, 14, 14], grid_thw [1, 3]), at most 20,480 tokens by default (report)."""
        picture = load_image(source)
        return _encode([picture], [fit_size(*picture.shape[1:], min_tokens, max_tokens)])

    def _open(self, source: Source, timestamps: Sequence[float] | torch.Tensor | None, source_fps: float | None):
        limit = most_frames(self.max_tokens, self.min_tokens_per_frame)
        limit = limit if self.max_frames is None else min(limit, self.max_frames)
        return open_clip(source, self.fps, limit, timestamps=timestamps, source_fps=source_fps)

    def _walk(self, clip: Clip, kept: list[torch.Tensor] | None) -> VideoPlan:
        """Type the clip's frames as they come; with a list, keep them there, no larger than they can be needed."""
        walk = Walk(self.measure, self.policy)
        largest = self._largest_size(clip)
        indices, times, types, scores = [], [], [], []
        for batch in _batches(clip, 8):
            pixels = torch.stack([frame.pixels for frame in batch])
            batch_types, batch_scores = walk.step(pixels)
            types += batch_types
            scores += batch_scores
            indices += [frame.index for frame in batch]
            times += [frame.time for frame in batch]
            if kept is not None:
                kept += resize(pixels, largest, "bicubic").unbind()
        warnings = list(clip.warnings)
        if clip.wanted > clip.expected and clip.expected == most_frames(self.max_tokens, self.min_tokens_per_frame):
            warnings.append(
                f"{clip.expected} of {clip.wanted} frames of {clip.name} are used, spread evenly: max_tokens="
                f"{self.max_tokens} holds no more of min_tokens_per_frame={self.min_tokens_per_frame}"
            )
        slow = types.count(SLOW)
        allocation = allocate(
            *clip.size,
            slow,
            len(types) - slow,
            ratio=self.fast_ratio,
            min_tokens=self.min_tokens_per_frame,
            max_tokens_per_frame=self.max_tokens_per_frame,
            max_tokens=self.max_tokens,
        )
        return VideoPlan(
            source=clip.name,
            frame_types=torch.tensor(types, dtype=torch.long),
            timestamps=torch.tensor(times, dtype=torch.float32),
            frame_indices=torch.tensor(indices, dtype=torch.long),
            similarity=torch.tensor(scores, dtype=torch.float32),
            source_size=clip.size,
            slow_size=allocation.slow_size,
            fast_size=allocation.fast_size,
            max_tokens=self.max_tokens,
            duration=clip.duration,
            settings=self.settings,
            warnings=tuple(warnings),
        )

    def _largest_size(self, clip: Clip) -> tuple[int, int]:
        """The size to keep frames at before the budget is known, so that memory is bounded however long the clip.

        Small clips are kept as they are and resized once. Of the others no frame can end up larger than the slow size
        if all frames but one were fast.
        """
        if 3 * clip.size[0] * clip.size[1] * clip.expected <= KEPT_WHOLE:
            return clip.size
        best = allocate(
            *clip.size,
            1,
            clip.expected - 1,
            ratio=self.fast_ratio,
            min_tokens=self.min_tokens_per_frame,
            max_tokens_per_frame=self.max_tokens_per_frame,
            max_tokens=self.max_tokens,
        ).slow_size
        return best if best[0] * best[1] < clip.size[0] * clip.size[1] else clip.size


def _batches(clip: Clip, size: int) -> list[Frame]:
    batch: list[Frame] = []
    for frame in clip:
        batch.append(frame)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _encode(frames: Sequence[torch.Tensor], sizes: Sequence[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Frames uint8 [3, h, w] at their sizes (height, width) as (pixel_values [N, 3, 14, 14], grid_thw [T, 3])."""
    pixel_values = torch.empty(4 * sum(map(size_tokens, sizes)), 3, PATCH, PATCH)
    start = 0
    for frame, size in zip(frames, sizes, strict=True):
        cut = patches(resize(frame[None], size, "bicubic"), PATCH)[0]
        end = start + len(cut)
        pixel_values[start:end] = cut
        start = end
    pixel_values.div_(127.5).sub_(1)
    return pixel_values, torch.tensor([(1, height // PATCH, width // PATCH) for height, width in sizes])
