"""The semantic map of a layer (arXiv 2510.06107, version 3): words that its state points to, and their sources."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from keye.errors import KeyeError
from keye.evaluation.trace.prompt import Prompt
from keye.evaluation.trace.tracer import Cut, Row, Tracer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NODES, EDGES = 30, 50


@dataclass(frozen=True)
class Node:
    """A word. score: ⟨U, h⟩, summed over the tokens that spell it. alignment: cosine of h and the mean of their U."""

    word: str
    score: float
    alignment: float


@dataclass(frozen=True)
class Edge:
    """source → target: by how much P(target) falls without the place of the prompt that scores the source highest.

    place: that position. at: the text there, or the name of its frame. weight: P(target | prompt) − P(target | prompt
    without the place).
    """

    source: str
    target: str
    place: int
    at: str
    weight: float


@dataclass(frozen=True)
class SemanticMap:
    """Nodes and edges of a layer, strongest first."""

    layer: int
    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]


class Vocabulary:
    """Which tokens of a tokenizer spell the same word, ignoring case and spaces.

    words: the words. of_token: LongTensor `[vocab]`, the word of each token, −1 for tokens without a letter or digit.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", size: int) -> None:
        special = set(tokenizer.all_special_ids) | {
            token for token, added in tokenizer.added_tokens_decoder.items() if added.special
        }
        places: dict[str, int] = {}
        found = [-1] * size
        for token in range(min(size, len(tokenizer))):
            word = "" if token in special else tokenizer.decode([token]).strip().casefold()
            if any(character.isalnum() for character in word):
                found[token] = places.setdefault(word, len(places))
        self.words = list(places)
        self.of_token = torch.tensor(found)

    def summed(self, values: Tensor) -> Tensor:
        """Values `[…, vocab]` of tokens → sums `[…, words]` over the tokens of each word."""
        spelled = (self.of_token >= 0).to(values.device)
        total = values.new_zeros(*values.shape[:-1], len(self.words))
        return total.index_add(-1, self.of_token.to(values.device)[spelled], values[..., : len(spelled)][..., spelled])

    def tokens(self, word: int) -> list[int]:
        """The tokens of a word."""
        return (self.of_token == word).nonzero()[:, 0].tolist()


@torch.no_grad()
def semantic_map(
    tracer: Tracer,
    prompt: Prompt,
    tokenizer: "PreTrainedTokenizerBase",
    layer: int,
    vocabulary: Vocabulary | None = None,
    nodes: int = NODES,
    edges: int = EDGES,
    normed: bool = False,
) -> SemanticMap:
    """The map after a block, at the prompt's last token.

    A token of text is removed by putting "." in its place, as in the paper. A visual token has no word, so its frame or
    image is knocked out of the attention of all later tokens instead.

    Args:
        tracer, prompt, tokenizer: of the model.
        layer: the block, from 0.
        vocabulary: of the tokenizer, if it is built already.
        nodes, edges: how many are kept.
        normed: states pass through the final norm before they are scored; the paper scores them without.

    Raises:
        KeyeError: a layer that the model does not have.
    """
    if not 0 <= layer < tracer.anatomy.depth:
        depth = tracer.anatomy.depth
        raise KeyeError(f"layer {layer}, block {layer + 1}, does not exist; the last are {depth - 1} and {depth}")
    weights = tracer.anatomy.unembedding
    vocabulary = Vocabulary(tokenizer, len(weights)) if vocabulary is None else vocabulary
    states = tracer.states(prompt)[layer + 1]
    states = (tracer.anatomy.norm(states) if normed else states).float()
    scores, order = vocabulary.summed(states[-1] @ weights.float().T).sort(descending=True)
    chosen = order[:nodes].tolist()
    spelled = [vocabulary.tokens(word) for word in chosen]
    rows = torch.stack([weights[tokens].float().mean(0) for tokens in spelled])
    cosines = F.cosine_similarity(states[-1][None], rows, dim=-1)
    found = [
        Node(vocabulary.words[word], float(score), float(cosine))
        for word, score, cosine in zip(chosen, scores[:nodes], cosines, strict=False)
    ]
    sums = torch.stack([weights[tokens].float().sum(0) for tokens in spelled])
    places = (sums @ states.T).argmax(1).tolist()
    return SemanticMap(layer, tuple(found), tuple(_edges(tracer, prompt, tokenizer, found, spelled, places)[:edges]))


def _edges(
    tracer: Tracer,
    prompt: Prompt,
    tokenizer: "PreTrainedTokenizerBase",
    nodes: Sequence[Node],
    spelled: Sequence[Sequence[int]],
    places: Sequence[int],
) -> list[Edge]:
    """All edges between different nodes, the largest weight first."""

    def chances(of: Prompt, row: Row) -> Tensor:
        probabilities = tracer.run(of, [0], [row]).logits[0, 0].softmax(-1)
        return torch.stack([probabilities[list(tokens)].sum() for tokens in spelled])

    stop = tokenizer(".", add_special_tokens=False)["input_ids"][-1]
    visual = {place: group for group in prompt.groups if group.kind in ("frame", "image") for place in group.places}
    before, falls, names = chances(prompt, Row()), {}, {}
    for place in dict.fromkeys(places):
        if place in visual:
            after = chances(prompt, Row((Cut(visual[place].places),)))
            names[place] = visual[place].name
        else:
            after = chances(prompt.replaced(place, stop), Row())
            names[place] = tokenizer.decode([int(prompt.ids[place])])
        falls[place] = (before - after).tolist()
    edges = [
        Edge(source.word, target.word, place, names[place], falls[place][at])
        for source, place in zip(nodes, places, strict=True)
        for at, target in enumerate(nodes)
        if target is not source
    ]
    return sorted(edges, key=lambda edge: -edge.weight)
