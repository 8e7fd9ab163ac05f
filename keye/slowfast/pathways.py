"""Who is slow and who is fast: a policy judges each frame by its similarity with the latest slow frame.

The first frame is always slow (report §3.1). The judgement is made frame by frame in presentation order, so it works
on a stream with the memory of one slow frame, and a batch gives the same answer as a stream.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from keye.errors import KeyeError
from keye.slowfast.similarity import Measure

SLOW, FAST = 0, 1


class Policy(Protocol):
    """Decides whether a frame is slow. `spec` is the text that `get_policy` turns back into the policy."""

    @property
    def spec(self) -> str: ...

    def is_slow(self, index: int, similarity: float, gap: int) -> bool:
        """Judge frame `index` (>= 1), its `similarity` in [0, 1] with the latest slow frame, `gap` frames before it."""
        ...


@dataclass(frozen=True)
class Adaptive:
    """The report's rule: slow when the similarity with the latest slow frame is below `threshold`, else fast."""

    threshold: float
    spec: str = "adaptive"

    def is_slow(self, index: int, similarity: float, gap: int) -> bool:
        return similarity < self.threshold


@dataclass(frozen=True)
class AllSlow:
    """Every frame is slow: what a video model without a fast pathway does."""

    spec: str = "all_slow"

    def is_slow(self, index: int, similarity: float, gap: int) -> bool:
        return True


@dataclass(frozen=True)
class Uniform:
    """One slow frame in every `every`, whatever the picture shows: the baseline at a fixed share of slow frames."""

    every: int = 4

    @property
    def spec(self) -> str:
        return f"uniform:{self.every}"

    def is_slow(self, index: int, similarity: float, gap: int) -> bool:
        return gap >= self.every


POLICIES = ("adaptive", "all_slow", "uniform[:N]")


def get_policy(spec: str, threshold: float) -> Policy:
    """The policy named by `spec`: adaptive, all_slow, uniform or uniform:N (one slow frame in N, 4 by default)."""
    name, _, argument = spec.partition(":")
    if name == "adaptive" and not argument:
        return Adaptive(threshold)
    if name == "all_slow" and not argument:
        return AllSlow()
    if name == "uniform" and not argument:
        return Uniform()
    if name == "uniform" and argument.isdecimal() and int(argument) > 0:
        return Uniform(int(argument))
    raise KeyeError(f"policy {spec!r} is not known; use one of {', '.join(POLICIES)}, N being 1 or more")


class Walk:
    """Walks along a clip and types its frames; it remembers the features of the latest slow frame and nothing else."""

    def __init__(self, measure: Measure, policy: Policy):
        self.measure, self.policy = measure, policy
        self._index = 0
        self._gap = 0
        self._reference: torch.Tensor | None = None

    def step(self, frames: torch.Tensor) -> tuple[list[int], list[float]]:
        """Type the next frames [T, 3, H, W] uint8; returns T types (0 slow, 1 fast) and T similarities (NaN first)."""
        features = self.measure.prepare(frames)
        types: list[int] = []
        scores: list[float] = []
        if self._reference is None and len(features):
            self._accept(features[0])
            types.append(SLOW)
            scores.append(float("nan"))
        while len(types) < len(features):
            # Scoring ahead in a batch is wasted once a slow frame turns up, so the batch grows only while none does.
            start = len(types)
            ahead = features[start : start + self._gap + 1]
            for offset, score in enumerate(self.measure.compare(self._reference, ahead).tolist()):
                self._gap += 1
                slow = self.policy.is_slow(self._index, score, self._gap)
                types.append(SLOW if slow else FAST)
                scores.append(score)
                if slow:
                    self._accept(features[start + offset])
                    break
                self._index += 1
        return types, scores

    def _accept(self, features: torch.Tensor) -> None:
        self._reference = features.clone()  # not a view: the batch it came from must be freed
        self._index += 1
        self._gap = 0
