"""VideoPlan: everything that was decided about one video, carried through training, RL and evaluation."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from keye.errors import VideoError
from keye.slowfast.budget import size_tokens
from keye.slowfast.pathways import SLOW


@dataclass(frozen=True, eq=False)
class VideoPlan:
    """What each of a clip's T sampled frames is and costs. Two plans are equal when their JSON is.

    source: the clip's name (its path, when it has one).
    frame_types: LongTensor [T], 0 slow, 1 fast. timestamps: FloatTensor [T], seconds from the start of the stream.
    frame_indices: LongTensor [T], among the source's frames in presentation order.
    similarity: FloatTensor [T] in [0, 1], with the latest slow frame before it; NaN for the first.
    source_size: (height, width) in pixels after rotation. slow_size, fast_size: (height, width), multiples of 28.
    max_tokens: the budget. duration: seconds. settings: the encoder's. warnings: sentences on what is not as asked.
    """

    source: str
    frame_types: torch.Tensor
    timestamps: torch.Tensor
    frame_indices: torch.Tensor
    similarity: torch.Tensor
    source_size: tuple[int, int]
    slow_size: tuple[int, int]
    fast_size: tuple[int, int]
    max_tokens: int
    duration: float
    settings: dict
    warnings: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.frame_types)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VideoPlan) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(self.to_json())

    @property
    def tokens(self) -> int:
        """Visual tokens the language model will see; never above `max_tokens`."""
        slow = int((self.frame_types == SLOW).sum())
        return slow * size_tokens(self.slow_size) + (len(self) - slow) * size_tokens(self.fast_size)

    @property
    def tokens_per_frame(self) -> torch.Tensor:
        """LongTensor [T]."""
        return torch.where(self.frame_types == SLOW, size_tokens(self.slow_size), size_tokens(self.fast_size))

    @property
    def frame_sizes(self) -> list[tuple[int, int]]:
        """(height, width) in pixels of every frame."""
        return [self.slow_size if kind == SLOW else self.fast_size for kind in self.frame_types.tolist()]

    @property
    def slow_share(self) -> float:
        """Share of the frames that are slow."""
        return float((self.frame_types == SLOW).float().mean())

    def to_dict(self) -> dict:
        """Plain JSON values; float32 values as the shortest text that reads back the same, NaN as None."""
        return {
            "source": self.source,
            "frame_types": self.frame_types.tolist(),
            "timestamps": self.timestamps.tolist(),
            "frame_indices": self.frame_indices.tolist(),
            "similarity": [None if math.isnan(score) else score for score in self.similarity.tolist()],
            "source_size": list(self.source_size),
            "slow_size": list(self.slow_size),
            "fast_size": list(self.fast_size),
            "max_tokens": self.max_tokens,
            "duration": self.duration,
            "settings": self.settings,
            "warnings": list(self.warnings),
        }

    @classmethod
    def from_dict(cls, values: dict) -> "VideoPlan":
        """The plan of `to_dict`; a missing or unknown key is a VideoError."""
        if set(values) != set(cls.__dataclass_fields__):
            wrong = ", ".join(sorted(set(values) ^ set(cls.__dataclass_fields__)))
            raise VideoError(f"this is not a video plan: the keys {wrong} are missing or unknown; make the plan again")
        similarity = [math.nan if score is None else score for score in values["similarity"]]
        return cls(
            **{
                **values,
                "frame_types": torch.tensor(values["frame_types"], dtype=torch.long),
                "timestamps": torch.tensor(values["timestamps"], dtype=torch.float32),
                "frame_indices": torch.tensor(values["frame_indices"], dtype=torch.long),
                "similarity": torch.tensor(similarity, dtype=torch.float32),
                "source_size": tuple(values["source_size"]),
                "slow_size": tuple(values["slow_size"]),
                "fast_size": tuple(values["fast_size"]),
                "warnings": tuple(values["warnings"]),
            }
        )

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), allow_nan=False, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "VideoPlan":
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise VideoError(f"this is not a video plan ({error}); make the plan again") from error
        if not isinstance(values, dict):
            raise VideoError("this is not a video plan but another kind of JSON; make the plan again")
        return cls.from_dict(values)

    def save(self, path: str | os.PathLike) -> None:
        """Write the plan as JSON."""
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike) -> "VideoPlan":
        """Read a plan that `save` wrote; VideoError if there is none or it is not one."""
        if not Path(path).is_file():
            raise VideoError(f"{path} does not exist; check the path")
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise VideoError(f"{path} is not a video plan but binary; make the plan again") from error

    def plot(self, path: str | os.PathLike, frames: Sequence[torch.Tensor] | torch.Tensor | None = None) -> None:
        """Draw the plan into a PNG, PDF or SVG: filmstrip, slow and fast lanes, similarity curve.

        frames: T pictures uint8 [3, h, w] for the filmstrip; by default they are read again from `source`, and the
        strip is left out when that is no longer there (bytes, arrays).
        """
        from keye.slowfast.figures import draw_plan

        draw_plan(self, path, frames)

    def summary(self) -> str:
        """A short table in plain text."""
        slow = int((self.frame_types == SLOW).sum())
        fast = len(self) - slow

        def size(pixels: tuple[int, int]) -> str:
            return f"{pixels[1]}x{pixels[0]}"

        all_slow = len(self) * size_tokens(self.slow_size)
        rows = [
            ("source", f"{self.source}  {size(self.source_size)}, {self.duration:.2f} s"),
            ("slow", f"{slow} frames of {size(self.slow_size)}, {size_tokens(self.slow_size)} tokens each"),
            ("fast", f"{fast} frames of {size(self.fast_size)}, {size_tokens(self.fast_size)} tokens each"),
            ("tokens", f"{self.tokens} of {self.max_tokens}; all slow it would be {all_slow}"),
            *(("warning", text) for text in self.warnings),
        ]
        return "\n".join(f"{name:<8}{text}" for name, text in rows)

    def frame_table(self) -> str:
        """A line per frame in plain text: time, index, type, similarity, size, tokens."""
        lines = ["   time  frame  type  similarity       size  tokens"]
        columns = (self.timestamps, self.frame_indices, self.frame_types, self.similarity, self.tokens_per_frame)
        for (time, index, kind, score, tokens), (height, width) in zip(
            zip(*(column.tolist() for column in columns), strict=True), self.frame_sizes, strict=True
        ):
            name = "slow" if kind == SLOW else "fast"
            shown = "-" if math.isnan(score) else f"{score:.3f}"
            lines.append(f"{time:7.2f}  {index:5d}  {name}  {shown:>10}  {f'{width}x{height}':>9}  {tokens:6d}")
        return "\n".join(lines)
