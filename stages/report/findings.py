"""Results of a finished run, read from its files, with standard errors that separate them from chance."""

import math
from dataclasses import dataclass
from pathlib import Path

from keye.checkpoint import shards
from keye.evaluation import Score
from stages.data.items import COUNTS
from stages.metrics import read_metrics


@dataclass(frozen=True)
class FamilyFinding:
    """The scores of one family of held-out questions; None for those not measured yet.

    before: the annealed model, with its chance and majority baselines. blind: the same model without the video. zeroed:
    the same model with the same tokens and all pixels zero. after: the model after GSPO. pictures: whether the
    questions have pictures.
    """

    family: str
    before: Score
    blind: Score | None
    zeroed: Score | None
    after: Score | None
    pictures: bool = True

    @property
    def learnt(self) -> bool:
        """Whether the annealed model is above chance and above both controls by more than two standard errors.

        Questions without pictures are compared with chance alone.
        """
        if self.before.accuracy - self.before.chance <= 2 * self.before.stderr:
            return False
        if not self.pictures:
            return True
        return all(
            control is not None
            and self.before.accuracy - control.accuracy > 2 * math.hypot(self.before.stderr, control.stderr)
            for control in (self.blind, self.zeroed)
        )


@dataclass(frozen=True)
class RewardFinding:
    """Mean reward on held-out questions before and after GSPO, with the standard errors of both and of the gain."""

    before: float
    before_stderr: float
    after: float
    after_stderr: float
    gain_stderr: float

    @property
    def gain(self) -> float:
        return self.after - self.before

    @property
    def significant(self) -> bool:
        """Whether the reward rose by more than two standard errors."""
        return self.gain > 2 * self.gain_stderr


def families(run: Path) -> list[FamilyFinding]:
    """Findings per family from `evaluation/{annealing,annealing_blind,annealing_zeroed,gspo}.json`.

    Empty before the first of them.
    """
    before, blind, zeroed, after = (
        {
            family: Score(**scores)
            for family, scores in read_json(run / "evaluation" / f"{name}.json").get("families", {}).items()
        }
        for name in ("annealing", "annealing_blind", "annealing_zeroed", "gspo")
    )
    return [
        FamilyFinding(
            family, score, blind.get(family), zeroed.get(family), after.get(family), not blind or family in blind
        )
        for family, score in before.items()
    ]


def reward(run: Path) -> RewardFinding | None:
    """The held-out reward before and after GSPO from `gspo/eval.json`; None before it has run."""
    report = read_json(run / "gspo" / "eval.json")
    if not report or "after" not in report:
        return None
    before, after = report["before"], report["after"]
    return RewardFinding(
        before["reward_mean"],
        before["reward_stderr"],
        after["reward_mean"],
        after["reward_stderr"],
        report.get("gain_stderr", math.hypot(before["reward_stderr"], after["reward_stderr"])),
    )


def thinned(metrics: Path) -> str:
    """A sentence on the samples of a stage that were made smaller to fit, from `metrics`; "" if none were."""
    sums = dict.fromkeys(COUNTS, 0)
    for row in read_metrics(metrics):
        sums = {name: count + row.get(name, 0) for name, count in sums.items()}
    if not any(sums.values()):
        return ""
    return (
        f"{sums['thinned']:,} samples were made smaller to fit the context and lost {sums['thinned_tokens']:,}"
        f" visual tokens; {sums['warned']:,} samples had a warning"
    )


def read_json(path: Path) -> dict:
    """The JSON object in `path`; empty if there is no such file.

    Raises:
        CheckpointError: it is damaged.
    """
    return shards.read_json(path, "remove it, and run the step that writes it again") if path.exists() else {}
