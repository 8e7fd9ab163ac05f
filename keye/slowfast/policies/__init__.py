"""Who is slow and who is fast: a policy judges each frame by its similarity with the latest slow frame.

The first frame is always slow (report §3.1). Most policies judge frame by frame in presentation order; adaptive_budget
and two_stream see the whole clip first. `keye.slowfast.frame_classifier` takes a policy along a clip.
"""

from dataclasses import fields
from typing import get_args

from keye.checks import share
from keye.errors import KeyeError
from keye.slowfast.measures.base import Measure
from keye.slowfast.policies.base import FAST, SLOW, Decisions, FrameContext, Limits, Policy
from keye.slowfast.policies.framewise import Adaptive, AllSlow, Strided, Uniform
from keye.slowfast.policies.wholeclip import AdaptiveBudget, TwoStream

__all__ = [
    "FAST",
    "SLOW",
    "Adaptive",
    "AdaptiveBudget",
    "AllSlow",
    "Decisions",
    "Limits",
    "Policy",
    "FrameContext",
    "Strided",
    "TwoStream",
    "Uniform",
    "as_policy",
    "get_policy",
    "known_policies",
]

_POLICIES = {kind.name: kind for kind in (Adaptive, AdaptiveBudget, AllSlow, Strided, TwoStream, Uniform)}


def known_policies() -> list[str]:
    """The names `get_policy` knows."""
    return sorted(_POLICIES)


def get_policy(spec: str, threshold: float) -> Policy:
    """The policy that `spec` stands for: "name", "name:value" or "name:key=value,key=value".

    adaptive and adaptive_budget take `threshold` and the keys max_gap, min_gap, hysteresis and cut, adaptive_budget
    also one of share and tokens; uniform:N and strided:N one slow frame in N; two_stream slow and fast_tokens;
    all_slow nothing. An unknown name, key or value is a KeyeError that lists what is known.
    """
    name, colon, text = spec.partition(":")
    if name not in _POLICIES:
        raise KeyeError(f"policy {spec!r} is not known; use one of {', '.join(known_policies())}")
    kind = _POLICIES[name]
    known = {option.name: option.type for option in fields(kind) if option.name != "threshold"}
    options: dict[str, int | float] = {}
    for part in text.split(",") if colon else ():
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals and kind.value is not None:
            key, value = kind.value, key
        if key not in known:
            choice = f"use {', '.join(known)}, each with =" if known else "it has none"
            raise KeyeError(f"policy {spec!r}: {part.strip()!r} is not an option of {name}; {choice}")
        if key in options:
            raise KeyeError(f"policy {spec!r}: {key} is given twice; give it once")
        options[key] = _number(spec, key, value, int in (known[key], *get_args(known[key])))
    if "threshold" in (option.name for option in fields(kind)):
        options["threshold"] = threshold
    return kind(**options)


def as_policy(given: str | Policy, threshold: float | None, measure: Measure) -> tuple[Policy, float]:
    """The policy that `given` names or is, and the threshold that it decides by.

    That is `threshold`, else a policy object's own, else the measure's. Raises KeyeError where `threshold` and the
    policy's own differ, and for what is no policy.
    """
    if isinstance(given, str):
        own = measure.threshold if threshold is None else threshold
        return get_policy(given, own), own
    if isinstance(given, type) and issubclass(given, Policy):
        raise KeyeError(f"policy is the class {given.__name__}; give an instance of it: {given.__name__}(…)")
    if not isinstance(given, Policy):
        raise KeyeError(f"policy is {given!r:.80}; give a name, or an object of a class derived from Policy")
    own = getattr(given, "threshold", None)
    if own is None:
        return given, measure.threshold if threshold is None else threshold
    if threshold is not None and threshold != own:
        raise KeyeError(f"threshold is {threshold} and the policy's own threshold {own}; give one of the two")
    return given, share("threshold of the policy", own)


def _number(spec: str, key: str, text: str, whole: bool) -> int | float:
    try:
        return int(text) if whole else float(text)
    except ValueError:
        kind = "whole number" if whole else "number"
        raise KeyeError(f"policy {spec!r}: {key} is {text!r}; give a {kind}") from None
