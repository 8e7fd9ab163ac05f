"""Classification of a clip's frames as slow or fast by a policy, independent of how the frames are batched.

    limits = Limits(size=(720, 1280), ratio=0.3, ...)
    classifier = FrameClassifier(measure, get_policy("adaptive:max_gap=16", threshold), limits)
    for frames in batches:                          # uint8 [T, 3, H, W]
        types, scores = classifier.step(frames)     # both empty where the policy is not `online`
    decisions = classifier.finish()                 # types, scores, positions, warnings, threshold, max_tokens
    limits.allocate(slow, fast, fast_tokens=policy.fast_tokens, max_tokens=decisions.max_tokens)

Entry i of the decisions shows the sampled frame `positions[i]`. `policy.most_frames(max_tokens, min_tokens)` is the
number of frames that may be sampled, so that all fit at their minimum.
"""

import math

import torch

from keye.errors import KeyeError
from keye.slowfast.measures.base import Measure
from keye.slowfast.policies.base import FAST, SLOW, ClipFeatures, Decisions, Limits, Policy, WalkState
from keye.slowfast.policies.ladder import LadderWalk


class FrameClassifier:
    """Classifies the frames of a clip or stream.

    Under an `online` policy it keeps the features of the latest slow frame (and of the latest frame, where the policy
    `looks_back`), under other policies those of all frames until `finish`.

    Args:
        limits: sizes and budget of the clip; needed by policies that are not `online`. It may be set later, before the
            first frame.
        frames: about how many frames there are; needed by policies with a pass of their own.
        remember: keep types and scores for `finish`. False keeps nothing, for a stream of any length.

    Attributes:
        sizes: (height, width) of each frame of the latest step, None for a frame that is not shown; empty where the
            policy does not set sizes.

    Raises:
        KeyeError: `remember` is false, and the policy is not `online` and has no pass of its own.
    """

    def __init__(
        self,
        measure: Measure,
        policy: Policy,
        limits: Limits | None = None,
        *,
        frames: int = 1,
        remember: bool = True,
    ):
        if not policy.online and not policy.walks and not remember:
            raise KeyeError(
                f"policy {policy.spec} needs all frames of a clip to decide; stream with adaptive, all_slow, uniform,"
                " strided, random or ladder"
            )
        self.measure, self.policy, self.limits, self.frames = measure, policy, limits, frames
        self.sizes: list[tuple[int, int] | None] = []
        self._walk: LadderWalk | None = None
        self._remember = remember
        self._types: list[int] = []
        self._scores: list[float] = []
        self._blocks: list[torch.Tensor] = []
        self._state = WalkState()
        self._reference: torch.Tensor | None = None
        self._latest: torch.Tensor | None = None

    def step(self, frames: torch.Tensor) -> tuple[list[int], list[float]]:
        """Classify the next frames uint8 [T, 3, H, W].

        Returns:
            T types (0 slow, 1 fast) and T similarities (NaN for the first frame); both empty where the policy is not
            `online`, unless it has a pass of its own and `remember` is false.
        """
        if self.policy.walks:
            return self._step_of_walk(frames) if len(frames) else ([], [])
        return self.step_features(self.measure.prepare(frames)) if len(frames) else ([], [])

    def step_features(self, features: torch.Tensor) -> tuple[list[int], list[float]]:
        """Classify the next frames by their features [T, ...]; see `step`."""
        if not self.policy.online:
            self._blocks.append(features.clone())  # not a view: the caller may reuse the frames' memory
            return [], []
        types, scores = self._judge(features)
        if self._remember:
            self._types += types
            self._scores += scores
        return types, scores

    def finish(self) -> Decisions:
        """The decisions about all frames; a policy that is not `online` decides here.

        Raises:
            ValueError: `remember` is false, or limits are missing.
        """
        if not self._remember:
            raise ValueError("finish() needs FrameClassifier(..., remember=True)")
        if self.policy.online:
            return Decisions(self._types, self._scores, list(range(len(self._types))))
        if self._walk is not None:
            return self._walk.finish()
        if not self._blocks:
            return Decisions([], [], [])
        if self.limits is None:
            raise ValueError(f"policy {self.policy.spec} needs the limits of the clip")
        return self.policy.decide(ClipFeatures(self.measure, self._blocks), self.limits)

    def _step_of_walk(self, frames: torch.Tensor) -> tuple[list[int], list[float]]:
        if self._walk is None:
            if self.limits is None:
                raise ValueError(f"policy {self.policy.spec} needs the limits of the clip")
            self._walk = self.policy.walk(self.measure, self.limits, self.frames, remember=self._remember)
        types, scores, self.sizes = self._walk.step(frames)
        return ([], []) if self._remember else (types, scores)

    def _judge(self, features: torch.Tensor) -> tuple[list[int], list[float]]:
        types: list[int] = []
        scores: list[float] = []
        if self._reference is None:
            self._reference = features[0].clone()  # not a view, so that its batch is freed
            types.append(SLOW)
            scores.append(math.nan)
        while len(types) < len(features):
            # Scores beyond the next slow frame are wasted, so the batch grows only while frames are fast.
            start = len(types)
            ahead = features[start : start + self._state.gap + 1]
            for index, score in enumerate(self.measure.compare(self._reference, ahead).tolist(), start):
                slow = self._state.judge(self.policy, score, self._look_back(features, index, score))
                types.append(SLOW if slow else FAST)
                scores.append(score)
                if slow:
                    self._reference = features[index].clone()
                    break
        if self.policy.looks_back:
            self._latest = features[-1].clone()
        return types, scores

    def _look_back(self, features: torch.Tensor, index: int, score: float) -> float:
        """Similarity of features[index] with the frame before it, which may be in an earlier batch."""
        if not self.policy.looks_back:
            return math.nan
        if self._state.gap == 0:  # the frame before is the latest slow one
            return score
        before = features[index - 1] if index else self._latest
        return self.measure.compare(before, features[index : index + 1]).item()
