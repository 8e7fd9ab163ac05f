"""Warnings from a step's metrics: no advantage, answers that are empty or cut off, numbers that are not finite."""

from __future__ import annotations

import math
from typing import Any


def warnings_of(metrics: dict[str, Any], max_new_tokens: int) -> dict[str, str]:
    """Kind → sentence for each problem of a step; empty for a step without problems."""
    found = {}
    if metrics["empty"] == 1:
        found["empty"] = (
            "every answer is empty: the model ends its turn with its first token; see before.jsonl, and start from a "
            "model that was trained on these questions"
        )
    elif metrics["finished"] == 0:
        found["unfinished"] = (
            f"no answer ended within gspo.max_new_tokens = {max_new_tokens}, and an unfinished answer is wrong; "
            "raise it"
        )
    if metrics["informative"] == 0:
        found["constant"] = (
            f"all answers to each question earned the same (mean reward {metrics['reward_mean']:.3f}), or the guard "
            "against blindness left the questions out, so every advantage is zero and no answer has a gradient; use "
            "questions that are neither too hard nor too easy, or raise gspo.group_size or gspo.temperature"
        )
    if not math.isfinite(metrics["loss"]) or not math.isfinite(metrics["grad_norm"]):
        found["nonfinite"] = (
            "the loss or its gradient is not a finite number, so optimizer steps are skipped; resume from a checkpoint "
            "with a lower gspo.learning_rate, and look at the rewards of this step"
        )
    return found
