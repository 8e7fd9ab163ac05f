"""What a truncated answer, one that reached the limit of new tokens before an end token, counts for.

"wrong" (the default): rewards see that it is not finished and give it nothing. "penalise": it also costs a penalty, and
with `buffer` the penalty begins before the limit L, as in DAPO (2503.14476, equation 13):

    0 for |y| ≤ L − buffer,   (L − buffer − |y|) / buffer · penalty above,   −penalty if truncated

"mask": it has no advantage, and the others of its group are compared without it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from rl.policy.scoring import Group
from rl.rewards import Earned

KINDS = ("wrong", "mask", "penalise")


@dataclass(frozen=True)
class Truncation:
    """The treatment of truncated answers.

    kind: of `KINDS`. limit: new tokens of an answer at most. buffer: tokens below the limit over which the penalty
    rises; 0 = only truncated answers are penalised. penalty: of a truncated answer.
    """

    kind: str
    limit: int
    buffer: int = 0
    penalty: float = 1.0

    def treated(self, earned: list[list[Earned]], groups: list[Group]) -> list[list[Earned]]:
        """What P groups of G answers earn: with the penalty as the part "overlong", or without truncated answers."""
        if self.kind == "wrong":
            return earned
        return [
            [self._treated(*one) for one in zip(own, group.completions, group.finished, strict=True)]
            for own, group in zip(earned, groups, strict=True)
        ]

    def _treated(self, earned: Earned, completion: Tensor, finished: bool) -> Earned:
        if self.kind == "mask":
            return replace(earned, counts=earned.counts and finished)
        charge = -self.penalty * self._excess(len(completion), finished)
        return replace(earned, total=earned.total + charge, parts=earned.parts | {"overlong": charge})

    def _excess(self, length: int, finished: bool) -> float:
        """From 0 to 1."""
        if not finished:
            return 1.0
        return max(0.0, (length - self.limit + self.buffer) / self.buffer) if self.buffer else 0.0
