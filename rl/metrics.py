"""The metrics of a GSPO step over all ranks, and its line on the screen."""

from __future__ import annotations

from collections import defaultdict
from statistics import fmean
from typing import Any

from rl.heldout import standard_error
from stages.metrics import duration


def step_metrics(step: int, ranks: list[dict[str, Any]], seconds: dict[str, float]) -> dict[str, Any]:
    """Metrics of one step from the values of every rank (see `GspoTrainer.train_step`).

    reward_stderr is over prompts, because the answers of a group share their question. clip_fraction and the ratios
    are over the sequences of informative groups, in all mini-batches; informative is the share of such groups, empty
    the share of answers without text. rejected, the questions left out so far, is the same on every rank.
    """

    def flat(name: str) -> list[Any]:
        return [item for rank in ranks for item in rank[name]]

    earned, families, lengths, updates = flat("earned"), flat("families"), flat("lengths"), flat("updates")
    rewards = [fmean(e["total"] for e in group) for group in earned]
    informative = [len({e["total"] for e in group}) > 1 for group in earned]
    parts = {
        f"reward/{name}": fmean(e["parts"][name] for group in earned for e in group) for name in earned[0][0]["parts"]
    }
    per_family = defaultdict(list)
    for family, group in zip(families, earned, strict=True):
        per_family[family] += [e["parts"].get("accuracy", e["total"]) for e in group]
    ratio = [value for update in updates for value in update["ratio"]]
    tokens = sum(lengths) + sum(rank["prompt_tokens"] for rank in ranks)
    return {
        "step": step,
        "loss": fmean(update["loss"] for update in updates),
        "reward_mean": fmean(rewards),
        "reward_stderr": standard_error(rewards),
        **parts,
        **{f"accuracy/{family}": fmean(values) for family, values in sorted(per_family.items())},
        "informative": fmean(informative),
        "clip_fraction": fmean(clipped for update in updates for clipped in update["clipped"]),
        "ratio_mean": fmean(ratio),
        "ratio_min": min(ratio),
        "ratio_max": max(ratio),
        "entropy": fmean(value for update in updates for value in update["entropy"]),
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
    }


def step_summary(values: dict[str, Any]) -> str:
    """A step's metrics as a line."""
    return (
        f"reward {values['reward_mean']:.3f} ± {values['reward_stderr']:.3f}  {values['tokens_per_second']:,.0f} "
        f"tokens/s  {duration(values['eta_seconds'])} left"
    )
