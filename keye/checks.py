"""Checks of numbers that users give.

Each returns the value as a plain Python number, or raises an error that names the argument and says what to give.
"""

import difflib
import math
from collections.abc import Iterable, Sequence
from numbers import Real

from keye.errors import KeyeError


def integer(name: str, value: object, least: int = 1, *, error: type[KeyeError] = KeyeError) -> int:
    """`value` as an int, if it is a whole number of `least` or more; 8000.0 and numpy's integers are accepted."""
    if not _finite(value) or value != int(value) or value < least:
        raise error(f"{name} is {value!r}; give a whole number of {least} or more")
    return int(value)


def fraction(name: str, value: object, *, zero: bool = True, error: type[KeyeError] = KeyeError) -> float:
    """`value` as a float, if it is in [0, 1], or in (0, 1] where `zero` is false."""
    if not _finite(value) or not 0 <= value <= 1 or (value == 0 and not zero):
        raise error(f"{name} is {value!r}; give a number {'from 0 to 1' if zero else 'above 0 and at most 1'}")
    return float(value)


def rate(name: str, value: object, *, error: type[KeyeError] = KeyeError) -> float:
    """`value` as a float, if it is finite and above 0."""
    if not _finite(value) or value <= 0:
        raise error(f"{name} is {value!r}; give a rate above 0")
    return float(value)


def multiple(name: str, value: object, *, error: type[KeyeError] = KeyeError) -> float:
    """`value` as a float, if it is finite and 1 or more, or 0."""
    if not _finite(value) or (value != 0 and value < 1):
        raise error(f"{name} is {value!r}; give a number of 1 or more, or 0 for none")
    return float(value)


def seconds(name: str, value: object, *, error: type[KeyeError] = KeyeError) -> float:
    """`value` as a float, if it is finite and 0 or more."""
    if not _finite(value) or value < 0:
        raise error(f"{name} is {value!r}; give seconds from the beginning, 0 or more")
    return float(value)


def height_width(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    """`value` as (height, width) of 1 or more each; one number stands for both. Arrays and tensors are accepted."""
    plain = value.tolist() if hasattr(value, "tolist") else value
    sides = (plain, plain) if isinstance(plain, Real) else plain
    if not isinstance(sides, Sequence) or len(sides) != 2:
        raise KeyeError(f"{name} is {value!r}; give (height, width), or one number for both")
    return integer(name, sides[0]), integer(name, sides[1])


def suggestion(name: str, known: Iterable[str], prefix: str = "") -> str:
    """The remedy for an unknown name: the known one that is spelled like it, else all known ones, after `prefix`."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean {prefix}{near[0]}?" if near else f"use one of {', '.join(prefix + one for one in known)}"


def _finite(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
