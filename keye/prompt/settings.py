"""The keyword arguments of a processor's call as transformers passes them: flat or nested, and never swallowed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from keye.encoder import EncodedVideo
from keye.errors import KeyeError
from keye.prompt.messages import Visual
from keye.prompt.options import Options, read_options

_NESTED = ("processor_kwargs", "common_kwargs", "text_kwargs")
_UNSUPPORTED = ("tools", "documents", "audio", "load_audio_from_video", "sampling_rate", "add_special_tokens")
_OF_VIDEOS = ("num_frames", "fps")  # transformers, and its server, give them beside the others
_FAR = 10**12  # tokenizers without a limit name a larger number
_PADDING = (True, False, "longest", "max_length", "do_not_pad")


@dataclass(frozen=True)
class CallSettings:
    """padding: True, False or "max_length". truncation, max_length and the rest: None where nothing was said.

    images_kwargs, videos_kwargs: options of every image and video that does not say otherwise.
    """

    padding: bool | str = True
    truncation: bool | None = None
    max_length: int | None = None
    padding_side: str | None = None
    pad_to_multiple_of: int | None = None
    return_tensors: str | None = "pt"
    images_kwargs: Options = field(default_factory=dict)
    videos_kwargs: Options = field(default_factory=dict)

    def limit(self, longest: int) -> int | None:
        """The most tokens of a row, None for no limit; `longest`: the tokenizer's own."""
        if self.truncation is False:
            return None
        if self.truncation and self.max_length is None:
            return longest if longest < _FAR else None
        return self.max_length

    def padded(self, longest: int) -> int:
        """How long the rows of a batch become whose longest has `longest` tokens."""
        length = max(longest, self.max_length or 0) if self.padding == "max_length" else longest
        multiple = self.pad_to_multiple_of or 1
        return -(-length // multiple) * multiple

    def configured(self, visuals: Sequence[Visual]) -> list[Visual]:
        """The media with the call's options; what a message says about its own comes first."""
        common = {"image": self.images_kwargs, "video": self.videos_kwargs}
        return [
            v if isinstance(v.source, EncodedVideo) else replace(v, options={**common[v.kind], **v.options})
            for v in visuals
        ]


def call_settings(given: Mapping[str, Any]) -> CallSettings:
    """The settings in the keyword arguments of a call.

    Raises:
        KeyeError: one that is not known, given twice or out of range; the message names it.
    """
    flat: dict[str, Any] = {}
    _flatten(given, flat)
    for name in _UNSUPPORTED:
        if flat.pop(name, None):
            raise KeyeError(f"{name} was given, which Keye's chat template and model do not take; leave it out")
    for name in _OF_VIDEOS:
        if (value := flat.pop(name, None)) is not None:
            flat["videos_kwargs"] = {name: value, **(flat.get("videos_kwargs") or {})}
    known = list(CallSettings.__dataclass_fields__)
    unknown = [name for name in flat if name not in known]
    if unknown:
        raise KeyeError(f"the processor does not know {', '.join(unknown)}; use {', '.join(known)}")
    _check(flat)
    for kind in ("image", "video"):
        options = flat.get(f"{kind}s_kwargs")
        if options is not None:
            flat[f"{kind}s_kwargs"] = read_options(kind, options)
    if flat.get("padding") in ("longest", "do_not_pad"):
        flat["padding"] = flat["padding"] == "longest"
    return CallSettings(**{name: value for name, value in flat.items() if value is not None})


def _flatten(given: Mapping[str, Any], flat: dict[str, Any]) -> None:
    for name, value in given.items():
        if name in _NESTED:
            _flatten(value or {}, flat)
        elif name in flat and flat[name] != value:
            raise KeyeError(f"{name} is given twice, as {flat[name]!r} and {value!r}; give it once")
        else:
            flat[name] = value


def _check(flat: Mapping[str, Any]) -> None:
    def refuse(name: str, wanted: str) -> None:
        raise KeyeError(f"{name} is {flat[name]!r}; give {wanted}")

    for name in ("max_length", "pad_to_multiple_of"):
        length = flat.get(name)
        if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 1):
            refuse(name, "a whole number of tokens, 1 or more")
    if flat.get("padding") not in (None, *_PADDING):
        refuse("padding", "True, False, 'longest' or 'max_length'")
    if flat.get("padding") == "max_length" and flat.get("max_length") is None:
        raise KeyeError("padding is 'max_length' and there is no max_length; give one")
    if flat.get("truncation") not in (None, True, False):
        refuse("truncation", "True or False")
    if flat.get("padding_side") not in (None, "left", "right"):
        refuse("padding_side", "'left' or 'right'")
    if flat.get("return_tensors") not in (None, "pt", "auto"):
        refuse("return_tensors", "'pt', the only kind there is")
