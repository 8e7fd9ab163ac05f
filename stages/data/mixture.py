"""Mixture: which source the next sample comes from, so that the *token* shares of what is drawn are the recipe's."""

from typing import Any

from keye.errors import CheckpointError
from stages.data.sources import Source


class Mixture:
    """Always draws from the source that is furthest behind its share of the tokens; no chance involved.

    A sample's length is known only once it is encoded. Until then it counts as its source's mean so far, so that many
    samples can be drawn, and encoded at once, before the first of them is known.

    Args:
        sources: the sources, each with its share, which add up to 1.
    """

    def __init__(self, sources: list[tuple[Source, float]]) -> None:
        self.sources = {source.name: source for source, _ in sources}
        self.shares = {source.name: share for source, share in sources}
        self.waiting = dict.fromkeys(self.sources, 0)  # samples drawn, length not known yet
        self.known = dict.fromkeys(self.sources, 0)  # samples whose length, or badness, is known
        self.tokens = dict.fromkeys(self.sources, 0)  # of the known ones; a bad one has none

    @property
    def kinds(self) -> dict[str, float]:
        """Kind → share of the tokens."""
        shares: dict[str, float] = {}
        for name, share in self.shares.items():
            kind = self.sources[name].recipe.kind
            shares[kind] = shares.get(kind, 0.0) + share
        return shares

    def mean(self, name: str, guess: float) -> float:
        """Tokens that a sample of this source is expected to have; where nothing is known yet, `guess`."""
        if self.tokens[name]:
            return self.tokens[name] / self.known[name]
        return sum(self.tokens.values()) / max(sum(self.known.values()), 1) or guess

    def draw(self, guess: float) -> tuple[str, int]:
        """Source and index of the next sample."""
        counted = {name: self.tokens[name] + self.waiting[name] * self.mean(name, guess) for name in self.sources}
        # Measured against one token more, so that the first draws follow the shares too.
        total = sum(counted.values()) + 1
        name = max(self.shares, key=lambda n: self.shares[n] * total - counted[n])
        self.waiting[name] += 1
        return name, self.sources[name].draw()

    def learn(self, name: str, tokens: int | None) -> None:
        """What a drawn sample turned out to be: its tokens, or None when it is bad; in the order of the draws.

        Raises:
            ManifestError: nothing in the source can be used.
        """
        self.waiting[name] -= 1
        self.known[name] += 1
        self.tokens[name] += tokens or 0
        self.sources[name].result(tokens is not None)

    def state_dict(self) -> dict[str, Any]:
        return {
            "sources": {name: source.state_dict() for name, source in self.sources.items()},
            "waiting": dict(self.waiting),
            "known": dict(self.known),
            "tokens": dict(self.tokens),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state; CheckpointError when other sources made it."""
        if set(state["sources"]) != set(self.sources):
            raise CheckpointError(
                "the checkpoint was made with other data.sources; take the recipe it was made with, or remove it"
            )
        self.waiting, self.known, self.tokens = dict(state["waiting"]), dict(state["known"]), dict(state["tokens"])
        for name, source in self.sources.items():
            source.load_state_dict(state["sources"][name])
