"""Planner: which samples make which packs in which step. Pure and the same on every rank, however many there are.

It draws samples in blocks, is told of each block once it is encoded, keeps the good ones in a pool, and forms the packs
of a step from the pool. It never sees a sample, only what is known of it (`Meta`).
"""

from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol

from stages.data.mixture import Mixture

BLOCK = 64  # samples drawn at once, at most


@dataclass(frozen=True)
class Meta:
    """What is known of an encoded sample.

    source, index: where it comes from. labels: tokens that are learned. stills, frames: (height, width) in patches of
    each, in stream order. excess: see `Cost`.
    """

    source: str
    index: int
    kind: str
    tokens: int
    labels: int
    stills: tuple[tuple[int, int], ...]
    frames: tuple[tuple[int, int], ...]
    excess: int

    @property
    def ref(self) -> tuple[str, int]:
        return self.source, self.index


@dataclass(frozen=True)
class Waiting:
    """A sample in the pool: `serial` counts the good samples drawn, `born` is the step before which it came."""

    meta: Meta
    serial: int
    born: int


class Ledger:
    """Tokens of each kind that have been trained on, against the shares they should have.

    Args:
        shares: kind → share. emitted: kind → tokens so far.
    """

    def __init__(self, shares: dict[str, float], emitted: dict[str, int]) -> None:
        self.shares, self.emitted = shares, dict(emitted)

    def owed(self, kind: str, more: int = 1) -> float:
        """Tokens that a kind is behind its share of all tokens and `more` to come."""
        return self.shares[kind] * (sum(self.emitted.values()) + more) - self.emitted[kind]

    def add(self, meta: Meta, sign: int = 1) -> None:
        """Count a sample, or with -1 take it back."""
        self.emitted[meta.kind] += sign * meta.tokens


class Former(Protocol):
    """Forms the packs of one step.

    amount: how much a step takes; `units` says how much of that a sample is. guess: units of a sample before any is
    known. samples: how many should be looked over.
    """

    amount: int
    guess: int
    samples: int

    def units(self, tokens: float) -> float: ...

    def form(self, pool: list[Waiting], ledger: Ledger, step: int) -> list[list[Waiting]]:
        """Packs of pool entries, whose tokens are added to the ledger. pool: oldest first."""


class Planner:
    """See the module's docstring. The caller goes through `draws`, `take` while `hungry`, and `plan`, for each step."""

    def __init__(self, mixture: Mixture, former: Former) -> None:
        self.mixture, self.former = mixture, former
        self.pool: list[Waiting] = []
        self.flight: deque[list[tuple[str, int]]] = deque()  # blocks drawn and not yet taken
        self.restored: list[int] | None = None  # when set, the first block in flight is an old pool, born so
        self.emitted = dict.fromkeys(mixture.kinds, 0)
        self.step, self.serial = 0, 0

    def draws(self) -> list[list[tuple[str, int]]]:
        """Blocks to be encoded now: as much as one step takes is kept under way, so that the encoders never rest."""
        drawn: list[list[tuple[str, int]]] = []
        if self.restored is not None:
            return drawn
        known = sum(self.mixture.known.values())
        while self._flying() + min(self._pooled(), self._wanted()) < self._wanted() + self.former.amount:
            # While little is known, a guess that is far off must not decide on much.
            if sum(map(len, self.flight)) >= max(BLOCK, known):
                break
            rest = max(1.0, self.former.amount / 4)
            block: list[tuple[str, int]] = []
            while rest > 0 and len(block) < BLOCK:
                name, index = self.mixture.draw(self.former.guess)
                block.append((name, index))
                rest -= self.former.units(self.mixture.mean(name, self.former.guess))
            self.flight.append(block)
            drawn.append(block)
        return drawn

    def _wanted(self) -> float:
        return 2 * self.former.amount

    def _pooled(self) -> float:
        return sum(self.former.units(waiting.meta.tokens) for waiting in self.pool)

    def _flying(self) -> float:
        names = (name for block in self.flight for name, _ in block)
        return sum(self.former.units(self.mixture.mean(name, self.former.guess)) for name in names)

    def hungry(self) -> bool:
        """Whether a block must be taken before a step can be planned."""
        pooled = self._pooled()
        if self.restored is not None or pooled < self._wanted():
            return True
        few = len(self.pool) < self.former.samples
        return (few or self._unequal(pooled)) and pooled < 2 * self._wanted()

    def _unequal(self, pooled: float) -> bool:
        """Whether the pool has less of a kind than the next step owes it."""
        held = dict.fromkeys(self.emitted, 0)
        for waiting in self.pool:
            held[waiting.meta.kind] += waiting.meta.tokens
        coming = int(self.former.amount * sum(held.values()) / pooled)
        ledger = Ledger(self.mixture.kinds, self.emitted)
        return any(ledger.owed(kind, coming) > tokens for kind, tokens in held.items())

    def take(self, metas: list[Meta | None]) -> None:
        """What became of the oldest block in flight, in its order; None for a bad sample.

        Raises:
            ManifestError: nothing in a source can be used.
        """
        block = self.flight.popleft()
        born = [self.step] * len(block) if self.restored is None else self.restored
        for (name, _), meta, step in zip(block, metas, born, strict=True):
            if self.restored is None:
                self.mixture.learn(name, None if meta is None else meta.tokens)
            if meta is not None:
                self.pool.append(Waiting(meta, self.serial, step))
                self.serial += 1
        self.restored = None

    def plan(self) -> list[list[Meta]]:
        """The packs of the next step; what they hold leaves the pool."""
        ledger = Ledger(self.mixture.kinds, self.emitted)
        packs = self.former.form(self.pool, ledger, self.step)
        gone = {waiting.serial for pack in packs for waiting in pack}
        self.pool = [waiting for waiting in self.pool if waiting.serial not in gone]
        self.emitted = ledger.emitted
        self.step += 1
        return [[waiting.meta for waiting in pack] for pack in packs]

    def realised(self) -> dict[str, float]:
        """Kind → share of the tokens of all steps so far."""
        total = max(sum(self.emitted.values()), 1)
        return {kind: tokens / total for kind, tokens in self.emitted.items()}

    def state_dict(self) -> dict[str, Any]:
        """Plain values, the same on every rank. Samples are kept as references and encoded again on resume."""
        return {
            "mixture": self.mixture.state_dict(),
            "pool": [[*waiting.meta.ref, waiting.born] for waiting in self.pool],
            "flight": [[list(ref) for ref in block] for block in self.flight],
            "emitted": dict(self.emitted),
            "step": self.step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> list[list[tuple[str, int]]]:
        """Go on from a state of a planner of any number of ranks; returns the blocks to be encoded now."""
        self.mixture.load_state_dict(state["mixture"])
        self.emitted, self.step, self.pool = dict(state["emitted"]), state["step"], []
        self.restored = [born for *_, born in state["pool"]]
        blocks = [[(name, index) for name, index, _ in state["pool"]]]
        blocks += [[(name, index) for name, index in block] for block in state["flight"]]
        self.flight = deque(blocks)
        return list(blocks)
