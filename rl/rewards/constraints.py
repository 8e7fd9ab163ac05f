"""Rewards for constraints on the form of an answer, as a manifest's line lists them under `constraints`."""

from __future__ import annotations

from statistics import fmean

from keye.processor.reply import parse_reply
from rl.alignment import read_constraints
from rl.rewards.base import Judgement, register


def satisfied(judgement: Judgement) -> list[bool]:
    """For each constraint of the prompt, whether the answer satisfies it; a truncated answer satisfies none.

    The thought is not part of the answer, and an answer in `<answer>…</answer>` is what is between the tags.
    """
    entries = judgement.prompt.extra.get("constraints", [])
    found = read_constraints(entries, judgement.prompt.where)
    text = parse_reply(judgement.text).answer if judgement.finished else ""
    return [constraint.check(text) for constraint in found]


@register("constraints")
class Constraints:
    """The share of the prompt's constraints that the answer satisfies; 0 for a prompt without constraints."""

    in_process = True

    def __call__(self, judgement: Judgement) -> float:
        return fmean(satisfied(judgement) or [0.0])


@register("all_constraints")
class AllConstraints:
    """1 when the answer satisfies every constraint of the prompt; 0 for a prompt without constraints."""

    in_process = True

    def __call__(self, judgement: Judgement) -> float:
        held = satisfied(judgement)
        return float(bool(held) and all(held))
