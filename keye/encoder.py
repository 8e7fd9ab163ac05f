"""SlowFastEncoder: video → plan → patches, and features where the encoder has a vision tower."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import torch

from keye.aggregation.plans import ClipTower, encoded_sizes, frame_entries, plan_features, pools
from keye.checks import fraction, height_width, integer
from keye.encoded import (
    ChosenFrames,
    EncodedVideo,
    FrameDecision,
    Options,
    Sampling,
    check_options,
    chosen_frames,
    encode_patches,
    refuse_one_path,
    split_options,
    stream_frame,
)
from keye.encoder_config import EncoderConfig
from keye.errors import CheckpointError, KeyeError, loading
from keye.planning import plan_clip
from keye.slowfast.budget import LEAST_FAST, fit_size
from keye.slowfast.clip_walk import pixel_rule, reads_packets
from keye.slowfast.concessions import smallest_slow_tokens
from keye.slowfast.frame_buffer import FrameBuffer
from keye.slowfast.frame_classifier import FrameClassifier
from keye.slowfast.measures import as_measure
from keye.slowfast.measures.base import Tower
from keye.slowfast.pixels import Output, PixelFormat
from keye.slowfast.plan import VideoPlan
from keye.slowfast.policies import Limits, as_policy
from keye.video.clip import Clip, Source, open_clip
from keye.video.fetch import UrlRules
from keye.video.images import ImageSource, load_image
from keye.visualize.notebook import table_html

if TYPE_CHECKING:
    from keye.batch.workers import Results


class SlowFastEncoder:
    """Adaptive slow-fast video encoding (report §3.1), usable without any model.

    Args:
        threshold: a frame less similar than this to the latest slow frame is slow. None takes the policy object's own
            threshold, or the measure's. A value that differs from the policy object's own is an error.
        settings: the other fields of `EncoderConfig`. `measure` and `policy` are names, or objects: a `Measure` and a
            `Policy`. All settings are attributes of the encoder.
        urls: what may be downloaded; None refuses URLs.
        tower: a vision tower, (pixel_values, grid_thw) -> features; `from_pretrained` attaches the model's.

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
        threshold = None if threshold is None else fraction("threshold", threshold)
        self.policy, threshold = as_policy(settings.pop("policy", EncoderConfig.policy), threshold, self.measure)
        self.config = EncoderConfig(threshold, self.measure.name, self.policy.spec, **settings)
        self.urls, self.tower = urls, tower
        if tower is not None and hasattr(self.measure, "attach"):
            self.measure.attach(tower)

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse to change settings: a plan records those that it was made with."""
        if name in EncoderConfig.__dataclass_fields__ and name not in ("measure", "policy"):
            raise AttributeError(f"{name} is a setting of the encoder; use encoder.with_settings({name}=...)")
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        """Settings as attributes: `encoder.max_tokens` is `encoder.config.max_tokens`."""
        if name in EncoderConfig.__dataclass_fields__ and "config" in self.__dict__:
            return getattr(self.config, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @classmethod
    def released(cls, **overrides: object) -> "SlowFastEncoder":
        """An encoder that decides as keye-vl-utils 1.5.2 does.

        patch_cosine with threshold 0.9, fast_ratio 0.3, 48–768 tokens a frame, 65,536 tokens a video, 2 fps, and no
        least multiple of slow frames.
        """
        settings = {"measure": "patch_cosine", "threshold": 0.9, "max_tokens": 65_536, "slow_multiple": 0.0}
        return cls(**{**settings, **overrides})

    @classmethod
    def report(cls, **overrides: object) -> "SlowFastEncoder":
        """An encoder with the report's threshold of 0.95 and budget of 75,000; the other settings are as released."""
        settings = {"measure": "patch_cosine", "threshold": 0.95, "max_tokens": 75_000, "slow_multiple": 0.0}
        return cls(**{**settings, **overrides})

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike) -> "SlowFastEncoder":
        """The encoder of a model directory: its settings and its vision tower, so that `features` are filled.

        Raises:
            CheckpointError: the directory has no valid settings or no readable weights.
        """
        from keye.checkpoint.shards import read_json
        from keye.model.keye import KeyeForConditionalGeneration

        path = Path(directory) / "preprocessor_config.json"
        if not path.is_file():
            raise CheckpointError(f"{directory} has no preprocessor_config.json; give a directory that a stage wrote")
        settings = read_json(path, "save the processor again").get("encoder")
        if not isinstance(settings, dict):
            raise CheckpointError(f'{path} has no key "encoder"; save the processor again')
        settings = EncoderConfig.saved(settings)
        try:  # before the weights are loaded
            EncoderConfig.check_names(settings)
            cls(**settings)
        except KeyeError as error:
            raise CheckpointError(f'{path}, key "encoder": {error}; save the processor again') from error
        with loading(directory):
            model = KeyeForConditionalGeneration.from_pretrained(directory).eval()
        motion = model.config.vision_config.motion is not None
        return cls(**settings, tower=ClipTower(model.encode_vision) if motion else model.encode_vision)

    @property
    def settings(self) -> dict:
        """Plain values that build the same encoder again: `SlowFastEncoder(**encoder.settings)`."""
        return {**self.config.to_dict(), "measure": self.measure.name, "policy": self.policy.spec}

    def with_settings(self, **changes: Any) -> "SlowFastEncoder":
        """A copy with some settings changed, without the tower.

        The copy shares the measure and policy objects unless `changes` names others. A new measure brings its own
        threshold unless one is given; a new threshold replaces the policy's own.
        """
        if changes.get("measure") == self.measure.name:
            del changes["measure"]
        measure = as_measure(changes.get("measure", self.measure))
        if "threshold" in changes or "measure" in changes:
            threshold = changes.get("threshold")
            changes["threshold"] = measure.threshold if threshold is None else fraction("threshold", threshold)
        policy = self.policy
        if "threshold" in changes and hasattr(policy, "threshold"):
            policy = replace(policy, threshold=changes["threshold"])
        return SlowFastEncoder(**{**self.settings, "policy": policy, **changes, "measure": measure}, urls=self.urls)

    def __repr__(self) -> str:
        return f"SlowFastEncoder({', '.join(f'{name}={value!r}' for name, value in self.settings.items())})"

    def _repr_html_(self) -> str:
        """The settings as a table, for notebooks."""
        tower = [] if self.tower is None else [("tower", "yes: features are filled")]
        return table_html([*((name, str(value)) for name, value in self.settings.items()), *tower])

    def plan(self, source: Source, **sampling: Unpack[Sampling]) -> VideoPlan:
        """Plan a video without encoding it; no frame is kept.

        With measure packets no frame is decoded where the packets suffice.

        Args:
            source: a video or pictures, see `open_clip`.
            sampling: which frames are used, see `open_clip`.

        Raises:
            VideoError: the source cannot be read.
            KeyeError: an option is unknown.
        """
        check_options(sampling, pixels=False)
        with self._open(source, sampling) as clip:
            return self._walk(clip, None)[0]

    def __call__(self, source: Source, **options: Unpack[Options]) -> EncodedVideo:
        """Plan and encode a video.

        The clip is read once. It is read a second time where the frames in memory are too small for the sizes that the
        plan gives them, or where none were kept: a large clip under a policy that needs all frames to decide.

        Args:
            source: a video or pictures, see `open_clip`.
            options: which frames are used, see `open_clip`; dtype, device, mean and std of `pixel_values`, see
                `PixelFormat` (default: float32 in [-1, 1] in host memory). The tower gets the pixels in this format.

        Returns:
            pixel_values, grid_thw, plan, and features where the encoder has a tower.

        Raises:
            VideoError: the source cannot be read.
            KeyeError: an option is unknown, or the pixel format is impossible.
        """
        output, sampling = split_options(options)
        pixel_format = PixelFormat.of(output)
        with self._chosen(source, sampling) as (clip, plan, frames):
            sizes = encoded_sizes(plan)
            pixel_values, grid_thw = encode_patches(frames(sizes), sizes, self.token_side, pixel_format)
            plan = plan.with_warnings(clip.warnings)
        features = None
        if self.tower is not None:
            with torch.inference_mode():
                features = plan_features(self.tower, pixel_values, grid_thw, plan)
        return EncodedVideo(pixel_values, grid_thw, plan, features, pixel_format)

    def frames(
        self,
        source: Source,
        *,
        size: int | tuple[int, int] | None = None,
        fast_size: int | tuple[int, int] | None = None,
        **options: Unpack[Options],
    ) -> ChosenFrames:
        """The frames that the plan chooses, uncut, for any other model.

        Args:
            source: a video or pictures, see `open_clip`.
            size: (height, width) of the frames in pixels, or one number for both, such as 336. Frames are resized to
                it without keeping their aspect; None takes the plan's sizes.
            fast_size: size of the fast frames, where it differs.
            options: as for a call; dtype is torch.uint8 by default.

        Raises:
            VideoError: the source cannot be read.
            KeyeError: an option is unknown, a size or the pixel format is impossible, or the encoder has an
                aggregation.
        """
        if self.aggregation not in (None, "none"):
            raise KeyeError(
                f"aggregation={self.aggregation!r} pools features inside a model of this project, and frames for other "
                "models have none; use with_settings(aggregation=None), or keye.aggregation.llava"
            )
        output, sampling = split_options(options)
        pixel_format = PixelFormat.of(output, torch.uint8)
        slow = None if size is None else height_width("size", size)
        fast = slow if fast_size is None else height_width("fast_size", fast_size)
        with self._chosen(source, sampling) as (clip, plan, frames):
            chosen = chosen_frames(frames, plan, (slow, fast), pixel_format)
            return replace(chosen, plan=plan.with_warnings(clip.warnings))

    @contextmanager
    def _chosen(
        self, source: Source, sampling: Sampling
    ) -> Iterator[tuple[Clip, VideoPlan, Callable[[Sequence[tuple[int, int]]], Iterator[torch.Tensor]]]]:
        """A video, its plan, and a function: sizes → frames uint8 [3, h, w], each at least as large as its size.

        A frame is released once it has been yielded, so that frames and results do not fill memory together.
        """
        with self._open(source, sampling) as clip:
            buffer = FrameBuffer(self._limits(clip.size), clip.expected, self.policy)
            plan, positions = self._walk(clip, buffer)
            if pools(plan):  # each frame once
                positions = [positions[entry] for entry in frame_entries(plan)]
            yield clip, plan, lambda sizes: buffer.entries(positions, sizes, (frame.pixels for frame in clip))

    def stream(self, frames: Iterable[torch.Tensor | tuple[float, torch.Tensor]]) -> Iterator[FrameDecision]:
        """Decide about live video as each frame arrives, in the memory of one slow frame.

        Types and similarities equal those of a `plan` of the same frames whose budget does not bind. Every frame is
        used: where there are more than `most_frames`, the stream marks the later ones `beyond_budget`.

        Args:
            frames: uint8 [3, H, W] each, or (seconds, frame); without seconds, frames are 1 / fps apart.

        Raises:
            KeyeError: the policy needs all frames to decide.
            VideoError: a frame has another size than the first, or a time that is not after the one before.
        """
        refuse_one_path(frames, "a stream takes frames, not a file; use encoder.plan for a file")
        most = self.policy.most_frames(self.max_tokens, self.min_tokens_per_frame)
        count, rule = min(most, self.max_frames or most), pixel_rule(self.measure, self.policy)
        return self._stream(FrameClassifier(*rule, frames=count, remember=False), frames)

    def _stream(
        self, classifier: FrameClassifier, frames: Iterable[torch.Tensor | tuple[float, torch.Tensor]]
    ) -> Iterator[FrameDecision]:
        sizes = first = before = None
        for index, item in enumerate(frames):
            before, frame = stream_frame(item, index, index / self.fps, before, first)
            if sizes is None:
                first = tuple(frame.shape[1:])
                ample = 2 * self.max_tokens_per_frame
                classifier.limits = limits = self._limits(first)
                allocation = limits.allocate(1, 1, fast_tokens=self.policy.fast_tokens, max_tokens=ample)
                sizes = (allocation.slow_size, allocation.fast_size)
            (kind,), (score,) = classifier.step(frame[None])
            (size,) = classifier.sizes or (sizes[kind],)
            shown, beyond = size is not None, index >= self.most_frames
            yield FrameDecision(index, before, kind, score, size or (0, 0), beyond, shown)

    def encode_many(self, sources: Sequence[Source], **options: object) -> "Results":
        """Plan or encode many videos in worker processes; options: see `keye.batch.workers.encode_many`."""
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
        """Encode a still image.

        Args:
            source: a path, URL, bytes, file, PIL image or array, see `load_image`.
            max_tokens, min_tokens: range of the image's tokens; the report allows at most 20,480.
            output: dtype, device, mean and std of the pixels, see `PixelFormat`.

        Returns:
            (pixel_values [N, 3, 14, 14], grid_thw LongTensor [1, 3])

        Raises:
            VideoError: the image cannot be read.
            KeyeError: the range or the pixel format is impossible.
        """
        least, most = integer("min_tokens", min_tokens), integer("max_tokens", max_tokens)
        if least > most:
            raise KeyeError(f"min_tokens={least} is above max_tokens={most}; give min_tokens <= max_tokens")
        pixel_format = PixelFormat.of(output)
        picture = load_image(source, self.urls)
        size = fit_size(*picture.shape[1:], least, most, self.token_side)
        return encode_patches([picture], [size], self.token_side, pixel_format)

    @property
    def most_frames(self) -> int:
        """Most frames sampled from a video: as many of the smallest size as the budget holds, or `max_frames`.

        With `slow_multiple` more frames are compared than can be shown, of which the least similar are shown. Policies
        that need all frames to decide, or that do not rank frames, sample no more than can be shown.
        """
        most = self.policy.most_frames(self.max_tokens, self._least_tokens)
        return min(most, self.max_frames or most)

    @property
    def leaves_out(self) -> bool:
        """Whether sampled frames may be left out; the budget holds each shown one with `smallest_slow_tokens`."""
        return self.policy.walks or bool(self.slow_multiple and self.policy.online and self.policy.ranks)

    @property
    def smallest_slow_tokens(self) -> int:
        """Fewest tokens of a slow frame, where the budget does not hold all slow frames at `min_tokens_per_frame`.

        The number of shown frames is at most the budget over this.
        """
        if self.policy.walks or not self.leaves_out:
            return self.min_tokens_per_frame
        return smallest_slow_tokens(self.min_tokens_per_frame, self.slow_multiple)

    @property
    def _least_tokens(self) -> int:
        """Tokens of the smallest frame by which the number of sampled frames is limited."""
        more = self.slow_multiple and self.leaves_out
        return min(LEAST_FAST, self.min_tokens_per_frame) if more else self.min_tokens_per_frame

    def _open(self, source: Source, sampling: Sampling) -> AbstractContextManager[Clip]:
        lazy = reads_packets(self.measure)
        return open_clip(source, self.fps, self.most_frames, urls=self.urls, lazy=lazy, **sampling)

    def _limits(self, size: tuple[int, int]) -> Limits:
        return Limits(
            size,
            ratio=self.fast_ratio,
            min_tokens=self.min_tokens_per_frame,
            max_tokens_per_frame=self.max_tokens_per_frame,
            max_tokens=self.max_tokens,
            side=self.token_side,
            multiple=self.slow_multiple,
        )

    def _walk(self, clip: Clip, buffer: FrameBuffer | None) -> tuple[VideoPlan, list[int]]:
        """Classify the clip's frames; returns the plan, and which frame of the clip each of its entries shows."""
        limits = self._limits(clip.size)
        return plan_clip(clip, self.measure, self.policy, limits, self.settings, buffer, self._thinned)

    def _thinned(self, clip: Clip) -> list[str]:
        if not clip.wanted > clip.expected == self.most_frames:
            return []
        why = f"max_tokens={self.max_tokens} holds no more frames of {self._least_tokens} tokens"
        if self.most_frames < self.policy.most_frames(self.max_tokens, self._least_tokens):
            why = f"max_frames={self.max_frames}"
        return [f"{clip.expected} of {clip.wanted} frames of {clip.name} are used, spread evenly: {why}"]
