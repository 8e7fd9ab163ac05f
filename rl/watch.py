"""What a step's metrics say is wrong with a run: steps that teach nothing, answers that are empty or cut off."""

from __future__ import annotations

from typing import Any


def warnings_of(metrics: dict[str, Any], max_new_tokens: int) -> dict[str, str]:
    """Kind → sentence, for what a user should know about a step; empty for a healthy one."""
    said = {}
    if metrics["empty"] == 1:
        said["empty"] = (
            "every answer is empty: the model ends its turn at once; look at before.jsonl, and start from a model that "
            "was trained on these questions"
        )
    elif metrics["finished"] == 0:
        said["unfinished"] = (
            f"no answer ended within gspo.max_new_tokens = {max_new_tokens}, and an answer that is cut off is wrong; "
            "raise it"
        )
    if metrics["informative"] == 0:
        said["constant"] = (
            f"all answers to each question earned the same (mean reward {metrics['reward_mean']:.3f}), so every "
            "advantage is zero and the step teaches nothing; take questions that are neither too hard nor too easy, or "
            "raise gspo.group_size or gspo.temperature"
        )
    return said
