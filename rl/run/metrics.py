"""The metrics of a GSPO step over all ranks, and its line on the screen."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from torch import Tensor

from rl.blindness import Blindness, own_metrics
from rl.questions.heldout import standard_error
from rl.questions.sampling import Experience, accuracy_of
from rl.rollout.correction import effective_share
from stages.metrics import duration

MOMENTS = (
    "entropy", "ratio", "clipped", "kl", "sampler_kl", "sampler_difference", "sampler_weight",
    "sampler_weight_squared", "applied_weight",
)  # fmt: skip
"""The values of an update whose `Moments` are exchanged."""
NO_FAMILY = "no_family"
"""Name in the metrics of the questions whose line has no `family`."""


@dataclass(frozen=True)
class Moments:
    """Count, sum and extremes of values: ranks exchange these instead of the values of millions of tokens."""

    count: int = 0
    total: float = 0.0
    least: float = math.inf
    most: float = -math.inf

    @classmethod
    def of(cls, values: Tensor) -> Moments:
        """Of the elements of a tensor of any shape."""
        if not values.numel():
            return cls()
        values = values.detach().double()
        return cls(values.numel(), values.sum().item(), values.min().item(), values.max().item())

    @classmethod
    def join(cls, parts: Iterable[Moments]) -> Moments:
        """Of all values together."""
        parts = list(parts)
        return cls(
            sum(part.count for part in parts),
            math.fsum(part.total for part in parts),
            min((part.least for part in parts), default=math.inf),
            max((part.most for part in parts), default=-math.inf),
        )

    @property
    def mean(self) -> float:
        """The mean, 0 without values."""
        return self.total / self.count if self.count else 0.0


def rollout_values(experiences: list[Experience]) -> dict[str, Any]:
    """A rank's values for `step_metrics` of the groups of a step: those it trains on, then those that were replaced."""
    groups = [group for experience in experiences for group in experience.groups]
    return {
        "informative": [bool(row.any()) for experience in experiences for row in experience.advantages],
        "families": [prompt.family for experience in experiences for prompt in experience.prompts],
        "earned": [[asdict(e) for e in group] for experience in experiences for group in experience.earned],
        "seen_blind": [row for experience in experiences for row in _seen_blind(experience)],
        "replaced": sum(len(experience.groups) for experience in experiences[1:]),
        "lengths": [len(c) for group in groups for c in group.completions],
        "finished": [f for group in groups for f in group.finished],
        "empty": [not text.strip() for group in groups for text in group.texts],
        "visual_tokens": sum(group.sample.visual_tokens for group in groups),
        "prompt_tokens": sum(len(group.sample) for group in groups),
    }


def _seen_blind(experience: Experience) -> list[tuple[float, float, int]]:
    """Accuracy with and without frames, and number of options, of the questions that were asked both ways."""
    if experience.blind is None:
        return []
    rows = zip(experience.earned, experience.blind.tolist(), experience.prompts, strict=True)
    return [(accuracy_of(group), blind, len(prompt.options)) for group, blind, prompt in rows if not math.isnan(blind)]


def step_metrics(
    step: int, ranks: list[dict[str, Any]], seconds: dict[str, float], blindness: Blindness | None = None
) -> dict[str, Any]:
    """Metrics of one step from the values of every rank (see `rollout_values` and `GspoTrainer.train_step`).

    Rewards, lengths and tokens are of all groups that were answered, also of those that others have replaced.

    reward_stderr is over prompts, because the answers of a group share their question. clip_fraction and the ratios
    are over the sequences of informative groups (over their tokens, if the loss has a ratio for each token), in all
    mini-batches, and absent without such a group. informative is the share of such groups, those with an advantage
    after hints and guard; all_wrong that of groups without a right answer; empty is the share of answers without text.
    Answers that do not count enter no mean of rewards. failures: see `failure_warnings`, for the log. rejected, the
    questions left out so far, is the same on every rank.
    """

    def flat(name: str) -> list[Any]:
        return [item for rank in ranks for item in rank[name]]

    earned, families, lengths, updates = flat("earned"), flat("families"), flat("lengths"), flat("updates")
    counted = [[e for e in group if e["counts"]] for group in earned]
    rewards = [fmean(e["total"] for e in group) for group in counted if group]
    parts = _parts([e for group in earned for e in group])
    per_family = defaultdict(list)
    for family, group in zip(families, earned, strict=True):
        per_family[family] += [e["parts"].get("accuracy", e["total"]) for e in group if e["counts"]]
    values = {name: Moments.join(Moments(**update[name]) for update in updates) for name in MOMENTS}
    tokens = sum(lengths) + sum(rank["prompt_tokens"] for rank in ranks)
    return {
        "step": step,
        "loss": fmean(update["loss"] for update in updates),
        "reward_mean": _mean(rewards),
        "reward_stderr": standard_error(rewards),
        **parts,
        **{f"accuracy/{name or NO_FAMILY}": fmean(given) for name, given in sorted(per_family.items()) if given},
        "informative": fmean(flat("informative")),
        "all_wrong": _mean([float(_all_wrong(group)) for group in counted if group]),
        **({"replaced": replaced} if (replaced := sum(rank.get("replaced", 0) for rank in ranks)) else {}),
        **own_metrics([row for rank in ranks for row in rank.get("seen_blind", ())], blindness or Blindness()),
        **_of_informative(values),
        **{name: values[name].mean for name in ("kl", "sampler_kl") if values[name].count},
        **_sampler(values),
        "response_length": fmean(lengths),
        "finished": fmean(flat("finished")),
        "empty": fmean(flat("empty")),
        "grad_norm": fmean(update["grad_norm"] for update in updates),
        "tokens": tokens,
        "visual_tokens": sum(rank["visual_tokens"] for rank in ranks),
        "tokens_per_second": tokens / sum(seconds.values()),
        "seconds": sum(seconds.values()),
        "seconds_rollout": seconds["rollout"],
        "seconds_update": seconds["update"],
        "rejected": ranks[0]["rejected"],
        "failures": failure_warnings(earned),
    }


def _of_informative(values: dict[str, Moments]) -> dict[str, float]:
    """Metrics of the groups with an advantage; empty for a step without one."""
    ratio = values["ratio"]
    if not ratio.count:
        return {}
    return {
        "clip_fraction": values["clipped"].mean,
        "ratio_mean": ratio.mean,
        "ratio_min": ratio.least,
        "ratio_max": ratio.most,
        "entropy": values["entropy"].mean,
    }


def _parts(earned: list[dict[str, Any]]) -> dict[str, float]:
    """Mean of each reward over the answers that it applies to and that count, and the number of its failures."""
    found: dict[str, float] = {}
    for name in dict.fromkeys(name for e in earned for name in e["parts"]):
        found[f"reward/{name}"] = _mean([e["parts"][name] for e in earned if name in e["parts"] and e["counts"]])
        found[f"reward_failures/{name}"] = sum(name in e["failures"] for e in earned)
    return found


def _all_wrong(group: list[dict[str, Any]]) -> bool:
    """Whether no answer of a group is right, by the reward `accuracy` or else by the sum, as hints do by default."""
    return all(e["parts"].get("accuracy", e["total"]) < 0.5 for e in group)


def _mean(values: list[float]) -> float:
    """The mean; 0 of no values, as when no answer of a step was judged."""
    return fmean(values) if values else 0.0


def failure_warnings(earned: list[list[dict[str, Any]]]) -> dict[str, str]:
    """Kind → sentence for each reward that failed in a step, with the number of failures and the first cause."""
    flat = [e for group in earned for e in group]
    causes = [(name, cause) for e in flat for name, cause in e["failures"].items()]
    first = dict(reversed(causes))
    counts = Counter(name for name, _ in causes)
    return {
        f"reward/{name}": f"the reward {name} failed for {count} of {len(flat)} answers, first because: {first[name]}"
        for name, count in sorted(counts.items())
    }


def _sampler(values: dict[str, Moments]) -> dict[str, float]:
    """How far the sampler is from the trainer; empty if it gave no log-probabilities.

    sampler_ess is the effective sample size of the sequences as a share of their number.
    """
    difference, weight = values["sampler_difference"], values["sampler_weight"]
    if not difference.count:
        return {}
    return {
        "sampler_difference_mean": difference.mean,
        "sampler_difference_max": difference.most,
        "sampler_ess": effective_share(weight.total, values["sampler_weight_squared"].total, weight.count),
        "importance_weight": values["applied_weight"].mean,
    }


def step_summary(values: dict[str, Any]) -> str:
    """A step's metrics as a line."""
    heldout = f"held-out {values['heldout/reward']:.3f}  " if "heldout/reward" in values else ""
    gap = f"gap {values['gap/smallest']:+.2f}  " if "gap/smallest" in values else ""
    informative = "no advantage  "
    if "entropy" in values:
        informative = (
            f"entropy {values['entropy']:.2f}  clipped {values['clip_fraction']:.0%}  "
            f"ratio {values['ratio_min']:.3f}…{values['ratio_max']:.3f}  "
        )
    return (
        f"reward {values['reward_mean']:.3f} ± {values['reward_stderr']:.3f}  {heldout}{gap}"
        f"length {values['response_length']:.1f}  {informative}"
        f"{values['tokens_per_second']:,.0f} tokens/s  {duration(values['eta_seconds'])} left"
    )
