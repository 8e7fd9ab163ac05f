"""The options of one image or video in a message: limits, sampling, and settings of the encoder.

Names are those of `SlowFastEncoder` and `open_clip`; names of Qwen-style messages with the same meaning are accepted as
well (qwen-vl-utils, keye-vl-utils 1.5.2). Any other name is an error. A message cannot set what may be downloaded
(`urls`) or the side of a token.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from keye.checks import integer, suggestion
from keye.encoder import Sampling, SlowFastEncoder
from keye.encoder_config import EncoderConfig
from keye.errors import KeyeError, ManifestError
from keye.field_docs import field_types
from keye.video.fetch import UrlRules

Options = dict[str, Any]

SAMPLING = ("start", "end", "num_frames", "source_fps", "timestamps")
SETTINGS = tuple(name for name in EncoderConfig.names() if name != "token_side")
LIMITS = ("min_tokens", "max_tokens")
MIN_TOKENS, MAX_TOKENS = 4, 20_480  # default limits of an image in tokens, as in `SlowFastEncoder.image` (report)
PIXELS = ("min_pixels", "max_pixels")  # of an image or of one frame
TOTAL = "video_total_pixels"
ALIASES = {
    "video_start": "start",
    "video_end": "end",
    "nframes": "num_frames",
    "sample_fps": "source_fps",
    "total_pixels": TOTAL,
    "min_frame_similarity": "threshold",
}
KNOWN = {"image": (*LIMITS, *PIXELS), "video": (*SAMPLING, *SETTINGS, *PIXELS, TOTAL)}
_WORDS = tuple(name for name in SETTINGS if field_types(EncoderConfig)[name] is str)
_WHOLE = (*LIMITS, "num_frames", *(name for name in SETTINGS if field_types(EncoderConfig)[name] is int))


def make_encoder(settings: Mapping[str, Any], urls: UrlRules | None = None) -> SlowFastEncoder:
    """The encoder of a processor's settings, the fields of `EncoderConfig`; urls: what it may download.

    Raises:
        KeyeError: a setting is unknown or impossible; the message begins with the key `encoder`.
    """
    with _table("encoder", settings):
        EncoderConfig.check_names(settings)  # the other arguments of an encoder, `urls` and `tower`, are not settings
        return SlowFastEncoder(**settings, urls=urls)


def image_limits(settings: Mapping[str, Any]) -> dict[str, int]:
    """A processor's settings of images, checked: `min_tokens` and `max_tokens` of an image, either may be missing.

    Raises:
        KeyeError: a setting is unknown or impossible; the message begins with the key `image`.
    """
    with _table("image", settings):
        for name in settings:
            if name not in LIMITS:
                raise KeyeError(f"{name} is not a setting of images; {suggestion(name, LIMITS)}")
        limits = {name: integer(name, value) for name, value in settings.items()}
        least, most = limits.get("min_tokens", 1), limits.get("max_tokens", math.inf)
        if least > most:
            raise KeyeError(f"min_tokens={least} is above max_tokens={most}; give min_tokens <= max_tokens")
        return limits


@contextmanager
def _table(key: str, settings: object) -> Iterator[None]:
    """Check that settings are a table, and name its key in the errors of the block."""
    if not isinstance(settings, Mapping):
        raise KeyeError(f"{key} is {settings!r:.80}; give a table of settings")
    try:
        yield
    except KeyeError as error:
        raise KeyeError(f"{key}: {error}") from error


def read_options(kind: str, given: Mapping[str, Any]) -> Options:
    """The options of an image or video under their own names; an option of None is ignored.

    Raises:
        ManifestError: an unknown name, one given twice, or a value of the wrong type.
    """
    options: Options = {}
    for key, value in given.items():
        name = ALIASES.get(key, key) if kind == "video" else key
        if value is None:
            continue
        if name not in KNOWN[kind]:
            raise ManifestError(f"{kind} element: {key} is not known; use {', '.join(KNOWN[kind])}")
        if name in options:
            raise ManifestError(f"{kind} element: {key} is given twice, also as {name}; give it once")
        options[name] = _checked(kind, key, name, value)
    return options


def _checked(kind: str, key: str, name: str, value: Any) -> Any:
    if name in _WORDS:
        valid, wanted = isinstance(value, str), "a name"
    elif name == "timestamps":
        value = value.tolist() if hasattr(value, "tolist") else value
        valid = isinstance(value, list | tuple) and all(map(_number, value))
        wanted = "a list of seconds"
    elif name in _WHOLE:
        valid, wanted = _number(value) and value == int(value) and value >= 1, "a whole number of 1 or more"
        value = int(value) if valid else value
    else:
        valid, wanted = _number(value) and value >= 0, "a number of 0 or more"
    if not valid:
        raise ManifestError(f"{kind} element: {key} is {value!r}; give {wanted}")
    return value


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def still_limits(encoder: SlowFastEncoder, image: Mapping[str, int], options: Options) -> dict[str, int]:
    """`min_tokens` and `max_tokens` of one image: the processor's, changed by the element's options."""
    area = encoder.token_side**2
    given = {name: options[name] for name in LIMITS if name in options}
    given |= _from_pixels(options, area, *LIMITS)
    return {**image, **_widened(dict(zip(LIMITS, (MIN_TOKENS, MAX_TOKENS), strict=True)) | image, given, *LIMITS)}


def video_encoder(encoder: SlowFastEncoder, options: Options) -> tuple[SlowFastEncoder, Sampling]:
    """The encoder of one video with the settings of its element, and the element's sampling."""
    area = encoder.token_side**2
    frame = ("min_tokens_per_frame", "max_tokens_per_frame")
    changes = {name: options[name] for name in SETTINGS if name in options}
    changes |= _from_pixels(options, area, *frame)
    changes |= _widened(encoder.settings, changes, *frame)
    if TOTAL in options:
        changes["max_tokens"] = int(options[TOTAL]) // area
    sampling: Sampling = {name: options[name] for name in SAMPLING if name in options}
    return (encoder.with_settings(**changes) if changes else encoder), sampling


def _from_pixels(options: Options, area: int, least: str, most: str) -> dict[str, int]:
    """Limits in pixels as limits in tokens that do not exceed them."""
    limits = {}
    if "min_pixels" in options:
        limits[least] = max(1, math.ceil(options["min_pixels"] / area))
    if "max_pixels" in options:
        limits[most] = max(1, int(options["max_pixels"]) // area)
    return limits


def _widened(base: Mapping[str, Any], given: Mapping[str, Any], least: str, most: str) -> dict[str, int]:
    """The given limits; if only one is given, the other is adjusted to it.

    Raises:
        KeyeError: both are given, and the range is empty.
    """
    low, high = given.get(least, base[least]), given.get(most, base[most])
    if low > high:
        if least in given and most in given:
            raise KeyeError(f"{least}={low} is above {most}={high}; give a range that is not empty")
        low, high = (low, low) if least in given else (high, high)
    return {name: value for name, value in ((least, low), (most, high)) if name in given or value != base[name]}
