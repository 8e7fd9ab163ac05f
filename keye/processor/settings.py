"""The keyword arguments of a processor call as transformers passes them: flat or nested; unknown ones are errors."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from keye.encoder import EncodedVideo
from keye.errors import ArgumentError, KeyeError
from keye.processor.messages import Visual
from keye.processor.options import Options, read_options

_NESTED = ("processor_kwargs", "common_kwargs", "text_kwargs")
_UNSUPPORTED = ("tools", "documents", "audio", "load_audio_from_video", "sampling_rate", "add_special_tokens")
_NO_LIMIT = 10**12  # tokenizers without a limit have a larger model_max_length
_PADDING = (True, False, "longest", "max_length", "do_not_pad")


@dataclass(frozen=True)
class CallSettings:
    """The settings of one call; None for those that are not given.

    padding: True, False or "max_length". do_sample_frames: False uses every given frame. video_metadata: the known
    options of each video (`read_metadata`). return_mm_token_type_ids: also return which tokens belong to images (1) and
    to frames (2). images_kwargs, videos_kwargs: default options of every image and video.
    """

    padding: bool | str | None = None
    truncation: bool | None = None
    max_length: int | None = None
    padding_side: str | None = None
    pad_to_multiple_of: int | None = None
    return_tensors: str | None = None
    return_mm_token_type_ids: bool = False
    do_sample_frames: bool | None = None
    video_metadata: Sequence[Options] = ()
    images_kwargs: Options = field(default_factory=dict)
    videos_kwargs: Options = field(default_factory=dict)

    @property
    def as_lists(self) -> bool:
        """Whether rows of different lengths are lists: no setting asks for one tensor."""
        return not self.padding and self.pad_to_multiple_of is None and self.padding_side is None

    def limit(self, longest: int) -> int | None:
        """The most tokens of a row, None for no limit; `longest`: the tokenizer's limit."""
        if self.truncation is False:
            return None
        if self.truncation and self.max_length is None:
            return longest if longest < _NO_LIMIT else None
        return self.max_length

    def padded(self, longest: int) -> int:
        """The length of padded rows whose longest has `longest` tokens."""
        length = max(longest, self.max_length or 0) if self.padding == "max_length" else longest
        multiple = self.pad_to_multiple_of or 1
        return -(-length // multiple) * multiple

    def configured(self, rows: Sequence[Sequence[Visual]]) -> list[list[Visual]]:
        """The media of each row with the call's options; options in a message take precedence.

        Raises:
            KeyeError: metadata of more or fewer videos than there are.
        """
        videos = sum(visual.kind == "video" for row in rows for visual in row)
        if self.video_metadata and len(self.video_metadata) != videos:
            raise KeyeError(f"video_metadata has {len(self.video_metadata)} entries for {videos} videos; give one each")
        metadata = iter(self.video_metadata)
        return [[self._configured(visual, metadata) for visual in row] for row in rows]

    def _configured(self, visual: Visual, metadata: Iterator[Options]) -> Visual:
        known = next(metadata, {}) if visual.kind == "video" else {}
        if isinstance(visual.source, EncodedVideo):
            return visual
        common = self.images_kwargs if visual.kind == "image" else {**self.videos_kwargs, **known}
        options = {**common, **visual.options}
        given = isinstance(visual.source, list | tuple | np.ndarray | torch.Tensor)
        if given and self.do_sample_frames is False and "source_fps" in options:
            options["fps"] = options["source_fps"]  # sampling at the source's rate takes every frame
        return replace(visual, options=options)


def call_settings(given: Mapping[str, Any], more: Sequence[str] = ()) -> CallSettings:
    """The settings in the keyword arguments of a call; more: the call's other arguments, for messages.

    Raises:
        ArgumentError: one that is unknown, given twice or out of range; the message names it.
    """
    flat: dict[str, Any] = {}
    _flatten(given, flat)
    for name in _UNSUPPORTED:
        if flat.pop(name, None):
            raise ArgumentError(f"{name} is not supported by Keye's chat template and model; omit it")
    videos = flat.get("videos_kwargs") or {}
    for name in ("do_sample_frames", "video_metadata", "return_metadata"):
        if name in videos:
            flat.setdefault(name, videos[name])
            flat["videos_kwargs"] = {key: value for key, value in flat["videos_kwargs"].items() if key != name}
    flat.pop("return_metadata", None)  # the plans contain it
    if flat.get("video_metadata") is not None:
        flat["video_metadata"] = read_metadata(flat["video_metadata"])
    for name in ("num_frames", "fps"):
        if (value := flat.pop(name, None)) is not None:
            flat["videos_kwargs"] = {name: value, **(flat.get("videos_kwargs") or {})}
    known = list(CallSettings.__dataclass_fields__)
    unknown = [name for name in flat if name not in known]
    if unknown:
        names = dict.fromkeys((*known, "fps", "num_frames", *more))
        raise ArgumentError(f"the processor has no argument {', '.join(unknown)}; use {', '.join(names)}")
    _check(flat)
    for kind in ("image", "video"):
        options = flat.get(f"{kind}s_kwargs")
        if options is not None:
            flat[f"{kind}s_kwargs"] = read_options(kind, options)
    if flat.get("padding") in ("longest", "do_not_pad"):
        flat["padding"] = flat["padding"] == "longest"
    return CallSettings(**{name: value for name, value in flat.items() if value is not None})


def read_metadata(given: Any) -> list[Options]:
    """transformers' `VideoMetadata` (or such dicts), one or a list, nested or flat → the options of each video.

    `fps` is the rate of the given frames; with `frames_indices` their times are index / fps.

    Raises:
        ArgumentError: any other value.
    """
    entries = [given] if isinstance(given, Mapping) or hasattr(given, "total_num_frames") else list(given)
    flat = [one for entry in entries for one in (entry if isinstance(entry, list | tuple) else [entry])]
    options = []
    for entry in flat:
        known = entry if isinstance(entry, Mapping) else getattr(entry, "__dict__", None)
        if known is None:
            raise ArgumentError(f"video_metadata has {entry!r:.80}; give a dict with 'fps'")
        fps, indices = known.get("fps"), known.get("frames_indices")
        if fps is not None and indices is not None:
            options.append({"timestamps": [float(index) / fps for index in indices]})
        else:
            options.append({} if fps is None else {"source_fps": float(fps)})
    return options


def _flatten(given: Mapping[str, Any], flat: dict[str, Any]) -> None:
    for name, value in given.items():
        if name in _NESTED:
            _flatten(value or {}, flat)
        elif value is None:
            flat.setdefault(name, None)
        elif flat.get(name) is not None and flat[name] != value:
            raise ArgumentError(f"{name} is given twice, as {flat[name]!r} and {value!r}; give it once")
        else:
            flat[name] = value


def _check(flat: Mapping[str, Any]) -> None:
    def refuse(name: str, wanted: str) -> None:
        raise ArgumentError(f"{name} is {flat[name]!r}; give {wanted}")

    for name in ("max_length", "pad_to_multiple_of"):
        length = flat.get(name)
        if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 1):
            refuse(name, "a whole number of tokens, 1 or more")
    if flat.get("padding") not in (None, *_PADDING):
        refuse("padding", "True, False, 'longest' or 'max_length'")
    if flat.get("padding") == "max_length" and flat.get("max_length") is None:
        raise ArgumentError("padding is 'max_length' without a max_length; give one")
    if flat.get("truncation") not in (None, True, False):
        refuse("truncation", "True or False")
    if flat.get("padding_side") not in (None, "left", "right"):
        refuse("padding_side", "'left' or 'right'")
    if flat.get("return_tensors") not in (None, "pt", "np", "auto"):
        refuse("return_tensors", "'pt' or 'np'")
