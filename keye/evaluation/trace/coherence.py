"""CAS and DSS: which of two readings the states of a layer are closer to (arXiv 2510.06107), and markers on them.

Both are similarities, not interventions. Choices that change the result are arguments: words with or without a leading
space, states before or after the final norm. `keye.evaluation.trace.knockout.commitment_by_cut` is the causal
counterpart of the marker "commitment".
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from keye.errors import KeyeError
from keye.evaluation.trace.groups import TokenGroup
from keye.evaluation.trace.prompt import Prompt
from keye.evaluation.trace.tracer import Tracer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ONSET_FALL, ONSET_LAYERS = 0.02, 2
INVERTED, COMMITTED, COMMITTED_LAYERS = 0.8, 0.5, 3
DSS_ONSET, DSS_INVERTED = 0.6, 0.5


@dataclass(frozen=True)
class Markers:
    """Layers where a coherence falls; None where it does not.

    Attributes:
        onset: the first layer with a score more than 0.02 below that of the layer before it that does not return in
            the next layer either. In DSS: the first below 0.6.
        inversion: the first layer below 0.8. In DSS: the first below 0.5.
        commitment: the first layer from the inversion on that is below 0.5 three times in succession. In DSS: the layer
            of the lowest score.
    """

    onset: int | None
    inversion: int | None
    commitment: int | None


def piece_ids(tokenizer: "PreTrainedTokenizerBase", word: str, space: bool) -> list[int]:
    """The tokens of a word, with a leading space or without.

    Raises:
        KeyeError: a word without tokens.
    """
    ids = tokenizer((" " if space else "") + word.strip(), add_special_tokens=False)["input_ids"]
    if not ids:
        raise KeyeError(f"the word {word!r} has no tokens; give another word")
    return ids


def alignment(states: Tensor, unembedding: Tensor, words: Sequence[Sequence[int]]) -> Tensor:
    """Cosine `[layers, words]` of states `[layers, hidden]` and the mean of each word's rows of `[vocab, hidden]`."""
    rows = torch.stack([unembedding[list(pieces)].float().mean(0) for pieces in words])
    return F.cosine_similarity(states.float()[:, None], rows[None], dim=-1)


def cas(intended: Tensor, competing: Tensor) -> Tensor:
    """Contextual alignment score `[layers]` of alignments `[layers, n]` and `[layers, m]`: Σ|a| / (Σ|a| + Σ|b|)."""
    one, other = intended.abs().sum(-1), competing.abs().sum(-1)
    return one / (one + other)


@torch.no_grad()
def cas_of(
    tracer: Tracer,
    prompt: Prompt,
    tokenizer: "PreTrainedTokenizerBase",
    intended: Sequence[str],
    competing: Sequence[str],
    space: bool = True,
    normed: bool = False,
) -> Tensor:
    """CAS after each block `[depth]` at the prompt's last token, of two lists of words.

    Args:
        tracer, prompt, tokenizer: of the model.
        intended, competing: words of the intended and of the competing reading.
        space: words have a leading space.
        normed: states pass through the final norm.
    """
    states = tracer.run(prompt, [0], record=[len(prompt) - 1]).states[0, 1:, 0]
    states = tracer.anatomy.norm(states) if normed else states
    found = [
        alignment(states, tracer.anatomy.unembedding, [piece_ids(tokenizer, word, space) for word in words])
        for words in (intended, competing)
    ]
    return cas(*found)


def cas_markers(scores: Sequence[float]) -> Markers:
    """The markers of CAS, layer by layer."""
    values = list(scores)
    onset = next(
        (
            layer
            for layer in range(1, len(values) - ONSET_LAYERS + 1)
            if all(value < values[layer - 1] - ONSET_FALL for value in values[layer : layer + ONSET_LAYERS])
        ),
        None,
    )
    inversion = next((layer for layer, value in enumerate(values) if value < INVERTED), None)
    commitment = None
    if inversion is not None:
        starts = range(inversion, len(values) - COMMITTED_LAYERS + 1)
        commitment = next((at for at in starts if all(v < COMMITTED for v in values[at : at + COMMITTED_LAYERS])), None)
    return Markers(onset, inversion, commitment)


def pathway_strength(states: Tensor) -> Tensor:
    """Σ |Pearson correlation| `[layers]` of neighbouring words' states `[layers, words, hidden]`: a pathway's strength.

    Raises:
        KeyeError: fewer than two words.
    """
    if states.shape[1] < 2:
        raise KeyeError("a pathway needs at least two words that occur in the prompt; give more")
    centred = states.float() - states.float().mean(-1, keepdim=True)
    return F.cosine_similarity(centred[:, 1:], centred[:, :-1], dim=-1).abs().sum(-1)


def dss(right: Sequence[Tensor], wrong: Sequence[Tensor]) -> Tensor:
    """Distributional semantics strength `[layers]`: strength of the right pathways / (right + wrong).

    right, wrong: for each pathway the states `[layers, words, hidden]` of its words.
    """
    one = torch.stack([pathway_strength(states) for states in right]).sum(0)
    other = torch.stack([pathway_strength(states) for states in wrong]).sum(0)
    return one / (one + other)


def dss_markers(scores: Sequence[float]) -> Markers:
    """The markers of DSS, layer by layer."""
    values = list(scores)
    onset = next((layer for layer, value in enumerate(values) if value < DSS_ONSET), None)
    inversion = next((layer for layer, value in enumerate(values) if value < DSS_INVERTED), None)
    return Markers(onset, inversion, min(range(len(values)), key=values.__getitem__))


@torch.no_grad()
def dss_of(tracer: Tracer, prompt: Prompt, right: Sequence[Sequence[str]], wrong: Sequence[Sequence[str]]) -> Tensor:
    """DSS after each block `[depth]`; pathways are lists of words of the prompt, whose last token's state is used.

    Raises:
        KeyeError: a word that the prompt does not contain.
    """
    states = tracer.states(prompt)[1:]

    def pick(pathway: Sequence[str]) -> Tensor:
        return states[:, [place_of(prompt, word) for word in pathway]]

    return dss([pick(pathway) for pathway in right], [pick(pathway) for pathway in wrong])


def place_of(prompt: Prompt, word: str) -> int:
    """Position of the last token of the last occurrence of a word in the prompt, ignoring case."""
    wanted = word.strip().casefold()
    found: list[TokenGroup] = [g for g in prompt.groups if g.kind == "word" and g.name.casefold() == wanted]
    if not found:
        raise KeyeError(f"the prompt does not contain the word {word!r}; a pathway of DSS has words of the prompt")
    return found[-1].places[-1]
