"""Mixture: which source the next samples come from, so that the shares of *tokens* are the recipe's."""

from collections.abc import Callable
from typing import Any

import numpy as np

from keye.errors import CheckpointError
from stages.data.packing.samples import Block
from stages.data.sources.source import Source


class Mixture:
    """Draws from the source that lacks most of its share of the tokens; deterministic.

    A sample's length is known only once it is encoded. Until then it counts with its source's mean so far, so many
    samples can be drawn and encoded in parallel before the first length is known.

    Args:
        sources: (source, share) of each; the shares add up to 1.
        lead: source → tokens that it gives before the shares apply; 0 for the others.
    """

    def __init__(self, sources: list[tuple[Source, float]], lead: dict[str, int] | None = None) -> None:
        self.sources = {source.name: source for source, _ in sources}
        self.shares = {source.name: share for source, share in sources}
        self.names = list(self.sources)
        # Tokens that a source lacks in addition to its share, so that it is drawn until it has given them.
        self.lead = {name: (lead or {}).get(name, 0) for name in self.names}
        self.waiting = dict.fromkeys(self.sources, 0)  # samples drawn whose length is not known yet
        self.known = dict.fromkeys(self.sources, 0)  # samples known to be bad or of known length
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
        """Expected tokens of a sample of this source; `guess` if no length is known yet."""
        if self.tokens[name]:
            return self.tokens[name] / self.known[name]
        return sum(self.tokens.values()) / max(sum(self.known.values()), 1) or guess

    def draw(self, room: float, most: int, guess: float, units: Callable[[float], float]) -> Block:
        """The next samples: as many as are expected to fill `room`, at least one and at most `most`.

        The means change only in `learn`, so the turns of a source are evenly spaced on the scale of tokens ÷ share. The
        draws are the turns of all sources in order, which costs a sort.

        Args:
            guess: see `mean`.
            units: tokens of a sample → its part of `room`.
        """
        means = [self.mean(name, guess) for name in self.names]
        each = [units(mean) for mean in means]
        # The room is full at the latest when one source alone has filled it.
        first = [
            (self.tokens[name] + self.waiting[name] * mean - self.lead[name]) / self.shares[name]
            for name, mean in zip(self.names, means, strict=True)
        ]
        apart = [mean / self.shares[name] for name, mean in zip(self.names, means, strict=True)]
        alone = [min(most, int(room / unit) + 1) for unit in each]
        end = min(f + a * n for f, a, n in zip(first, apart, alone, strict=True))
        turns, sources = [], []
        for place, (begin, gap) in enumerate(zip(first, apart, strict=True)):
            count = min(most, max(0, int((end - begin) / gap)) + 1)
            turns.append(begin + (np.arange(count) + 0.5) * gap)  # in the middle, so that early draws keep the shares
            sources.append(np.full(count, place, np.int16))
        source = np.concatenate(sources)[np.argsort(np.concatenate(turns), kind="stable")]
        filled = np.cumsum(np.array(each, float)[source])
        source = source[: min(most, int(np.searchsorted(filled, room)) + 1)]
        index = np.zeros(len(source), np.int64)
        for place, name in enumerate(self.names):
            mine = source == place
            count = int(mine.sum())
            if count:
                index[mine] = self.sources[name].draw_many(count)
                self.waiting[name] += count
        return Block(source, index, np.full(len(source), -1, np.int32))

    def learn(self, source: np.ndarray, tokens: np.ndarray, causes: dict[int, str]) -> None:
        """Record the lengths of drawn samples, in the order of the draws.

        Args:
            source: int16 `[n]`, places in `names`.
            tokens: int64 `[n]`, 0 for a bad sample.
            causes: place in these arrays → why a sample is bad.

        Raises:
            ManifestError: too many samples of a source cannot be used.
        """
        for place, name in enumerate(self.names):
            rows = np.flatnonzero(source == place)
            if len(rows):
                mine = tokens[rows]
                self.waiting[name] -= len(mine)
                self.known[name] += len(mine)
                self.tokens[name] += int(mine.sum())
                bad = np.flatnonzero(mine == 0).tolist()
                why = {at: causes[int(rows[at])] for at in bad if int(rows[at]) in causes}
                self.sources[name].results(mine > 0, why)

    def state_dict(self) -> dict[str, Any]:
        return {
            "sources": {name: source.state_dict() for name, source in self.sources.items()},
            "waiting": dict(self.waiting),
            "known": dict(self.known),
            "tokens": dict(self.tokens),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state.

        Raises:
            CheckpointError: the state has other sources.
        """
        if set(state["sources"]) != set(self.sources):
            raise CheckpointError(
                "the checkpoint was made with other data.sources; use the recipe it was made with, or remove it"
            )
        self.waiting, self.known, self.tokens = dict(state["waiting"]), dict(state["known"]), dict(state["tokens"])
        for name, source in self.sources.items():
            source.load_state_dict(state["sources"][name])
