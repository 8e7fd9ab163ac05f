"""How much of an answer depends on each group of tokens: the groups are cut off from attention, one at a time.

The effect of a group is the log-probability of the answer minus its log-probability without the group, in nats; it is
above 0 if the group supports the answer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from keye.evaluation.trace.groups import TokenGroup
from keye.evaluation.trace.prompt import Prompt
from keye.evaluation.trace.tracer import Cut, Readers, Row, Tracer


@dataclass(frozen=True)
class Effect:
    """What one group does for an answer.

    Attributes:
        group: the tokens.
        nats: log P(answer) − log P(answer | cut).
        kl: KL divergence of the distribution of the answer's first token under the cut from that without it, in nats.
        flips: whether the cut decides if the answer's first token is the most probable one: it is without the cut and
            not under it, or the reverse.
        answer_nats: the same as `nats` where only the answer's own tokens cannot read the group.
        windows: `nats` where the group is cut in the blocks of each window only.
        attention: attention weight of the tokens that predict the answer on the group, the mean over heads, blocks and
            those tokens. An observation, not an intervention.
    """

    group: TokenGroup
    nats: float
    kl: float
    flips: bool
    answer_nats: float
    windows: tuple[float, ...] = ()
    attention: float = float("nan")


def windows_of(depth: int, size: int | None = None) -> list[tuple[int, ...]]:
    """Windows of `size` neighbouring blocks (default: an eighth of the depth), one that begins at each block."""
    size = max(1, min(depth, depth // 8 if size is None else size))
    return [tuple(range(start, start + size)) for start in range(depth - size + 1)]


@torch.no_grad()
def knock_out(
    tracer: Tracer,
    prompt: Prompt,
    answer: Sequence[int],
    groups: Sequence[TokenGroup] | None = None,
    windows: Sequence[tuple[int, ...]] = (),
    attention: bool = True,
    readers: Readers = "later",
    advance: Callable[[], object] = lambda: None,
) -> list[Effect]:
    """The effect of each group on an answer.

    Args:
        tracer: of the model.
        prompt: the prompt.
        answer: its tokens.
        groups: default: those of the prompt.
        windows: blocks in which each group is also cut alone (`windows_of`).
        attention: also measure attention weights.
        readers: who cannot read a group, in `nats`, `kl`, `flips` and `windows`; "answer" is fast with prompts of any
            length, because it continues from the prompt's cache.
        advance: called after each of the 2 + len(windows) + attention measurements.
    """
    groups = list(prompt.groups if groups is None else groups)
    own = _scores(tracer, prompt, answer, groups, None, "answer")
    advance()
    later = own if readers == "answer" else _scores(tracer, prompt, answer, groups, None, "later")
    advance()
    layered, weights = [], [float("nan")] * len(groups)
    for window in windows:
        layered.append(_scores(tracer, prompt, answer, groups, window, readers)[0])
        advance()
    if attention:
        weights = attention_weights(tracer, prompt, answer, groups)
        advance()
    return [
        Effect(group, later[0][i], later[1][i], later[2][i], own[0][i], tuple(nats[i] for nats in layered), weights[i])
        for i, group in enumerate(groups)
    ]


def _scores(
    tracer: Tracer,
    prompt: Prompt,
    answer: Sequence[int],
    groups: Sequence[TokenGroup],
    layers: tuple[int, ...] | None,
    readers: Readers,
) -> tuple[list[float], list[float], list[bool]]:
    """nats, KL divergence and whether the answer flips, for each group."""
    rows = [Row(), *(Row((Cut(group.places, layers, readers),)) for group in groups)]
    runs = tracer.run(prompt, answer, rows)
    first = runs.logits[:, 0].log_softmax(-1)
    kl = (first[0].exp() * (first[0] - first)).sum(-1).clamp(min=0)
    given = first.argmax(-1) == answer[0]
    return (runs.score[0] - runs.score[1:]).tolist(), kl[1:].tolist(), (given[1:] != given[0]).tolist()


@torch.no_grad()
def attention_weights(
    tracer: Tracer, prompt: Prompt, answer: Sequence[int], groups: Sequence[TokenGroup]
) -> list[float]:
    """Attention weight on each group, see `Effect.attention`."""
    weights = tracer.run(prompt, answer, attentions=True).attentions[0].mean((0, 1, 2))
    return [float(weights[list(group.places)].sum()) for group in groups]


def shares(effects: Sequence[Effect], kinds: Sequence[str] = ("slow", "fast")) -> dict[str, float]:
    """Kind → share of the positive effect (`nats`) of these kinds; NaN if none has an effect above 0."""
    found = {e.group.kind: max(0.0, e.nats) for e in effects if e.group.kind in kinds}
    total = sum(found.values())
    return {kind: value / total if total > 0 else float("nan") for kind, value in found.items()}


@torch.no_grad()
def commitment_by_cut(tracer: Tracer, prompt: Prompt, places: Sequence[int] | None = None) -> int:
    """The block from which on the answer no longer depends on the prompt: a causal commitment, without a second run.

    In each block from the returned one to the last, cutting the prompt's last token off from `places` (default: all
    other tokens) leaves the most probable first token of the answer as it is. The depth, if the last block still needs
    them; 0, if none does.
    """
    others = tuple(range(len(prompt) - 1)) if places is None else tuple(places)
    depth = tracer.anatomy.depth
    rows = [Row((Cut(others, tuple(range(start, depth)), "answer"),)) for start in range(depth)]
    runs = tracer.run(prompt, [0], [Row(), *rows])
    top = runs.logits[:, 0].argmax(-1)
    return first_of_the_tail((top[1:] == top[0]).tolist())


def first_of_the_tail(held: Sequence[bool]) -> int:
    """The first index from which on all entries are true; the length, if the last one is false."""
    first = len(held)
    while first and held[first - 1]:
        first -= 1
    return first
