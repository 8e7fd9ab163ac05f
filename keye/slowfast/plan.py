"""VideoPlan: the decisions about one video, carried through training, RL and evaluation."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from keye.errors import VideoError, writing
from keye.slowfast.budget import SIDE, size_tokens
from keye.slowfast.plan_checks import check_values
from keye.slowfast.policies import FAST, SLOW


@dataclass(frozen=True, eq=False, repr=False)
class VideoPlan:
    """Type, time, size and tokens of a clip's T sampled frames. Two plans are equal when their JSON is.

    Entries are in the order in which the model reads them. Under the policy two_stream a frame may have two entries,
    slow and then fast, with the same time and index. Frames that the model does not read have no entry.

    source: the clip's name (its path, if it has one).
    frame_types: LongTensor [T], 0 slow, 1 fast. timestamps: FloatTensor [T], seconds on the container's clock.
    frame_indices: LongTensor [T], position among the source's frames in presentation order.
    similarity: FloatTensor [T] in [0, 1], with the latest frame before that the policy made slow; NaN for the first.
    source_size: (height, width) in pixels as displayed. slow_size, fast_size: (height, width), multiples of `side`.
    max_tokens: the budget. duration: end of the last frame in seconds. settings: the encoder's.
    warnings: sentences about what differs from the request.
    levels: LongTensor [T], each entry's place in `sizes`, where frames of one type differ in size (policy ladder);
    `slow_size` and `fast_size` are then the largest. None under other policies.
    end: the end of `span` in seconds, where sampled frames have no entry. Else None.
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
    sizes: tuple[tuple[int, int], ...] = ()
    levels: torch.Tensor | None = None
    end: float | None = None

    def __len__(self) -> int:
        return len(self.frame_types)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VideoPlan) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(self.to_json())

    def __repr__(self) -> str:
        from keye.visualize.notebook import one_line

        return f"VideoPlan({one_line(self)})"

    def _repr_html_(self) -> str:
        """Filmstrip and summary, for notebooks."""
        from keye.visualize.notebook import plan_html

        return plan_html(self)

    @property
    def side(self) -> int:
        """Pixels along one side of a token: the encoder's `token_side`, 28 by default."""
        return self.settings.get("token_side", SIDE)

    @property
    def slow_tokens(self) -> int:
        """Tokens of one slow frame, the largest."""
        return size_tokens(self.slow_size, self.side)

    @property
    def fast_tokens(self) -> int:
        """Tokens of one fast frame, the largest."""
        return size_tokens(self.fast_size, self.side)

    @property
    def counts(self) -> tuple[int, int]:
        """Numbers of (slow, fast) entries."""
        slow = int((self.frame_types == SLOW).sum())
        return slow, len(self) - slow

    @property
    def tokens(self) -> int:
        """Visual tokens of the video; never above `max_tokens`."""
        return int(self.tokens_per_frame.sum())

    @property
    def tokens_per_frame(self) -> torch.Tensor:
        """LongTensor [T]: tokens of each entry."""
        if self.levels is not None:
            return torch.tensor([size_tokens(size, self.side) for size in self.sizes])[self.levels]
        return torch.where(self.frame_types == SLOW, self.slow_tokens, self.fast_tokens)

    @property
    def all_slow_tokens(self) -> int:
        """Tokens of the same frames if each had one entry and were slow."""
        return len(self.frame_indices.unique()) * self.slow_tokens

    @property
    def saved(self) -> float:
        """Fraction of `all_slow_tokens` that is not spent."""
        return 1 - self.tokens / self.all_slow_tokens

    @property
    def frame_ends(self) -> torch.Tensor:
        """FloatTensor [T], seconds: when the next frame replaces each; the last one's is the end of `span`."""
        times = torch.cat([self.timestamps.unique(), self.timestamps.new_tensor([self.span[1]])])
        return times[torch.searchsorted(times[:-1], self.timestamps, right=True)]

    @property
    def span(self) -> tuple[float, float]:
        """(start, end) in seconds of the clip, or of the part of it that was sampled."""
        first, last = span_of(self.timestamps.unique().tolist(), self.duration, self.settings.get("fps", 1.0))
        return first, last if self.end is None else self.end

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of `span`."""
        start, end = self.span
        return self.tokens / (end - start)

    @property
    def frame_sizes(self) -> list[tuple[int, int]]:
        """(height, width) in pixels of every entry."""
        if self.levels is not None:
            return [self.sizes[level] for level in self.levels.tolist()]
        return [self.slow_size if kind == SLOW else self.fast_size for kind in self.frame_types.tolist()]

    @property
    def slow_share(self) -> float:
        """Fraction of the entries that are slow."""
        return float((self.frame_types == SLOW).float().mean())

    def with_warnings(self, warnings: Sequence[str]) -> "VideoPlan":
        """The plan with those of the warnings that it does not have yet."""
        new = [text for text in warnings if text not in self.warnings]
        return replace(self, warnings=(*self.warnings, *new)) if new else self

    def to_dict(self) -> dict:
        """Plain JSON values; float32 values as floats that read back the same, NaN as None."""
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
            **({} if self.end is None else {"end": self.end}),
            **({} if self.levels is None else {"sizes": list(map(list, self.sizes)), "levels": self.levels.tolist()}),
        }

    @classmethod
    def from_dict(cls, values: dict) -> "VideoPlan":
        """The plan of `to_dict`; VideoError names the key that is missing, unknown or impossible."""
        check_values(values, set(cls.__dataclass_fields__), optional=(("sizes", "levels"), ("end",)))
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
                "sizes": tuple(map(tuple, values.get("sizes", ()))),
                "levels": torch.tensor(values["levels"], dtype=torch.long) if "levels" in values else None,
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
        return cls.from_dict(values)

    def save(self, path: str | os.PathLike) -> None:
        """Write the plan as JSON; VideoError where that fails."""
        with writing(path, "the plan", VideoError):
            Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike) -> "VideoPlan":
        """Read a plan that `save` wrote; VideoError if the file is missing or not a plan."""
        if not Path(path).is_file():
            raise VideoError(f"{path} does not exist; check the path")
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except VideoError as error:
            raise VideoError(f"{path}: {error}") from error
        except UnicodeDecodeError as error:
            raise VideoError(f"{path} is a binary file, not a video plan; make the plan again") from error

    def plot(self, path: str | os.PathLike, frames: Sequence[torch.Tensor] | torch.Tensor | None = None) -> None:
        """Draw filmstrip, tokens per frame and per second, and similarity into a PNG, PDF or SVG.

        Args:
            path: the file; its suffix gives the format.
            frames: T pictures uint8 [3, h, w] for the filmstrip. By default they are read again from `source`; there is
                no filmstrip where it does not exist (bytes, arrays).

        Raises:
            VideoError: the file cannot be written, or the number of pictures is not T.
        """
        from keye.visualize.figures import draw_plan

        draw_plan(self, path, frames)

    def to_html(
        self,
        path: str | os.PathLike | None = None,
        frames: Sequence[torch.Tensor] | torch.Tensor | None = None,
    ) -> str:
        """The plan as one self-contained HTML page, written to `path` if given; frames as in `plot`.

        The page has a timeline to step through by mouse, touch or arrow keys, a table of all frames, settings and
        warnings. Its pictures take at most about 2 MB.

        Raises:
            VideoError: the file cannot be written, or the number of pictures is not T.
        """
        from keye.visualize.page import plan_page

        text = plan_page(self, frames)
        if path is not None:
            with writing(path, "the page", VideoError):
                Path(path).write_text(text, encoding="utf-8")
        return text

    def summary(self) -> str:
        """A short table in plain text."""
        return "\n".join(f"{name:<8}{text}" for name, text in self.facts())

    def facts(self) -> list[tuple[str, str]]:
        """(label, value) rows of `summary`."""
        slow, fast = self.counts

        def size(pixels: tuple[int, int]) -> str:
            return f"{pixels[1]}x{pixels[0]}"

        kinds = (("slow", SLOW, slow, self.slow_size), ("fast", FAST, fast, self.fast_size))
        return [
            ("source", f"{self.source}  {size(self.source_size)}, {self.duration:.2f} s"),
            *(
                (name, f"{count} frame{'s' * (count != 1)} of {self._sized(size(pixels))}, {self.tokens_each(kind)}")
                for name, kind, count, pixels in kinds
                if count
            ),
            (
                "tokens",
                f"{self.tokens} of {self.max_tokens}, {self.tokens_per_second:.0f} a second;"
                f" {self.all_slow_tokens} if all frames were slow ({self.saved:.0%} saved)",
            ),
            *(("warning", text) for text in self.warnings),
        ]

    def _sized(self, largest: str) -> str:
        return largest if self.levels is None else f"up to {largest}"

    def tokens_each(self, kind: int) -> str:
        """The tokens of the frames of a type (0 slow, 1 fast) as text: "85 tokens each", or "48 to 720 tokens"."""
        tokens = self.slow_tokens if kind == SLOW else self.fast_tokens
        of_kind = self.tokens_per_frame[self.frame_types == kind]
        least = int(of_kind.min()) if len(of_kind) else tokens
        return f"{tokens} tokens each" if least == tokens else f"{least} to {tokens} tokens"

    def frame_rows(self) -> list[tuple[str, str, str, str, str, str]]:
        """(time, index, type, similarity, size, tokens) of every entry as text."""
        columns = (self.timestamps, self.frame_indices, self.frame_types, self.similarity, self.tokens_per_frame)
        return [
            (
                f"{time:.2f}",
                str(index),
                "slow" if kind == SLOW else "fast",
                "-" if math.isnan(score) else f"{score:.3f}",
                f"{width}x{height}",
                str(tokens),
            )
            for (time, index, kind, score, tokens), (height, width) in zip(
                zip(*(column.tolist() for column in columns), strict=True), self.frame_sizes, strict=True
            )
        ]

    def frame_table(self) -> str:
        """One line per entry in plain text: time, index, type, similarity, size, tokens."""
        lines = ["   time  frame  type  similarity       size  tokens"]
        for time, index, kind, score, size, tokens in self.frame_rows():
            lines.append(f"{time:>7}  {index:>5}  {kind}  {score:>10}  {size:>9}  {tokens:>6}")
        return "\n".join(lines)


def span_of(times: Sequence[float], duration: float, fps: float) -> tuple[float, float]:
    """(start, end) in seconds of a clip, or of the part of it that was sampled at distinct ascending `times`."""
    if len(times) < 2:
        last = times[0] + 1 / fps
        return 0.0 if duration > times[0] else times[0], max(duration, last)
    gap = max(later - earlier for earlier, later in zip(times, times[1:], strict=False))
    first, last = times[0] if times[0] > gap else 0.0, times[-1] + gap
    return first, duration if times[-1] < duration <= last + gap else last
