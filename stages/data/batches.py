"""Batches of this rank: rank 0 plans for all, each rank encodes what it owns and receives what it trains on."""

import socket
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch

from keye.errors import KeyeError, ManifestError
from stages.data import exchange
from stages.data.exchange import Failure
from stages.data.items import Item, packed
from stages.data.packing.balance import Cost, TowerCost
from stages.data.packing.planner import Block, Found, Meta, Planner, Step
from stages.data.packing.samples import Samples
from stages.distributed.parallel import ParallelDims, Piece, vision_shares

Ref = tuple[int, int, int]  # source, index, part
Deal = Callable[[list[int], int], list[list[list[int]]]]


class Dealt(NamedTuple):
    """A step as every rank sees it.

    owners: the rank that has encoded each sample, int64 `[N]`. rounds: round → data-parallel rank → packs.
    """

    step: Step
    owners: np.ndarray
    rounds: list[list[list[int]]]


class Turn(NamedTuple):
    """What rank 0 tells all: blocks to encode, with the owner of each sample, and the next step once it is planned.

    Without a step, what is known of the oldest block is wanted.
    """

    blocks: list[tuple[Block, np.ndarray]]
    dealt: Dealt | None = None
    failure: Failure | None = None


class Report(NamedTuple):
    """What a rank says of its samples of a block. causes: place in the block → why a sample is bad."""

    found: Found
    causes: dict[int, str]
    failure: Failure | None


class BatchStream:
    """A stream of batches, one a round; every rank makes the same number of rounds.

    A step takes about four turns of exchange with rank 0, whatever the number of its samples. Planning happens in rank
    0's loader thread alone; on the other ranks the planner only names the sources.

    Args:
        planner: draws and plans on rank 0.
        cost: of a sample.
        deal: (costs of a step's packs, data-parallel ranks) → rank → round → packs that make one batch.
        assemble: items of a batch → the batch; in a sequence group they hold the pixels of this rank's frames alone.
        grid: this rank's place.
        workers: threads that encode.
    """

    def __init__(
        self,
        planner: Planner,
        cost: Cost | TowerCost,
        deal: Deal,
        assemble: Callable[[list[Item]], dict[str, Any]],
        grid: ParallelDims,
        workers: int = 1,
    ) -> None:
        self.planner, self.cost, self.deal, self.assemble, self.grid = planner, cost, deal, assemble, grid
        self.sources = list(planner.mixture.sources.values())
        self.places = {name: place for place, name in enumerate(planner.mixture.names)}
        self.group = exchange.make_group(grid.world)
        self.encoders = ThreadPoolExecutor(workers, thread_name_prefix="encoder")
        # Of each block: place, part, (source, index), what it gives.
        self.coding: deque[list[tuple[int, int, tuple[int, int], Future[list[Item]]]]] = deque()
        self.kept: dict[Ref, Item] = {}  # encoded here and not trained on yet
        self.uses: Counter[Ref] = Counter()
        self.dealt: Dealt | None = None
        self.rounds: deque[list[list[int]]] = deque()  # round → data-parallel rank → packs
        self._begun: list[Block] = []  # restored, to be encoded with the first turn
        self._reports: list[Report] | None = None  # on rank 0, of the oldest block
        self._cause: Exception | None = None  # of a failure of this rank
        self._compared = grid.world == 1
        self._planned = self._handed = planner.state_dict() if grid.rank == 0 else {}

    def next(self) -> dict[str, Any]:
        """The next batch of this rank; collective.

        Raises:
            KeyeError: what any rank met, the same on all.
        """
        if not self.rounds:
            self._plan()
        batch = self._batch(self.rounds.popleft())
        if not self.rounds:
            self._handed = self._planned
        return batch

    # --- planning

    def _plan(self) -> None:
        """The next step, by turns with rank 0."""
        if not self._compared:
            self._compare()
        while True:
            turn = exchange.broadcast(self._turn() if self.grid.rank == 0 else None, self.group)
            if turn.failure is not None:
                raise turn.failure.error from self._cause
            for block, owners in turn.blocks:
                self._encode(block, owners)
            if turn.dealt is not None:
                self.dealt, self.rounds = turn.dealt, deque(turn.dealt.rounds)
                return
            reports = exchange.collect(self._encoded(), self.group)
            if reports is not None:
                self._reports = reports

    def _compare(self) -> None:
        """See that all ranks read the same data: the numbers of a plan are rows of them. Collective."""
        marks = exchange.collect((socket.gethostname(), [source.mark for source in self.sources]), self.group)
        error = None if marks is None else _differing(self.planner.mixture.names, marks)
        exchange.agree(error, self.group)
        self._compared = True

    def _turn(self) -> Turn:
        """Rank 0's next word; its own mistakes are everybody's."""
        try:
            if self._reports is not None:
                reports, self._reports = self._reports, None
                failure = next((report.failure for report in reports if report.failure is not None), None)
                if failure is not None:
                    return Turn([], failure=failure)
                found = Found.join([report.found for report in reports])
                causes = {place: why for report in reports for place, why in report.causes.items()}
                self.planner.take(found[np.argsort(found.place, kind="stable")], dict(sorted(causes.items())))
            blocks, self._begun = [*self._begun, *self.planner.draws()], []
            dealt = None
            if not self.planner.hungry():
                dealt = self._deal(self.planner.plan())
                self._planned = self.planner.state_dict()  # before anything of the next step is drawn
                blocks += self.planner.draws()
            return Turn([(block, self._owners(block)) for block in blocks], dealt)
        except Exception as error:
            self._cause = error
            return Turn([], failure=Failure.of(error, 0))

    def _deal(self, step: Step) -> Dealt:
        """BalancedPacker to ranks."""
        flops = step.samples.excess + step.samples.tokens * self.cost.per_token
        costs = [int(flops[a:b].sum()) for a, b in pairwise(step.starts.tolist())]
        dealt = self.deal(costs, self.grid.data_size)
        return Dealt(step, self._owners(step.samples), [list(groups) for groups in zip(*dealt, strict=True)])

    def _owners(self, drawn: Block | Samples) -> np.ndarray:
        owners = np.zeros(len(drawn), np.int64)
        for place, source in enumerate(self.sources):
            mine = drawn.source == place
            if mine.any():
                owners[mine] = source.owners(drawn.index[mine], self.grid.world)
        return owners

    # --- encoding

    def _encode(self, block: Block, owners: np.ndarray) -> None:
        """Begin to encode what this rank owns of a block."""
        mine, begun = [], {}
        for place in np.flatnonzero(owners == self.grid.rank).tolist():
            source, index, part = int(block.source[place]), int(block.index[place]), int(block.part[place])
            # The parts of a split document that wait in a restored pool come from one encoding.
            key = (source, index, place if part < 0 else -1)
            if key not in begun:
                begun[key] = self.encoders.submit(self._items, source, index)
            mine.append((place, part, (source, index), begun[key]))
        self.coding.append(mine)

    def _items(self, source: int, index: int) -> list[Item]:
        return [packed(item) for item in self.sources[source].items(index)]

    def _encoded(self) -> Report:
        """What is known of this rank's samples of the oldest block."""
        rows: list[tuple[int, Meta]] = []
        causes: dict[int, str] = {}
        failure = None
        for place, part, (source, index), future in self.coding.popleft():
            try:
                items = future.result()
                if not items and index in self.sources[source].bad:
                    causes[place] = self.sources[source].bad[index]
                for item in items:
                    if part in (-1, item.part):
                        rows.append((place, meta_of(item, self.cost)))
                        ref = (self.places[item.source], item.index, item.part)
                        self.kept[ref] = item
                        self.uses[ref] += 1
            except Exception as error:
                self._cause, failure = error, Failure.of(error, self.grid.rank)
        return Report(Found.of_rows(self.planner.mixture.names, rows), causes, failure)

    # --- batches

    def _batch(self, round_: list[list[int]]) -> dict[str, Any]:
        """Send the samples of a round to those who train on them, and make this rank's batch of what came."""
        batch, error = None, None
        outgoing: list[list[tuple[int, Item]]] = [[] for _ in range(self.grid.world)]
        try:
            for data_rank, packs in enumerate(round_):
                self._send_to(data_rank, packs, outgoing)
        except Exception as found:
            error, outgoing = found, [[] for _ in range(self.grid.world)]
        own, outgoing[self.grid.rank] = outgoing[self.grid.rank], []
        came = own if self.group is None else own + exchange.send(outgoing, self.group)  # whatever went wrong here
        try:
            if error is None:
                batch = self.assemble(self._arrived(round_[self.grid.data_rank], came))
        except Exception as found:
            error = found
        exchange.agree(error, self.group)
        return batch

    def _rows(self, packs: list[int]) -> np.ndarray:
        starts = self.dealt.step.starts
        return np.concatenate([np.arange(starts[pack], starts[pack + 1]) for pack in packs])

    def _send_to(self, data_rank: int, packs: list[int], outgoing: list[list[tuple[int, Item]]]) -> None:
        """Put what this rank owns of a batch among what goes out."""
        rows = self._rows(packs)
        mine = np.flatnonzero(self.dealt.owners[rows] == self.grid.rank).tolist()
        if not mine:
            return
        samples = self.dealt.step.samples[rows]
        shares, refs = self._shares(samples), samples.refs
        for place in mine:
            item = self.kept.get(refs[place])
            if item is None:  # who waits for it says so
                continue
            for i, (stills, frames) in enumerate(shares[place]):
                whole = exchange.part(item, stills, frames)
                outgoing[data_rank * self.grid.sequence + i].append((place, whole))
            self._forget(refs[place])

    def _arrived(self, packs: list[int], came: list[tuple[int, Item]]) -> list[Item]:
        """The items of this rank's batch in order.

        Raises:
            KeyeError: they are not those of the plan.
        """
        items = dict(came)
        refs = self.dealt.step.samples[self._rows(packs)].refs
        for place, (source, index, part) in enumerate(refs):
            item = items.get(place)
            name = self.planner.mixture.names[source]
            if item is None or (item.source, item.index, item.part) != (name, index, part):
                raise KeyeError(
                    f"rank {self.grid.rank} was to train on {len(refs)} samples and was sent {len(came)}: sample "
                    f"{index} of {name} did not come from rank {self.sources[source].owner(index, self.grid.world)}"
                )
        if len(came) != len(refs):
            raise KeyeError(f"rank {self.grid.rank} was to train on {len(refs)} samples and was sent {len(came)}")
        return [items[place] for place in range(len(refs))]

    def _forget(self, ref: Ref) -> None:
        self.uses[ref] -= 1
        if not self.uses[ref]:
            del self.uses[ref], self.kept[ref]

    def _shares(self, samples: Samples) -> list[list[tuple[list[Piece] | None, list[Piece] | None]]]:
        """Sample → rank of the sequence group → what it encodes of its stills and of its frames (None: all)."""
        ranks = self.grid.sequence
        if ranks == 1:
            return [[(None, None)]] * len(samples)
        # As in a pack: the stills of all samples, then the frames of all samples.
        stills, sizes = samples.stills.tolist(), samples.sizes
        rows = [(place, 0, i) for place, count in enumerate(stills) for i in range(count)]
        rows += [(place, 1, i) for place, count in enumerate(stills) for i in range(len(sizes[place]) - count)]
        found: list[list[tuple[list[Piece], list[Piece]]]] = [[([], []) for _ in range(ranks)] for _ in stills]
        if rows:
            both = [size[:n] for size, n in zip(sizes, stills, strict=True)]
            both += [size[n:] for size, n in zip(sizes, stills, strict=True)]
            grids = torch.from_numpy(np.concatenate(both).astype(np.int64))
            grids = torch.cat([torch.ones(len(grids), 1, dtype=torch.long), grids], 1)
            for rank, share in enumerate(vision_shares(grids, ranks)):
                for piece in share:
                    place, which, i = rows[piece.frame]
                    found[place][rank][which].append(piece._replace(frame=i))
        return found

    # --- state

    def state_dict(self) -> dict[str, Any]:
        """State after the last step that was handed out whole: rank 0's; the other ranks have none of their own."""
        return {"planner": self._handed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from rank 0's state in a run of any number of ranks; before the first `next`. On all ranks."""
        if self.grid.rank == 0:
            self._begun = self.planner.load_state_dict(state["planner"])
            self._planned = self._handed = state["planner"]

    def close(self) -> None:
        """Wait for the threads that encode; what they have not begun is dropped."""
        self.encoders.shutdown(cancel_futures=True)


def _differing(names: list[str], marks: list[tuple[str, list[dict[str, Any]]]]) -> KeyeError | None:
    """An error that names the first source which two ranks have different copies of. marks: rank → host, of each."""
    host, first = marks[0]
    for rank, (other, found) in enumerate(marks):
        for name, mine, theirs in zip(names, first, found, strict=True):
            if mine != theirs:
                said = [", ".join(f"{key} {value}" for key, value in mark.items()) for mark in (mine, theirs)]
                return ManifestError(
                    f"{name}: the ranks read different data: rank 0 ({host}) has {said[0]}; rank {rank} ({other}) has "
                    f"{said[1]}; copy the same files to every machine"
                )
    return None


def meta_of(item: Item, cost: Cost | TowerCost) -> Meta:
    """What the planner knows of an item."""
    sample = item.sample
    stills, frames = (
        () if grid is None else tuple((height, width) for _, height, width in grid.tolist())
        for grid in (sample.image_grid_thw, sample.video_grid_thw)
    )
    labels = int((sample.labels[1:] != -100).sum())
    excess = cost.excess(item.tokens, labels, [*stills, *frames])
    return Meta(item.source, item.index, item.kind, item.tokens, labels, stills, frames, excess, item.part)
