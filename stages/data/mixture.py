"""Mixture: several sources → one stream whose *token* shares are the recipe's."""

from typing import Any

from keye.errors import CheckpointError
from stages.data.sources import Item, Source


class Mixture:
    """Always draws from the source that is furthest behind its share of the tokens drawn so far; no chance involved.

    Args:
        sources: the sources, each with its share, which add up to 1.
    """

    def __init__(self, sources: list[tuple[Source, float]]) -> None:
        self.sources = {source.name: source for source, _ in sources}
        self.shares = {source.name: share for source, share in sources}
        self.drawn = dict.fromkeys(self.sources, 0)

    def next(self) -> Item:
        """The next sample of the source that is furthest behind."""
        total = sum(self.drawn.values())
        # Measured against one token more, so that the first draws follow the shares too.
        name = max(self.shares, key=lambda n: self.shares[n] * (total + 1) - self.drawn[n])
        item = self.sources[name].next()
        self.drawn[name] += item.tokens
        return item

    def realised(self) -> dict[str, float]:
        """Kind → share of the tokens drawn so far."""
        total = max(sum(self.drawn.values()), 1)
        shares: dict[str, float] = {}
        for name, tokens in self.drawn.items():
            kind = self.sources[name].recipe.kind
            shares[kind] = shares.get(kind, 0.0) + tokens / total
        return shares

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": dict(self.drawn), "sources": {n: s.state_dict() for n, s in self.sources.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state; CheckpointError when other sources made it."""
        if set(state["sources"]) != set(self.sources):
            raise CheckpointError(
                "the checkpoint was made with other data.sources; take the recipe it was made with, or remove it"
            )
        self.drawn = dict(state["drawn"])
        for name, source in self.sources.items():
            source.load_state_dict(state["sources"][name])
