"""Policies that need all frames of a clip to decide: adaptive_budget and two_stream.

They keep the features of every sampled frame until then, 12 KB a frame with the default measure and up to 600 KB with
measures that compare pixels. Policies that decide frame by frame keep those of one frame.
"""

import math
from dataclasses import dataclass, replace

from keye.errors import KeyeError
from keye.slowfast.budget import most_frames, pooled_size, size_tokens, thin
from keye.slowfast.policies.base import FAST, SLOW, ClipFeatures, Decisions, Limits, Policy, check, check_count
from keye.slowfast.policies.framewise import Adaptive

STEPS = 30  # halvings of [0, 1]: finer than float32 scores


@dataclass(frozen=True)
class AdaptiveBudget(Adaptive):
    """`adaptive` with the threshold at which a clip spends `tokens`, or has a fraction `share` of slow frames.

    share: takes the threshold with the most slow frames that does not exceed this fraction (the first frame is always
    slow).
    tokens: takes the threshold with the most slow frames that does not exceed this total, with frames at full size. It
    is never below `threshold`: where the slow frames that `threshold` gives exceed the total, all frames become
    smaller, as in the report. With `threshold` 0 only the total decides.

    The threshold is found by bisection of [0, 1]; each step classifies all frames. A higher threshold usually, but not
    always, gives more slow frames, since the reference frames change with it. Of all thresholds tried, the one with the
    most slow frames within the target is taken; a larger target never gives a lower threshold or fewer slow frames.
    Warnings say where the result misses the target.
    """

    name = "adaptive_budget"
    online = False

    tokens: int | None = None
    share: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.tokens is None) == (self.share is None):
            raise KeyeError(f"policy {self.name}: give one of tokens=N and share=S, as in {self.name}:share=0.25")
        check_count(self, "tokens")
        check(self, "share", self.share is None or 0 < self.share <= 1, "a number above 0 and at most 1")

    def most_frames(self, max_tokens: int, min_tokens: int) -> int:
        return max(1, most_frames(min(max_tokens, self.tokens or max_tokens), min_tokens))

    def decide(self, clip: ClipFeatures, limits: Limits) -> Decisions:
        if self.share is not None:
            return self._meet_share(clip)
        return self._spend_tokens(clip, limits)

    def _meet_share(self, clip: ClipFeatures) -> Decisions:
        target = max(1, int(self.share * len(clip)))
        threshold, types, scores = self._search(clip, target, 0.0)
        slow, warnings = types.count(SLOW), []
        if slow > self.share * len(clip):
            warnings.append(
                f"{slow} of {len(clip)} frames are slow, more than share={self.share}: no threshold gives fewer"
            )
        elif slow < target:
            warnings.append(
                f"{slow} of {len(clip)} frames are slow where share={self.share} allows {target}: no threshold that was"
                " tried gives more without exceeding it"
            )
        return Decisions(types, scores, list(range(len(clip))), warnings, threshold)

    def _spend_tokens(self, clip: ClipFeatures, limits: Limits) -> Decisions:
        budget, warnings = min(self.tokens, limits.max_tokens), []
        if self.tokens > limits.max_tokens:
            warnings.append(f"tokens={self.tokens} is above max_tokens={limits.max_tokens}, which applies")
        full = limits.allocate(1, 1, max_tokens=2 * limits.max_tokens_per_frame)
        slow_tokens, fast_tokens = (size_tokens(size, limits.side) for size in (full.slow_size, full.fast_size))
        spare, price = budget - len(clip) * fast_tokens, slow_tokens - fast_tokens
        # The price is 0 where all frames cost the same.
        target = len(clip) if spare >= len(clip) * price else spare // max(price, 1)
        threshold, types, scores = self._search(clip, target, min(self.threshold, 1.0))
        slow = types.count(SLOW)
        spent = slow * slow_tokens + (len(clip) - slow) * fast_tokens
        if spent * 50 < budget * 49:
            reason = "no more frames differ" if threshold == 1 else "the next threshold tried would cost more"
            reason = "all frames are slow" if slow == len(clip) else reason
            warnings.append(f"{spent} tokens of {budget} are spent with {slow} slow frames of {len(clip)}: {reason}")
        return Decisions(types, scores, list(range(len(clip))), warnings, threshold, budget)

    def _search(self, clip: ClipFeatures, target: int, floor: float) -> tuple[float, list[int], list[float]]:
        """The threshold in [`floor`, 1] with the most slow frames, at most `target`, with its types and scores.

        Where there are more than `target` at `floor`, the result is `floor`.
        """

        def at(threshold: float) -> tuple[float, list[int], list[float]]:
            return threshold, *clip.walk(replace(self, threshold=threshold))

        def slow(trial: tuple[float, list[int], list[float]]) -> int:
            return trial[1].count(SLOW)

        best = at(floor)
        if slow(best) >= target:
            return best
        low, high = floor, 1.0
        top = at(high)
        if slow(top) <= target:
            return max(best, top, key=slow)
        for _ in range(STEPS):
            middle = (low + high) / 2
            trial = at(middle)
            if slow(trial) > target:
                high = middle
                continue
            low = middle
            best = max(best, trial, key=slow)
            if slow(best) == target:
                break
        return best


@dataclass(frozen=True)
class TwoStream(Policy):
    """The two pathways of SlowFast-LLaVA (arXiv 2407.15841): a few frames at full size, and all frames at a small size.

    slow: number of frames at full size, spread evenly from the first. fast_tokens: tokens of a frame in the fast
    pathway, which contains every frame. A slow frame therefore has two entries, the slow one first.

    The paper has 10 slow frames of 24x12 tokens and 50 fast ones of 4x4. It pools after the vision tower, and its slow
    pathway comes before its fast one. Here frames are resized, and both are in the order of time; the encoder's setting
    `aggregation` pools after the vision tower, and can put the slow pathway first (`keye.aggregation`).
    """

    name = "two_stream"
    online = False
    ranks = False

    slow: int = 10
    fast_tokens: int = 16

    def __post_init__(self) -> None:
        check_count(self, "slow", "fast_tokens")

    def most_frames(self, max_tokens: int, min_tokens: int) -> int:
        """Number of sampled frames that fit; with fewer frames than `slow`, each costs both sizes."""
        both = min_tokens + self.fast_tokens
        if max_tokens <= self.slow * both:
            return max(1, max_tokens // both)
        return (max_tokens - self.slow * min_tokens) // self.fast_tokens

    def decide(self, clip: ClipFeatures, limits: Limits) -> Decisions:
        least = limits.min_tokens + size_tokens(pooled_size(*limits.size, self.fast_tokens, limits.side), limits.side)
        if least > limits.max_tokens and not limits.multiple:
            raise KeyeError(
                f"policy {self.name}: max_tokens={limits.max_tokens} does not hold one frame of {limits.min_tokens} and"
                f" {self.fast_tokens} tokens; give max_tokens={limits.min_tokens + self.fast_tokens} or more"
            )
        slow = set(thin(len(clip), self.slow))
        types, scores, positions, reference = [], [], [], 0
        for index in range(len(clip)):
            score = clip.score(reference, index) if index else math.nan
            if index in slow:
                types.append(SLOW)
                scores.append(score)
                positions.append(index)
                reference, score = index, 1.0
            types.append(FAST)
            scores.append(score)
            positions.append(index)
        warnings = []
        if len(clip) < self.slow:
            warnings.append(f"all {len(clip)} frames are slow, fewer than slow={self.slow}")
        return Decisions(types, scores, positions, warnings)
