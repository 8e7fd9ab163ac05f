"""States of one run put into another: where does the answer of a clip differ from that of its counterfactual?

Two prompts of the same tokens and positions, such as a question about a clip and about another clip with the pixels of
the first one's frame sizes (the control "other"). The right run has answer a, the counterfactual run answer b. The
contrast of a run is log P(a) − log P(b). Restored is the share of the difference of contrasts that a patch brings back.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from keye.errors import KeyeError
from keye.evaluation.trace.groups import TokenGroup
from keye.evaluation.trace.knockout import first_of_the_tail
from keye.evaluation.trace.prompt import Prompt
from keye.evaluation.trace.tracer import Patch, Row, Tracer

EQUAL = 1e-3
"""Contrasts in nats that differ by less are equal."""


@dataclass(frozen=True)
class Patching:
    """Effects of states of the right run in the counterfactual run.

    Attributes:
        groups: the patched groups.
        right, wrong: contrasts of the two runs without patches, in nats.
        restored: `[groups][blocks]`; 0: like the counterfactual run, 1: like the right run. NaN if both are equal.
        handed_over: the first block from which on the right run's state of the prompt's last token alone makes the
            counterfactual run prefer the right answer. The depth, if none does: the answers then begin
            with the same token, or a later token decides.
        committed: the first block from which on the right run's states of all other tokens no longer do, so that the
            answer is decided in the last token: the causal commitment.
    """

    groups: tuple[TokenGroup, ...]
    right: float
    wrong: float
    restored: tuple[tuple[float, ...], ...]
    handed_over: int
    committed: int


@torch.no_grad()
def patch(
    tracer: Tracer,
    right: Prompt,
    wrong: Prompt,
    answers: tuple[Sequence[int], Sequence[int]],
    groups: Sequence[TokenGroup] | None = None,
) -> Patching:
    """Patch each group after each block.

    Args:
        tracer: of the model.
        right: the prompt whose states are used.
        wrong: the counterfactual prompt, into whose run they are put.
        answers: the answer of the right prompt and that of the counterfactual one.
        groups: default: those of `right`.

    Raises:
        KeyeError: prompts whose tokens have other positions, or two equal answers.
    """
    if not torch.equal(right.positions, wrong.positions):
        raise KeyeError(
            f"the prompts have {len(right)} and {len(wrong)} tokens at different positions, so states have no "
            "counterpart; give a counterfactual with the same frame sizes and question"
        )
    if list(answers[0]) == list(answers[1]):
        raise KeyeError("both prompts have the same answer, so nothing can be restored; give another counterfactual")
    groups = list(right.groups if groups is None else groups)
    depth, last = tracer.anatomy.depth, len(right) - 1
    states = tracer.states(right)
    rows = [
        Row(patches=(Patch(layer, places, states[layer + 1, list(places)]),))
        for places in (*(group.places for group in groups), tuple(range(last)))
        for layer in range(depth)
    ]
    base_right = float(contrasts(tracer, right, answers, [Row()])[0])
    base_wrong, *patched = contrasts(tracer, wrong, answers, [Row(), *rows]).tolist()
    span = base_right - base_wrong
    *by_group, others = [patched[i * depth : (i + 1) * depth] for i in range(len(groups) + 1)]
    share = [
        tuple((v - base_wrong) / span if abs(span) > EQUAL else float("nan") for v in values) for values in by_group
    ]
    committed = first_of_the_tail([value <= 0 for value in others])
    handed = handed_over(tracer, right, wrong, answers)
    return Patching(tuple(groups), base_right, base_wrong, tuple(share), handed, committed)


@torch.no_grad()
def handed_over(tracer: Tracer, right: Prompt, wrong: Prompt, answers: tuple[Sequence[int], Sequence[int]]) -> int:
    """`Patching.handed_over`, which also fits prompts of different lengths; the depth, if no state restores the answer.

    Only the state of the last token is patched, from the last token of `right` into that of `wrong`.
    """
    states = tracer.run(right, [0], record=[len(right) - 1]).states[0, 1:, 0]
    last = (len(wrong) - 1,)
    rows = [Row(patches=(Patch(layer, last, state[None]),)) for layer, state in enumerate(states)]
    return first_of_the_tail([value > 0 for value in contrasts(tracer, wrong, answers, rows).tolist()])


def contrasts(
    tracer: Tracer, prompt: Prompt, answers: tuple[Sequence[int], Sequence[int]], rows: Sequence[Row]
) -> torch.Tensor:
    """log P(first answer) − log P(second answer) `[rows]` of a prompt under each row's interventions, in nats."""
    return tracer.run(prompt, answers[0], rows).score - tracer.run(prompt, answers[1], rows).score
