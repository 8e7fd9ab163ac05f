"""Planner: which samples form which packs in which step. Rank 0 runs it; the plan does not depend on the ranks.

The planner draws samples in blocks, receives the properties of each block once it is encoded, keeps the samples in a
pool, and forms the packs of a step from the pool. It never sees a sample, only columns of numbers
(`stages.data.packing.samples`), and a step costs O(n log n) in the samples of the pool. The caller does for each step

    planner.draws()                        # blocks to encode now; also planner.flight, oldest first
    while planner.hungry():
        planner.take(Encoded.of(planner.mixture.names, metas))   # of the oldest block in flight
        planner.draws()
    step = planner.plan()                  # step.samples, step.starts; step.packs() has the samples of each pack

`stages.data.loader` does so on rank 0 and sends the plan to the other ranks; `scripts/bench/stages/balance.py` does so
with random lengths.
"""

from collections import deque
from typing import Any, Protocol

import numpy as np

from keye.errors import CheckpointError
from stages.data.packing.mixture import Mixture
from stages.data.packing.samples import Block, Encoded, Pool, Samples, Step

BLOCK = 64  # samples that are drawn before the first of them is encoded


class TokenCounts:
    """Tokens of each kind in all steps so far, compared with the kinds' target shares.

    Args:
        shares: of each kind.
        emitted: int64 `[kinds]`, tokens so far.
    """

    def __init__(self, shares: list[float], emitted: np.ndarray) -> None:
        self.shares, self.emitted = np.array(shares), emitted.copy()

    def owed(self, more: int = 1) -> np.ndarray:
        """Tokens that each kind lacks of its share of all tokens and of `more` to come, float64 `[kinds]`."""
        return self.shares * (int(self.emitted.sum()) + more) - self.emitted

    def add(self, kind: np.ndarray, tokens: np.ndarray) -> None:
        """Count samples of these kinds."""
        np.add.at(self.emitted, kind, tokens)


class Packer(Protocol):
    """Forms the packs of one step.

    amount: size of a step. guess: tokens of a sample before any is known. samples: smallest pool to choose from.
    """

    amount: int
    guess: int
    samples: int

    def units(self, tokens: Any) -> Any:
        """Tokens of a sample (or of many, as an array) → its part of `amount`."""

    def form(self, pool: Pool, counts: TokenCounts, step: int) -> list[np.ndarray]:
        """Rows of the pool that make each pack, rising; their tokens are added to `counts`."""


class Planner:
    """See the module's docstring."""

    def __init__(self, mixture: Mixture, packer: Packer) -> None:
        self.mixture, self.packer = mixture, packer
        self.kinds = list(mixture.kinds)
        kinds = [self.kinds.index(mixture.sources[name].recipe.kind) for name in mixture.names]
        self._kind_of = np.array(kinds, np.int16)
        self.pool = Pool.none()
        self.flight: deque[Block] = deque()  # blocks drawn and not yet taken
        self.restored: np.ndarray | None = None  # of a restored pool, then the first block in flight
        self.lead = np.zeros(len(self.kinds), np.int64)
        np.add.at(self.lead, self._kind_of, [mixture.lead[name] for name in mixture.names])
        self.emitted = -self.lead  # tokens so far beyond the leads, which the shares apply to
        self.step = 0

    def draws(self) -> list[Block]:
        """Blocks to encode now: the amount of one step is kept in flight, so that the encoders never wait.

        A block is about a quarter of a step, whatever the number of samples, so a step takes few exchanges.
        """
        drawn: list[Block] = []
        if self.restored is not None:
            return drawn
        known, wanted = sum(self.mixture.known.values()), self._wanted()
        pooled = min(self._pooled(), wanted)
        while self._flying() + pooled < wanted + self.packer.amount:
            # While few lengths are known, a wrong guess must not decide on many samples.
            most = max(BLOCK, known) - sum(map(len, self.flight))
            if most <= 0:
                break
            room = max(1.0, self.packer.amount / 4)
            drawn.append(self.mixture.draw(room, most, self.packer.guess, self.packer.units))
            self.flight.append(drawn[-1])
        return drawn

    def _wanted(self) -> float:
        return 2 * self.packer.amount

    def _pooled(self) -> float:
        return int(self.packer.units(self.pool.tokens).sum())

    def _flying(self) -> float:
        names = self.mixture.names
        units = [self.packer.units(self.mixture.mean(name, self.packer.guess)) for name in names]
        counts = sum((np.bincount(block.source, minlength=len(names)) for block in self.flight), np.zeros(len(names)))
        return sum(count * unit for count, unit in zip(counts.tolist(), units, strict=True))

    def hungry(self) -> bool:
        """Whether another block is needed before a step can be planned."""
        pooled = self._pooled()
        if self.restored is not None or pooled < self._wanted():
            return True
        few = len(self.pool) < self.packer.samples
        return (few or self._unequal(pooled)) and pooled < 2 * self._wanted()

    def _unequal(self, pooled: float) -> bool:
        """Whether the pool has fewer tokens of a kind than the next step needs."""
        available = np.zeros(len(self.kinds), np.int64)
        np.add.at(available, self.pool.kind, self.pool.tokens)
        coming = int(self.packer.amount * int(available.sum()) / pooled)
        return bool((self._counts().owed(coming) > available).any())

    def _counts(self) -> TokenCounts:
        return TokenCounts(list(self.mixture.kinds.values()), self.emitted)

    def take(self, found: Encoded, causes: dict[int, str] | None = None) -> None:
        """Add the encoded samples of the oldest block in flight; causes: place in the block → why a sample is bad.

        Raises:
            ManifestError: too many samples of a source cannot be used.
        """
        block = self.flight.popleft()
        if self.restored is None:
            tokens = np.zeros(len(block), np.int64)
            np.add.at(tokens, found.place, found.tokens)
            self.mixture.learn(block.source, tokens, causes or {})
        born = np.full(len(found), self.step) if self.restored is None else self.restored[found.place]
        columns = {name: getattr(found, name) for name in Samples.__dataclass_fields__}
        self.pool = Pool.join([self.pool, Pool(**columns, kind=self._kind_of[found.source], born=born)])
        self.restored = None

    def plan(self) -> Step:
        """The packs of the next step; their samples leave the pool."""
        counts = self._counts()
        packs = self.packer.form(self.pool, counts, self.step)
        rows = np.concatenate(packs)
        columns = {name: getattr(self.pool, name)[rows] for name in Samples.__dataclass_fields__}
        kept = np.ones(len(self.pool), bool)
        kept[rows] = False
        self.pool = self.pool[kept]
        self.emitted = counts.emitted
        self.step += 1
        return Step(Samples(**columns), np.cumsum([0, *map(len, packs)]))

    def realised(self) -> dict[str, float]:
        """Kind → share of the tokens of all steps so far."""
        tokens = self.emitted + self.lead
        return dict(zip(self.kinds, (tokens / max(int(tokens.sum()), 1)).tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Plain values. Samples are kept as references and encoded again on resume."""
        columns = ("source", "index", "part", "born")
        return {
            "mixture": self.mixture.state_dict(),
            "names": list(self.mixture.names),
            "pool": {name: getattr(self.pool, name).tolist() for name in columns},
            "flight": [{"source": block.source.tolist(), "index": block.index.tolist()} for block in self.flight],
            "emitted": dict(zip(self.kinds, self.emitted.tolist(), strict=True)),
            "step": self.step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> list[Block]:
        """Continue from a state of a run of any number of ranks; returns the blocks to encode now.

        Raises:
            CheckpointError: the state has other sources, or is of another version.
        """
        if "names" not in state:
            raise CheckpointError(
                "the checkpoint's position in the data is of an earlier version; remove it and start the stage again"
            )
        self.mixture.load_state_dict(state["mixture"])
        self.emitted = np.array([state["emitted"][kind] for kind in self.kinds], np.int64)
        self.step, self.pool = state["step"], Pool.none()
        places = np.array([self.mixture.names.index(name) for name in state["names"]], np.int16)
        self.restored = np.array(state["pool"]["born"], np.int64)
        self.flight = deque(
            Block(
                places[np.array(part["source"], np.int64)],
                np.array(part["index"], np.int64),
                np.array(part.get("part", [-1] * len(part["index"])), np.int32),
            )
            for part in (state["pool"], *state["flight"])
        )
        return list(self.flight)
