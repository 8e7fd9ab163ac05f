"""Checks of the JSON values of a plan, which may come from a file that was edited or truncated."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from keye.errors import VideoError
from keye.slowfast.budget import SIDE

_LISTS = ("frame_types", "timestamps", "frame_indices", "similarity")
_SCORE_SLACK = 1e-3  # a user's measure may round beyond 0 and 1


def check_values(values: Any, keys: set[str], optional: Sequence[tuple[str, ...]] = ()) -> None:
    """Refuse values that `VideoPlan.to_dict` cannot have written; of a group of `optional` keys all are there or none.

    Raises:
        VideoError: the message names the key, its value and what it must be.
    """
    if not isinstance(values, Mapping):
        raise VideoError(f"this is not a video plan but a {type(values).__name__}; make the plan again")
    keys = keys - {key for group in optional if not set(group) & set(values) for key in group}
    if set(values) != keys:
        wrong = ", ".join(sorted(map(str, set(values) ^ keys)))
        raise VideoError(f"this is not a video plan: the keys {wrong} are missing or unknown; make the plan again")
    lists = {name: values[name] for name in _LISTS}
    for name, column in lists.items():
        _need(name, isinstance(column, list | tuple), "a list", column)
    lengths = {name: len(column) for name, column in lists.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        shown = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise VideoError(f"this is not a video plan: its lists differ in length ({shown}); make the plan again")
    _each(lists, "frame_types", lambda value: _whole(value) and value in (0, 1), "0 or 1")
    _each(lists, "frame_indices", lambda value: _whole(value) and value >= 0, "whole numbers of 0 or more")
    _each(lists, "timestamps", _number, "seconds")
    times = lists["timestamps"]
    ascending = all(earlier <= later for earlier, later in zip(times, times[1:], strict=False))
    _need("timestamps", ascending, "seconds that never descend", times)
    _each(lists, "similarity", _score, "numbers from 0 to 1, or null")
    _need("settings", isinstance(values["settings"], Mapping), "an object of settings", values["settings"])
    side = values["settings"].get("token_side", SIDE)
    _need("token_side", _whole(side) and side >= 2, "a whole number of pixels", side)
    for name, step in (("source_size", 1), ("slow_size", side), ("fast_size", side)):
        _size(name, values[name], step)
    if "end" in values:
        _need(
            "end", _number(values["end"]) and values["end"] >= times[-1], "seconds after all timestamps", values["end"]
        )
    if "levels" in values:
        _levels(values, lists, side)
    _need("max_tokens", _whole(values["max_tokens"]) and values["max_tokens"] >= 1, "1 or more", values["max_tokens"])
    _need("duration", _number(values["duration"]) and values["duration"] >= 0, "seconds", values["duration"])
    _need("source", isinstance(values["source"], str), "a name", values["source"])
    warnings = values["warnings"]
    right = isinstance(warnings, list | tuple) and all(isinstance(text, str) for text in warnings)
    _need("warnings", right, "a list of sentences", warnings)


def _size(name: str, size: Any, step: int) -> None:
    right = isinstance(size, list | tuple) and len(size) == 2
    right = right and all(_whole(length) and length >= 1 and length % step == 0 for length in size)
    _need(name, right, f"[height, width] in multiples of {step}" if step > 1 else "[height, width]", size)


def _levels(values: Mapping[str, Any], lists: Mapping[str, Any], side: int) -> None:
    sizes, levels = values["sizes"], values["levels"]
    _need("sizes", isinstance(sizes, list | tuple) and len(sizes) > 0, "a list of sizes", sizes)
    for place, size in enumerate(sizes):
        _size(f"sizes[{place}]", size, side)
    right = isinstance(levels, list | tuple) and len(levels) == len(lists["frame_types"])
    _need("levels", right, "a list with a number for each frame", levels)
    _each(values, "levels", lambda level: _whole(level) and 0 <= level < len(sizes), f"0 to {len(sizes) - 1}")


def _each(lists: Mapping[str, Any], name: str, right: Callable[[Any], bool], wanted: str) -> None:
    for place, value in enumerate(lists[name]):
        _need(f"{name}[{place}]", right(value), wanted, value)


def _need(name: str, right: bool, wanted: str, value: Any) -> None:
    if not right:
        raise VideoError(
            f"this is not a video plan: {name} is {value!r:.60} where it must be {wanted}; make the plan again"
        )


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _score(value: Any) -> bool:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return True
    return _number(value) and -_SCORE_SLACK <= value <= 1 + _SCORE_SLACK
