"""Feed: this rank's batches. All ranks follow one plan; each encodes the samples it owns and is sent those it needs."""

from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from stages.data import exchange
from stages.data.balance import Cost, TowerCost
from stages.data.items import Item, packed
from stages.data.planner import Meta, Planner
from stages.parallel import Grid, Piece, vision_shares

Ref = tuple[str, int]
Deal = Callable[[list[int], int], list[list[list[int]]]]


class Feed:
    """A stream of batches, one a round; every rank makes the same number of rounds.

    Args:
        planner: the same on every rank.
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
        grid: Grid,
        workers: int = 1,
    ) -> None:
        self.planner, self.cost, self.deal, self.assemble, self.grid = planner, cost, deal, assemble, grid
        self.group = exchange.make_group(grid.world)
        self.encoders = ThreadPoolExecutor(workers, thread_name_prefix="encoder")
        self.coding: deque[list[tuple[int, Future[Item | None]]]] = deque()
        self.kept: dict[Ref, Item] = {}  # encoded here and not trained on yet
        self.uses: Counter[Ref] = Counter()
        self.packs: list[list[Meta]] = []
        self.rounds: deque[list[list[int]]] = deque()  # round → data-parallel rank → packs
        self._planned = self._handed = planner.state_dict()

    def next(self) -> dict[str, Any]:
        """The next batch of this rank; collective.

        Raises:
            KeyeError: what any rank met, the same on all.
        """
        if not self.rounds:
            self._plan()
        batch, error = None, None
        try:
            batch = self._batch(self.rounds.popleft())
        except Exception as found:
            error = found
        exchange.agree(error, self.group)
        if not self.rounds:
            self._handed = self._planned
        return batch

    def _plan(self) -> None:
        """Plan a step; its state is the planner's before anything of the next one is drawn."""
        self._encode(self.planner.draws())
        while self.planner.hungry():
            self.planner.take(self._encoded())
            self._encode(self.planner.draws())
        self.packs = self.planner.plan()
        self._planned = self.planner.state_dict()
        self._encode(self.planner.draws())
        costs = [sum(self._flops(meta) for meta in pack) for pack in self.packs]
        dealt = self.deal(costs, self.grid.data_size)
        self.rounds = deque([list(groups) for groups in zip(*dealt, strict=True)])

    def _flops(self, meta: Meta) -> int:
        return meta.excess + meta.tokens * self.cost.per_token

    def _encode(self, blocks: list[list[Ref]]) -> None:
        """Begin to encode what this rank owns of each block."""
        for block in blocks:
            mine = [
                (place, self.encoders.submit(self._item, name, index))
                for place, (name, index) in enumerate(block)
                if self.planner.mixture.sources[name].owner(index, self.grid.world) == self.grid.rank
            ]
            self.coding.append(mine)

    def _item(self, name: str, index: int) -> Item | None:
        item = self.planner.mixture.sources[name].item(index)
        return None if item is None else packed(item)

    def _encoded(self) -> list[Meta | None]:
        """What is known of the oldest block, in its order, the same on every rank."""
        found: dict[int, Meta] = {}
        error = None
        for place, future in self.coding.popleft():
            try:
                item = future.result()
                if item is not None:
                    found[place] = meta_of(item, self.cost)
                    self.kept[found[place].ref] = item
                    self.uses[found[place].ref] += 1
            except Exception as caught:
                error = caught
        exchange.agree(error, self.group)
        everywhere: dict[int, Meta] = {}
        for part in exchange.gather(found, self.group):
            everywhere |= part
        return [everywhere.get(place) for place in range(len(self.planner.flight[0]))]

    def _batch(self, round_: list[list[int]]) -> dict[str, Any]:
        """Send the samples of a round to those who train on them, and make this rank's batch of what came."""
        outgoing: list[list[tuple[int, Item]]] = [[] for _ in range(self.grid.world)]
        for data_rank, packs in enumerate(round_):
            metas = [meta for pack in packs for meta in self.packs[pack]]
            shares = self._shares(metas)
            for place, meta in enumerate(metas):
                if meta.ref in self.kept and self._owns(meta):
                    for i, (stills, frames) in enumerate(shares[place]):
                        whole = exchange.part(self.kept[meta.ref], stills, frames)
                        outgoing[data_rank * self.grid.sequence + i].append((place, whole))
                    self._forget(meta.ref)
        own, outgoing[self.grid.rank] = outgoing[self.grid.rank], []
        came = own if self.group is None else own + exchange.send(outgoing, self.group)
        items = [item for _, item in sorted(came, key=lambda pair: pair[0])]
        return self.assemble(items)

    def _owns(self, meta: Meta) -> bool:
        source = self.planner.mixture.sources[meta.source]
        return source.owner(meta.index, self.grid.world) == self.grid.rank

    def _forget(self, ref: Ref) -> None:
        self.uses[ref] -= 1
        if not self.uses[ref]:
            del self.uses[ref], self.kept[ref]

    def _shares(self, metas: list[Meta]) -> list[list[tuple[list[Piece] | None, list[Piece] | None]]]:
        """Sample → rank of the sequence group → what it encodes of its stills and of its frames (None: all)."""
        ranks = self.grid.sequence
        if ranks == 1:
            return [[(None, None)] for _ in metas]
        # As in a pack: the stills of all samples, then the frames of all samples.
        rows = [(place, 0, i) for place, meta in enumerate(metas) for i in range(len(meta.stills))]
        rows += [(place, 1, i) for place, meta in enumerate(metas) for i in range(len(meta.frames))]
        sizes = [size for meta in metas for size in meta.stills] + [size for meta in metas for size in meta.frames]
        found: list[list[tuple[list[Piece], list[Piece]]]] = [[([], []) for _ in range(ranks)] for _ in metas]
        if rows:
            grids = torch.tensor([(1, height, width) for height, width in sizes])
            for rank, share in enumerate(vision_shares(grids, ranks)):
                for piece in share:
                    place, which, i = rows[piece.frame]
                    found[place][rank][which].append(piece._replace(frame=i))
        return found

    def state_dict(self) -> dict[str, Any]:
        """State after the last step that was handed out whole, the same on every rank."""
        return {"planner": self._handed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state of any number of ranks; before the first `next`."""
        self._encode(self.planner.load_state_dict(state["planner"]))
        self._planned = self._handed = state["planner"]

    def close(self) -> None:
        """Wait for the threads that encode; what they have not begun is dropped."""
        self.encoders.shutdown(cancel_futures=True)


def meta_of(item: Item, cost: Cost | TowerCost) -> Meta:
    """What the planner knows of an item."""
    sample = item.sample
    stills, frames = (
        () if grid is None else tuple((height, width) for _, height, width in grid.tolist())
        for grid in (sample.image_grid_thw, sample.video_grid_thw)
    )
    labels = int((sample.labels[1:] != -100).sum())
    excess = cost.excess(item.tokens, labels, [*stills, *frames])
    return Meta(item.source, item.index, item.kind, item.tokens, labels, stills, frames, excess)
