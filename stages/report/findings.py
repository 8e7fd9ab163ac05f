"""Results of a finished run, read from its files, with standard errors that separate them from chance."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from keye.checkpoint import shards
from keye.evaluation import CONTROLS, Score
from stages.data.items import COUNTS
from stages.metrics import read_metrics


@dataclass(frozen=True)
class FamilyFinding:
    """The scores of one family of held-out questions; None for those not measured yet.

    before: the annealed model, with its chance and majority baselines. blind: the same model without the video. zeroed:
    the same model with the same tokens and all pixels zero. after: the model after GSPO. pictures: whether the
    questions have pictures. further: the other measured controls of `keye.evaluation.CONTROLS`.
    """

    family: str
    before: Score
    blind: Score | None
    zeroed: Score | None
    after: Score | None
    pictures: bool = True
    further: dict[str, Score] = field(default_factory=dict)

    @property
    def controls(self) -> dict[str, Score | None]:
        """Control → score, in the order of `keye.evaluation.CONTROLS`, blind and zeroed always."""
        found = {"blind": self.blind, "zeroed": self.zeroed, **self.further}
        return {name: found[name] for name in CONTROLS if name in found}

    @property
    def compared(self) -> list[Score | None]:
        """The controls that a learnt family must exceed: one frame, or frames in any order, may be enough for some."""
        return [score for name, score in self.controls.items() if name in ("blind", "zeroed", "other")]

    @property
    def learnt(self) -> bool:
        """Whether the annealed model is above chance and above the controls by more than two standard errors.

        The controls are blind, zeroed and, if measured, another clip's pixels. Questions without pictures are compared
        with chance alone.
        """
        if self.before.accuracy - self.before.chance <= 2 * self.before.stderr:
            return False
        if not self.pictures:
            return True
        return all(
            control is not None
            and self.before.accuracy - control.accuracy > 2 * math.hypot(self.before.stderr, control.stderr)
            for control in self.compared
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
    """Findings per family from `evaluation/{annealing,annealing_<control>,gspo}.json`; empty before the first."""

    def scores(name: str) -> dict[str, Score]:
        report = read_json(run / "evaluation" / f"{name}.json")
        return {family: Score(**values) for family, values in report.get("families", {}).items()}

    before, after = scores("annealing"), scores("gspo")
    controls = {name: scores(f"annealing_{name}") for name in CONTROLS}
    blind, zeroed = controls.pop("blind"), controls.pop("zeroed")
    return [
        FamilyFinding(
            family, score, blind.get(family), zeroed.get(family), after.get(family), not blind or family in blind,
            {name: found[family] for name, found in controls.items() if family in found},
        )
        for family, score in before.items()
    ]  # fmt: skip


def measured_controls(found: Sequence[FamilyFinding]) -> list[str]:
    """The controls that were measured for some family, blind and zeroed always, in the order of all tables."""
    return [name for name in CONTROLS if name in ("blind", "zeroed") or any(name in row.controls for row in found)]


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
