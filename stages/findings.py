"""What a finished run has shown: read from its files, with the standard errors that tell it from luck."""

import json
import math
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class FamilyFinding:
    """How one family of questions went. Accuracies are shares in [0, 1]; those not yet measured are NaN.

    Attributes:
        n: questions in the held-out set.
        chance: accuracy of a uniform guess among the options.
        majority: accuracy of always giving the most frequent answer of the held-out set.
        blind, before, after: accuracy without the video, of the annealed model, and of the model after GSPO.
    """

    family: str
    n: int
    chance: float
    majority: float
    blind: float
    before: float
    after: float

    @property
    def learnt(self) -> bool:
        """Whether the annealed model is above chance and above its blind self by more than two standard errors."""
        own, blind = stderr(self.before, self.n), stderr(self.blind, self.n)
        return self.before - self.chance > 2 * own and self.before - self.blind > 2 * math.hypot(own, blind)


@dataclass(frozen=True)
class RewardFinding:
    """Mean reward on held-out questions before and after GSPO, with their standard errors and that of the gain."""

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


def stderr(share: float, n: int) -> float:
    """Standard error of a share of `n` with two successes and two failures added (Agresti–Coull), so never zero."""
    if not n or math.isnan(share):
        return math.nan
    centre = (share * n + 2) / (n + 4)
    return math.sqrt(centre * (1 - centre) / (n + 4))


def families(run: Path) -> list[FamilyFinding]:
    """Findings per family from `evaluation/{annealing,annealing_blind,gspo}.json`; empty before the first of them."""
    before, blind, after = (
        read_json(run / "evaluation" / f"{name}.json").get("families", {})
        for name in ("annealing", "annealing_blind", "gspo")
    )
    return [
        FamilyFinding(
            family=name,
            n=int(row["n"]),
            chance=float(row["chance"]),
            majority=float(row["majority"]),
            blind=float(blind.get(name, {}).get("accuracy", math.nan)),
            before=float(row["accuracy"]),
            after=float(after.get(name, {}).get("accuracy", math.nan)),
        )
        for name, row in before.items()
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


def read_json(path: Path) -> dict:
    """The JSON object in `path`, or an empty one when there is no such file."""
    return json.loads(path.read_text()) if path.exists() else {}


def read_jsonl(path: Path) -> list[dict]:
    """The objects in a JSONL file, without a last line that was cut off while being written; empty without the file."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
