"""The policy: the distribution that completions are sampled from, and their log-probabilities.

Sampling (`rl.rollout`) and training share `token_log_probs`, so their log-probabilities are of the same distribution:
softmax(logits / temperature) in float32, without the two placeholder tokens. A completion must not contain a
placeholder, because the model would replace it by visual features.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from keye.model.heads import RowScores
from keye.processor.sample import Sample, batch_blocks
from keye.slowfast.pixels import join
from rl.policy.prefix import PrefixTree


@dataclass(frozen=True)
class Group:
    """G completions of one prompt."""

    sample: Sample
    """The encoded prompt, with its vision inputs and the `VideoPlan` of every video."""

    completions: list[Tensor]
    """G of int64 [Lc], Lc ≥ 1, with the end token if it was reached."""

    log_probs: list[Tensor]
    """G of float32 [Lc], of the rollout engine, of softmax(logits / temperature) over all tokens."""

    finished: list[bool]
    """G: whether an end token was reached."""

    texts: list[str]
    """The decoded completions, without special tokens."""

    sampler_log_probs: list[Tensor] | None = None
    """G of float32 [Lc], of the distribution that was sampled from, if it was cut by top-p or top-k."""


@dataclass(frozen=True)
class Score:
    """The T completion tokens of a list of groups, one after another: log_probs and entropy float32 [T], owner [T]."""

    log_probs: Tensor
    entropy: Tensor
    owner: Tensor


def token_log_probs(logits: Tensor, temperature: float, banned: tuple[int, ...]) -> Tensor:
    """logits [.., V] in any dtype → log-probabilities of the sampling distribution, float32 [.., V]."""
    logits = logits.float() / temperature
    places = torch.tensor(banned, dtype=torch.long, device=logits.device)
    return logits.index_fill(-1, places, float("-inf")).log_softmax(-1)


def banned_tokens(model: nn.Module) -> tuple[int, ...]:
    """Ids of the placeholders, which a completion must not contain."""
    return model.config.image_token_id, model.config.video_token_id


def score(model: nn.Module, groups: list[Group], temperature: float = 1.0) -> Score:
    """The training forward over the completions of `groups`; every prompt is read once (see `rl.policy.prefix`).

    Args:
        model: `KeyeForConditionalGeneration`, or the DeepSpeed engine around it.

    Returns:
        Log-probabilities (with gradient where it is enabled) and entropy of all completion tokens.
    """
    device = next(model.parameters()).device
    row = packed(groups)
    log_probs, entropy = model(
        input_ids=row.input_ids[None].to(device),
        position_ids=row.position_ids[:, None].to(device),
        cu_seqlens=row.tree.cu_seqlens().to(device),
        varlen=row.tree.attention,
        logits_to_keep=row.tree.predictors().to(device),
        row_targets=row.targets.to(device),
        row_scores=row_scores(model, temperature),
        **vision_inputs([group.sample for group in groups], device),
    ).scores
    return Score(log_probs, entropy, row.tree.owner().to(device))


@dataclass(frozen=True)
class Row:
    """Groups in one packed row of L tokens: input_ids int64 [L], position_ids int64 [3, L], completion tokens [T]."""

    tree: PrefixTree
    input_ids: Tensor
    position_ids: Tensor
    targets: Tensor


def packed(groups: list[Group]) -> Row:
    """The groups in one row, each prompt once."""
    samples = [group.sample for group in groups]
    tree = PrefixTree([len(s.input_ids) for s in samples], [[len(c) for c in group.completions] for group in groups])
    continued = [[continued_positions(g.sample, len(c)) for c in g.completions] for g in groups]
    return Row(
        tree,
        tree.pack([s.input_ids for s in samples], [group.completions for group in groups]),
        tree.pack([s.position_ids for s in samples], continued),
        torch.cat([completion for group in groups for completion in group.completions]),
    )


def row_scores(model: nn.Module, temperature: float) -> RowScores:
    """What the model, or the DeepSpeed engine around it, computes of the logits that predict a completion's tokens."""
    return partial(_score_rows, temperature=temperature, banned=banned_tokens(getattr(model, "module", model)))


def _score_rows(logits: Tensor, targets: Tensor, temperature: float, banned: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and the entropy of each row: logits [R, V], targets [R] → two float32 [R]."""
    table = token_log_probs(logits, temperature, banned)
    entropy = torch.special.entr(table.detach().exp()).sum(-1)
    return table.gather(-1, targets[:, None])[:, 0], entropy


def continued_positions(sample: Sample, length: int) -> Tensor:
    """Positions int64 [3, length] of text that follows a prompt: from its largest position + 1, equal in T, H, W."""
    first = int(sample.position_ids.max()) + 1
    return torch.arange(first, first + length).expand(3, -1)


def vision_inputs(samples: list[Sample], device: torch.device) -> dict[str, Tensor]:
    """The pixels and grids of several prompts, each once, in the order of their placeholders."""
    names = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")
    columns = {name: [getattr(s, name) for s in samples if getattr(s, name) is not None] for name in names}
    blocks = batch_blocks(samples)
    aggregated = {} if blocks is None else {"video_blocks": blocks.to(device)}
    return {name: join(column).to(device) for name, column in columns.items() if column} | aggregated
