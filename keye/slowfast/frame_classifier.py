"""A walk along a clip: each frame gets its type from a policy, the same however the frames come in batches.

Policies that are `online` work on a stream with the memory of one slow frame; the others hold the features of all
frames.

    limits = Limits(size=(720, 1280), ratio=0.3, ...)
    walk = FrameClassifier(measure, get_policy("adaptive:max_gap=16", threshold), limits)
    for frames in batches:                      # uint8 [T, 3, H, W]
        types, scores = walk.step(frames)       # both empty where the policy is not `online`
    decisions = walk.finish()                   # Decisions: types, scores, positions, warnings, threshold, max_tokens
    limits.allocate(slow, fast, fast_tokens=policy.fast_tokens, max_tokens=decisions.max_tokens)

Entry i of the decisions shows the sampled frame `positions[i]`. `policy.most_frames(max_tokens, min_tokens)` says how
many frames may be sampled so that their minimum fits. A live stream takes `FrameClassifier(..., remember=False)`:
`step` answers, nothing is kept, and there is no `finish`.
"""

import math

import torch

from keye.errors import KeyeError
from keye.slowfast.measures.base import Measure
from keye.slowfast.policies.base import FAST, SLOW, ClipFeatures, Decisions, Limits, Policy, WalkState


class FrameClassifier:
    """Walks along a clip and types its frames, the same however they come in batches.

    For a policy that is `online` it holds the features of the latest slow frame (and of the latest frame, where the
    policy looks back), for the others those of all frames until `finish`. limits: what adaptive_budget counts tokens
    by. remember: keep types and scores for `finish`; without, memory is constant however long the stream.
    """

    def __init__(self, measure: Measure, policy: Policy, limits: Limits | None = None, *, remember: bool = True):
        if not policy.online and not remember:
            raise KeyeError(
                f"policy {policy.spec} sees the whole clip before it decides, so it cannot follow a stream; use another"
            )
        self.measure, self.policy, self.limits = measure, policy, limits
        self._remember = remember
        self._types: list[int] = []
        self._scores: list[float] = []
        self._blocks: list[torch.Tensor] = []
        self._state = WalkState()
        self._reference: torch.Tensor | None = None
        self._latest: torch.Tensor | None = None

    def step(self, frames: torch.Tensor) -> tuple[list[int], list[float]]:
        """Type the next frames [T, 3, H, W] uint8; returns T types (0 slow, 1 fast) and T similarities (NaN first).

        Both lists are empty where the policy is not `online`.
        """
        if not len(frames):
            return [], []
        features = self.measure.prepare(frames)
        if not self.policy.online:
            self._blocks.append(features.clone())  # not a view: the caller may use the frames' memory again
            return [], []
        types, scores = self._judge(features)
        if self._remember:
            self._types += types
            self._scores += scores
        return types, scores

    def finish(self) -> Decisions:
        """What was decided about all the frames; for policies that are not `online` this is where it happens."""
        if not self._remember:
            raise ValueError("a walk that remembers nothing has nothing to finish")
        if self.policy.online:
            return Decisions(self._types, self._scores, list(range(len(self._types))))
        if not self._blocks:
            return Decisions([], [], [])
        if self.limits is None:
            raise ValueError(f"policy {self.policy.spec} needs the limits of the clip")
        return self.policy.decide(ClipFeatures(self.measure, self._blocks), self.limits)

    def _judge(self, features: torch.Tensor) -> tuple[list[int], list[float]]:
        types: list[int] = []
        scores: list[float] = []
        if self._reference is None:
            self._reference = features[0].clone()  # not a view: the batch it came from must be freed
            types.append(SLOW)
            scores.append(math.nan)
        while len(types) < len(features):
            # Scoring ahead in a batch is wasted once a slow frame turns up, so the batch grows only while none does.
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
        """Similarity of features[index] with the frame just before, which may be of an earlier batch."""
        if not self.policy.looks_back:
            return math.nan
        if self._state.gap == 0:  # the frame just before is the latest slow one
            return score
        before = features[index - 1] if index else self._latest
        return self.measure.compare(before, features[index : index + 1]).item()
