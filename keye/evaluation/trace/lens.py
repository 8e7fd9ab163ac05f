"""What each block's state already says: the logit lens at the token that predicts the answer."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from keye.evaluation.trace.prompt import Prompt
from keye.evaluation.trace.tracer import Tracer

SETTLED_NATS = 0.1


@dataclass(frozen=True)
class Lens:
    """The distribution of the answer's first token after the embeddings and after each block, depth + 1 entries.

    Attributes:
        top: the most probable token.
        top_probability: its probability.
        answer_log_prob: log-probability of the answer's first token, in nats.
        kl: KL divergence of the final distribution from this one, in nats; 0 after the last block.
        settled: the first entry from which on the most probable token is the final one and `kl` is below 0.1 nats.
    """

    top: tuple[int, ...]
    top_probability: tuple[float, ...]
    answer_log_prob: tuple[float, ...]
    kl: tuple[float, ...]
    settled: int


@torch.no_grad()
def lens(tracer: Tracer, prompt: Prompt, answer: Sequence[int], normed: bool = True) -> Lens:
    """The lens at the last token of a prompt.

    Args:
        tracer: of the model.
        prompt: the prompt.
        answer: its tokens; the first one is scored.
        normed: read states through the model's final norm, so that the last entry is the model's output. Without the
            norm (the concept scores of arXiv 2510.06107) scales differ between layers.
    """
    states = tracer.run(prompt, answer[:1], record=[len(prompt) - 1]).states[0, :, 0]
    return lens_of(tracer.anatomy.read_out(states, normed), int(answer[0]))


def lens_of(logits: Tensor, answer: int) -> Lens:
    """The lens of logits `[depth + 1, vocab]`."""
    log_probs = logits.float().log_softmax(-1)
    final = log_probs[-1]
    kl = (final.exp() * (final - log_probs)).sum(-1).clamp(min=0)
    chances, top = log_probs.exp().max(-1)
    settled = len(top) - 1
    while settled and top[settled - 1] == top[-1] and kl[settled - 1] < SETTLED_NATS:
        settled -= 1
    return Lens(
        tuple(top.tolist()), tuple(chances.tolist()), tuple(log_probs[:, answer].tolist()), tuple(kl.tolist()), settled
    )
