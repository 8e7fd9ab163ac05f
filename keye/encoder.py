"""SlowFastEncoder, the face of the package: video → plan → patches (→ features, when it holds a vision tower)."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import torch

from keye.checks import share, whole
from keye.encoded import (
    ChosenFrames,
    EncodedVideo,
    Options,
    Sampling,
    encode_patches,
    split_options,
)
from keye.encoder_config import EncoderConfig
from keye.errors import CheckpointError, KeyeError, VideoError
from keye.slowfast.budget import fit_size
from keye.slowfast.frame_buffer import FrameBuffer
from keye.slowfast.frame_classifier import FrameClassifier
from keye.slowfast.measures import as_measure
from keye.slowfast.pixels import Output, PixelFormat
from keye.slowfast.plan import VideoPlan
from keye.slowfast.policies import FAST, SLOW, Limits, as_policy
from keye.slowfast.resizing import resize
from keye.slowfast.threads import one_thread
from keye.video.clip import Clip, Frame, Source, open_clip
from keye.video.fetch import UrlRules
from keye.video.images import ImageSource, load_image
from keye.visualize.notebook import table_html

if TYPE_CHECKING:
    from keye.batch.workers import Results

BATCH = 64 << 20  # bytes of full-size frames that are scored and resized together

Tower = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(pixel_values [N, 3, 14, 14], grid_thw [F, 3]) -> features [N / 4, hidden]"""


@dataclass(frozen=True)
class FrameDecision:
    """What a stream decided about one frame.

    index: its place, from 0. time: seconds. frame_type: 0 slow, 1 fast. similarity: in [0, 1], with the latest slow
    frame before it; NaN for the first. size: (height, width) that it gets in a video whose budget does not bind.
    beyond_budget: whether so many frames have come that a plan of all of them would leave some out (`most_frames`); its
    decisions may then differ.
    """

    index: int
    time: float
    frame_type: int
    similarity: float
    size: tuple[int, int]
    beyond_budget: bool = False


class SlowFastEncoder:
    """Adaptive slow-fast video encoding (report §3.1), usable without any model.

    Args:
        threshold: a frame less similar than this to the latest slow frame is slow; None takes the policy object's own,
            or the measure's. One that differs from a policy object's own is an error.
        settings: the other fields of `EncoderConfig`, which documents them. `measure` and `policy` may be objects, a
            `Measure` and a `Policy`, as well as names. All are attributes of the encoder, too.
        urls: what may be downloaded; without it a URL is an error.
        tower: (pixel_values, grid_thw) -> features, what `from_pretrained` attaches.

    Raises:
        KeyeError: a setting is unknown or impossible.
    """

    def __init__(
        self,
        threshold: float | None = None,
        *,
        urls: UrlRules | None = None,
        tower: Tower | None = None,
        **settings: Any,
    ):
        if tower is not None and not callable(tower):
            raise KeyeError(f"tower is a {type(tower).__name__}; give a function of pixel_values and grid_thw")
        if urls is not None and not isinstance(urls, UrlRules):
            raise KeyeError(f"urls is {urls!r}; give UrlRules(), or None to download nothing")
        EncoderConfig.check_names(settings)
        self.measure = as_measure(settings.pop("measure", EncoderConfig.measure))
        threshold = None if threshold is None else share("threshold", threshold)
        self.policy, threshold = as_policy(settings.pop("policy", EncoderConfig.policy), threshold, self.measure)
        self.config = EncoderConfig(threshold, self.measure.name, self.policy.spec, **settings)
        self.urls, self.tower = urls, tower
        if tower is not None and hasattr(self.measure, "attach"):
            self.measure.attach(tower)

    def __setattr__(self, name: str, value: Any) -> None:
        """Settings are fixed, so that a plan never records others than it was made with."""
        if name in EncoderConfig.__dataclass_fields__ and name not in ("measure", "policy"):
            raise AttributeError(f"{name} is a setting of the encoder; use encoder.with_settings({name}=...)")
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        """The settings: `encoder.max_tokens` is `encoder.config.max_tokens`."""
        if name in EncoderConfig.__dataclass_fields__ and "config" in self.__dict__:
            return getattr(self.config, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

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
        try:
            return cls(**settings, tower=model.encode_vision)
        except KeyeError as error:
            raise CheckpointError(f'{path}, key "encoder": {error}; save the processor again') from error

    @property
    def settings(self) -> dict:
        """Plain values that build the same encoder again: `SlowFastEncoder(**encoder.settings)`."""
        return {**self.config.to_dict(), "measure": self.measure.name, "policy": self.policy.spec}

    def with_settings(self, **changes: Any) -> "SlowFastEncoder":
        """The same encoder with some settings changed and without its tower.

        Measure and policy stay the objects that they are unless they are named.
        A new measure brings its own threshold unless one is given; a new threshold replaces the policy's own.
        """
        if changes.get("measure") == self.measure.name:
            del changes["measure"]
        measure = as_measure(changes.get("measure", self.measure))
        if "threshold" in changes or "measure" in changes:
            threshold = changes.get("threshold")
            changes["threshold"] = measure.threshold if threshold is None else share("threshold", threshold)
        policy = self.policy
        if "threshold" in changes and hasattr(policy, "threshold"):
            policy = replace(policy, threshold=changes["threshold"])
        return SlowFastEncoder(**{**self.settings, "policy": policy, **changes, "measure": measure}, urls=self.urls)

    def __repr__(self) -> str:
        return f"SlowFastEncoder({', '.join(f'{name}={value!r}' for name, value in self.settings.items())})"

    def _repr_html_(self) -> str:
        """What a notebook shows: the settings."""
        tower = [] if self.tower is None else [("tower", "yes: features are filled")]
        return table_html([*((name, str(value)) for name, value in self.settings.items()), *tower])

    def plan(self, source: Source, **sampling: Unpack[Sampling]) -> VideoPlan:
        """Decide about a video without encoding it; no frame is kept. Arguments and errors: see `open_clip`."""
        with self._open(source, sampling) as clip:
            return self._walk(clip, None)[0]

    def __call__(self, source: Source, **options: Unpack[Options]) -> EncodedVideo:
        """Plan and encode a video.

        One pass over the clip; a second one where frames had to be kept too small, or not at all (a policy that sees
        the whole clip before it decides, on a large clip).

        options: how the source is read, see `open_clip`, and dtype, device, mean and std of `pixel_values`, see
        `PixelFormat`: float32 in [-1, 1] in host memory by default, torch.uint8 for bytes. A tower is given the pixels
        as they come out. Raises VideoError for what cannot be read, KeyeError for an impossible format.
        """
        output, sampling = split_options(options)
        pixel_format = PixelFormat.of(output)
        with self._chosen(source, sampling) as (plan, frames):
            sizes = plan.frame_sizes
            pixel_values, grid_thw = encode_patches(frames(sizes), sizes, self.token_side, pixel_format)
        features = None
        if self.tower is not None:
            with torch.inference_mode():
                features = self.tower(pixel_values, grid_thw)
        return EncodedVideo(pixel_values, grid_thw, plan, features, pixel_format)

    def frames(
        self,
        source: Source,
        *,
        size: int | tuple[int, int] | None = None,
        fast_size: int | tuple[int, int] | None = None,
        **options: Unpack[Options],
    ) -> ChosenFrames:
        """The frames that the plan chooses, whole, for any other model; bytes by default.

        size: (height, width) of the frames, or one number for both, such as 336 or 384: each is resized to it, whatever
        its aspect; None takes the plan's sizes. fast_size: another size for the fast ones. options: as for a call, but
        that dtype is torch.uint8 unless given.
        """
        output, sampling = split_options(options)
        pixel_format = PixelFormat.of(output, torch.uint8)
        with self._chosen(source, sampling) as (plan, frames):
            slow = plan.slow_size if size is None else _size("size", size)
            fast = (plan.fast_size if size is None else slow) if fast_size is None else _size("fast_size", fast_size)
            counts = plan.counts
            rooms = [pixel_format.empty(counts[kind], 3, *(slow, fast)[kind]) for kind in (SLOW, FAST)]
            filled = [0, 0]
            frames = frames([(slow, fast)[kind] for kind in plan.frame_types.tolist()])
            for kind, frame in zip(plan.frame_types.tolist(), frames, strict=True):
                resized = resize(frame[None], (slow, fast)[kind], "bicubic")[0]
                pixel_format.fill(rooms[kind][filled[kind]], resized)
                filled[kind] += 1
        return ChosenFrames(*rooms, plan)

    @contextmanager
    def _chosen(
        self, source: Source, sampling: "Sampling"
    ) -> Iterator[tuple[VideoPlan, Callable[[Sequence[tuple[int, int]]], Iterator[torch.Tensor]]]]:
        """The plan of a video, and a function that gives its frames uint8 [3, h, w], no smaller than the sizes asked.

        Each frame is dropped once it has been given, so that what is made of them takes its place in memory.
        """
        with self._open(source, sampling) as clip:
            buffer = FrameBuffer(self._limits(clip.size), clip.expected, self.policy)
            plan, positions = self._walk(clip, buffer)
            yield plan, lambda sizes: _entries(clip, buffer, positions, sizes)

    def stream(self, frames: Iterable[torch.Tensor | tuple[float, torch.Tensor]]) -> Iterator["FrameDecision"]:
        """Decide about live video frame by frame: a decision as each frame arrives, the memory of one slow frame.

        frames: uint8 [3, H, W], each as it is or as (seconds, frame); without seconds they are 1 / fps apart. Every
        frame is used, as of an array given to `plan`, and the types and similarities are those of that plan. A plan
        leaves out frames where there are more than `most_frames`; a stream does not know its end, so it uses them all
        and marks them `beyond_budget`. Raises KeyeError for a policy that decides only once it has seen the whole clip.
        """
        if not self.policy.online:
            raise KeyeError(
                f"policy {self.policy.spec} decides once it has seen the whole clip; stream with adaptive, all_slow,"
                " uniform or strided"
            )
        return self._stream(frames)

    def _stream(self, frames: Iterable[torch.Tensor | tuple[float, torch.Tensor]]) -> Iterator["FrameDecision"]:
        walk, sizes, first = FrameClassifier(self.measure, self.policy, remember=False), None, None
        for index, given in enumerate(frames):
            time, frame = given if isinstance(given, tuple) else (index / self.fps, given)
            frame = load_image(frame)
            if sizes is None:
                first = tuple(frame.shape[1:])
                free = self._limits(first, max_tokens=2 * self.max_tokens_per_frame)
                allocation = free.allocate(1, 1, fast_tokens=self.policy.fast_tokens)
                sizes = (allocation.slow_size, allocation.fast_size)
            elif tuple(frame.shape[1:]) != first:
                raise VideoError(
                    f"frame {index} is {frame.shape[2]}x{frame.shape[1]} pixels and the first {first[1]}x{first[0]};"
                    " give frames of one size"
                )
            (kind,), (score,) = walk.step(frame[None])
            yield FrameDecision(index, float(time), kind, score, sizes[kind], index >= self.most_frames)

    def encode_many(self, sources: Sequence[Source], **options: object) -> "Results":
        """Plan or encode many videos in worker processes; arguments as for `keye.batch.workers.encode_many`."""
        from keye.batch.workers import encode_many

        return encode_many(self, sources, **options)

    def image(
        self,
        source: ImageSource,
        *,
        max_tokens: int = 20_480,
        min_tokens: int = 4,
        **output: Unpack[Output],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A still as (pixel_values [N, 3, 14, 14], grid_thw [1, 3]), at most 20,480 tokens by default (report).

        output: dtype, device, mean and std of the pixels, see `PixelFormat`.
        """
        least, most = whole("min_tokens", min_tokens), whole("max_tokens", max_tokens)
        if least > most:
            raise KeyeError(f"min_tokens={least} is above max_tokens={most}; give a range that is not empty")
        pixel_format = PixelFormat.of(output)
        picture = load_image(source, self.urls)
        size = fit_size(*picture.shape[1:], least, most, self.token_side)
        return encode_patches([picture], [size], self.token_side, pixel_format)

    @property
    def most_frames(self) -> int:
        """The most frames of a video that are looked at: what the budget holds of the smallest, or `max_frames`."""
        limit = self.policy.most_frames(self.max_tokens, self.min_tokens_per_frame)
        return limit if self.max_frames is None else min(limit, self.max_frames)

    def _open(self, source: Source, sampling: "Sampling"):
        return open_clip(source, self.fps, self.most_frames, urls=self.urls, **sampling)

    def _limits(self, size: tuple[int, int], max_tokens: int | None = None) -> Limits:
        return Limits(
            size,
            ratio=self.fast_ratio,
            min_tokens=self.min_tokens_per_frame,
            max_tokens_per_frame=self.max_tokens_per_frame,
            max_tokens=self.max_tokens if max_tokens is None else max_tokens,
            side=self.token_side,
        )

    def _walk(self, clip: Clip, buffer: FrameBuffer | None) -> tuple[VideoPlan, list[int]]:
        """Type the clip's frames as they come; the plan, and the position among the sampled frames of each entry."""
        limits = self._limits(clip.size)
        walk = FrameClassifier(self.measure, self.policy, limits)
        indices, times = [], []
        with nullcontext() if hasattr(self.measure, "attach") else one_thread():  # a tower takes all threads
            for batch in _batches(clip):
                pixels = torch.stack([frame.pixels for frame in batch])
                indices += [frame.index for frame in batch]
                times += [frame.time for frame in batch]
                batch.clear()  # one copy of the frames is enough while they are compared
                types, _ = walk.step(pixels)
                if buffer is not None:
                    buffer.add(pixels, types)
                del pixels  # before the next ones are decoded
            decided = walk.finish()
        slow = decided.types.count(SLOW)
        allocation = limits.allocate(
            slow, len(decided.types) - slow, fast_tokens=self.policy.fast_tokens, max_tokens=decided.max_tokens
        )
        plan = VideoPlan(
            source=clip.name,
            frame_types=torch.tensor(decided.types, dtype=torch.long),
            timestamps=torch.tensor([times[position] for position in decided.positions], dtype=torch.float32),
            frame_indices=torch.tensor([indices[position] for position in decided.positions], dtype=torch.long),
            similarity=torch.tensor(decided.scores, dtype=torch.float32),
            source_size=clip.size,
            slow_size=allocation.slow_size,
            fast_size=allocation.fast_size,
            max_tokens=self.max_tokens if decided.max_tokens is None else decided.max_tokens,
            duration=clip.duration,
            settings=self.settings if decided.threshold is None else {**self.settings, "threshold": decided.threshold},
            warnings=(*clip.warnings, *self._thinned(clip), *decided.warnings),
        )
        return plan, decided.positions

    def _thinned(self, clip: Clip) -> list[str]:
        if not clip.wanted > clip.expected == self.most_frames:
            return []
        budget = self.policy.most_frames(self.max_tokens, self.min_tokens_per_frame)
        why = f"max_tokens={self.max_tokens} holds no more of min_tokens_per_frame={self.min_tokens_per_frame}"
        if self.most_frames < budget:
            why = f"max_frames={self.max_frames} allows no more"
        return [f"{clip.expected} of {clip.wanted} frames of {clip.name} are used, spread evenly: {why}"]


def _batches(clip: Clip) -> Iterator[list[Frame]]:
    """The clip's frames, as many together as are worth it and fit into a bounded memory."""
    size = max(1, min(8, BATCH // (3 * clip.size[0] * clip.size[1])))
    batch: list[Frame] = []
    for frame in clip:
        batch.append(frame)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _entries(
    clip: Clip, buffer: FrameBuffer, positions: Sequence[int], sizes: Sequence[tuple[int, int]]
) -> Iterator[torch.Tensor]:
    """The frame [3, H, W] uint8 of each entry of a plan, from what was kept or from a second pass over the clip."""
    if buffer.serve(positions, sizes):
        for position, following in zip(positions, [*positions[1:], -1], strict=True):
            yield buffer.frames[position] if following == position else buffer.release(position)
        return
    entry = 0
    for position, frame in enumerate(clip):
        while entry < len(positions) and positions[entry] == position:
            yield frame.pixels
            entry += 1


def _size(name: str, given: int | tuple[int, int]) -> tuple[int, int]:
    sides = (given, given) if isinstance(given, int | float) else tuple(given)
    if len(sides) != 2:
        raise KeyeError(f"{name} is {given!r}; give (height, width), or one number for both")
    return whole(name, sides[0]), whole(name, sides[1])
