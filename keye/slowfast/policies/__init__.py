"""Policies: which frames are slow and which are fast, by their similarity with the latest slow frame.

The first frame is always slow (report §3.1). Most policies decide frame by frame in presentation order; adaptive_budget
and two_stream need all frames of a clip, and ladder also sets the size of each frame.
`keye.slowfast.frame_classifier` applies a policy to a clip.
"""

from dataclasses import fields
from typing import get_args

from keye.checks import fraction
from keye.errors import KeyeError
from keye.slowfast.measures.base import Measure
from keye.slowfast.policies.base import FAST, SLOW, Decisions, FrameContext, Limits, Policy
from keye.slowfast.policies.framewise import Adaptive, AllSlow, Random, Strided, Uniform
from keye.slowfast.policies.ladder import Ladder
from keye.slowfast.policies.wholeclip import AdaptiveBudget, TwoStream

__all__ = [
    "FAST",
    "SLOW",
    "Adaptive",
    "AdaptiveBudget",
    "AllSlow",
    "Decisions",
    "Ladder",
    "Limits",
    "Policy",
    "FrameContext",
    "Random",
    "Strided",
    "TwoStream",
    "Uniform",
    "as_policy",
    "get_policy",
    "known_policies",
]

_POLICIES = {
    kind.name: kind for kind in (Adaptive, AdaptiveBudget, AllSlow, Ladder, Random, Strided, TwoStream, Uniform)
}


def known_policies() -> list[str]:
    """The names that `get_policy` accepts."""
    return sorted(_POLICIES)


def get_policy(spec: str, threshold: float) -> Policy:
    """The policy of a spec: "name", "name:value" or "name:key=value,key=value".

    Options: adaptive and adaptive_budget take max_gap, min_gap, hysteresis and cut, adaptive_budget also one of share
    and tokens; uniform:N and strided:N make one frame in N slow; random takes every and seed, two_stream slow and
    fast_tokens, ladder price, all_slow none.

    Args:
        spec: name and options.
        threshold: similarity below which adaptive and adaptive_budget make a frame slow.

    Raises:
        KeyeError: a name, option or value is unknown or impossible; the message lists the known ones.
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
            choice = f"use {', '.join(f'{option}=' for option in known)}" if known else "it has none"
            raise KeyeError(f"policy {spec!r}: {part.strip()!r} is not an option of {name}; {choice}")
        if key in options:
            raise KeyeError(f"policy {spec!r}: {key} is given twice; give it once")
        options[key] = _number(spec, key, value, int in (known[key], *get_args(known[key])))
    if "threshold" in (option.name for option in fields(kind)):
        options["threshold"] = threshold
    return kind(**options)


def as_policy(policy: str | Policy, threshold: float | None, measure: Measure) -> tuple[Policy, float]:
    """The policy of a spec, or a policy object itself, and its threshold.

    The threshold is `threshold`, else a policy object's own, else the measure's.

    Raises:
        KeyeError: `policy` is not a policy, or its own threshold differs from `threshold`.
    """
    if isinstance(policy, str):
        own = measure.threshold if threshold is None else threshold
        return get_policy(policy, own), own
    if isinstance(policy, type) and issubclass(policy, Policy):
        raise KeyeError(f"policy is the class {policy.__name__}; give an instance of it: {policy.__name__}(…)")
    if not isinstance(policy, Policy):
        raise KeyeError(f"policy is {policy!r:.80}; give a name, or an object of a class derived from Policy")
    own = getattr(policy, "threshold", None)
    if own is None:
        return policy, measure.threshold if threshold is None else threshold
    if threshold is not None and threshold != own:
        raise KeyeError(f"threshold is {threshold} and the policy's own threshold {own}; give one of the two")
    return policy, fraction("threshold of the policy", own)


def _number(spec: str, key: str, text: str, integer: bool) -> int | float:
    try:
        return int(text) if integer else float(text)
    except ValueError:
        kind = "whole number" if integer else "number"
        raise KeyeError(f"policy {spec!r}: {key} is {text!r}; give a {kind}") from None
