"""Loader: the batches of this rank. Rank 0 plans, each rank encodes the samples that it owns, a thread works ahead."""

import os
import queue
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np

from keye.errors import KeyeError
from keye.video.decoding.prefetch import stop_at_exit
from stages.data.collate import from_bytes, pixel_shares, send, to_bytes, with_share
from stages.data.items import Item
from stages.data.packing.balance import Cost, TowerCost
from stages.data.packing.planner import Planner
from stages.data.packing.samples import Block, Encoded, Meta, Samples, Step
from stages.data.sources.source import different_data
from stages.distributed.parallel import ParallelDims
from stages.distributed.ranks import Failure, agree, broadcast, gather_to_first, gloo_group, on_every_rank

MAX_WORKERS = 16  # encoding threads; more of them only wait for Python's lock
Ref = tuple[int, int, int]  # source, index, part
Assign = Callable[[list[int], int], list[list[list[int]]]]


def encoding_threads(workers: int) -> int:
    """Threads of this process that decode and encode: `workers`, or for 0 this process's share of the cores less one.

    The processes of a machine (LOCAL_WORLD_SIZE, set by torchrun and deepspeed) share its cores. One core of the share
    is left to the training thread; at least two threads overlap reading and decoding.
    """
    if workers:
        return workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    own = cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(2, min(MAX_WORKERS, own - 1))


class Stream(Protocol):
    """A stream of batches with a state. `next` may be collective: then every rank calls it equally often."""

    def next(self) -> Any: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


def _end(ending: threading.Event, credits: "queue.SimpleQueue[bool]") -> None:
    """At the end of the program: make no further batch, even if other ranks wait for it."""
    ending.set()
    credits.put(False)


class Loader:
    """Batches of a stream, `ahead` of them prepared by a thread.

    The thread works by credits: `ahead` at the start and one more for each requested batch. Ranks that request equally
    many batches therefore make equally many, and none is left in a collective.

    Args:
        stream: makes this rank's batches.
        grid: this rank's place; a single process does not use up its credits when it closes.
        ahead: batches prepared in advance.
    """

    def __init__(self, stream: Stream, grid: ParallelDims, ahead: int = 2) -> None:
        self.stream, self.grid, self.ahead = stream, grid, ahead
        self.stalled = 0.0
        self._state = stream.state_dict()
        self._made: queue.SimpleQueue[tuple[Any, Any, BaseException | None]] = queue.SimpleQueue()
        self._credits: queue.SimpleQueue[bool] = queue.SimpleQueue()  # False: no more will come
        self._closing, self._ending = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def next(self) -> Any:
        """The next batch. The seconds of waiting are added to `stalled`."""
        if self._error is not None:
            raise self._error
        started = time.perf_counter()
        if self._thread is None:
            for _ in range(self.ahead):
                self._credits.put(True)
            self._thread = threading.Thread(target=self._work, name="loader", daemon=True)
            stop_at_exit(self._thread, partial(_end, self._ending, self._credits))  # no reference to the thread itself
            self._thread.start()
        self._credits.put(True)
        batch, state, self._error = self._made.get()
        self.stalled += time.perf_counter() - started
        if self._error is not None:
            raise self._error
        self._state = state
        return batch

    def _work(self) -> None:
        while self._credits.get():
            if self._ending.is_set() or self._closing.is_set() and self.grid.world == 1:
                return
            try:
                self._made.put((self.stream.next(), self.stream.state_dict(), None))
            except Exception as error:
                self._made.put((None, None, error))
                return

    def close(self, patience: float | None = None) -> None:
        """Stop the thread and wait for it: a thread that decodes while the interpreter ends would abort the process.

        patience: longest wait in seconds, for a rank that failed alone and whose remaining collectives never complete.
        """
        self._closing.set()
        self._credits.put(False)
        if self._thread is not None:
            self._thread.join(patience)
        if self._thread is None or not self._thread.is_alive():
            self.stream.close()

    def state_dict(self) -> dict[str, Any]:
        """State after the last batch that `next` returned."""
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state; call it before the first `next`."""
        self.stream.load_state_dict(state)
        self._state = state


class Assigned(NamedTuple):
    """A planned step as every rank sees it.

    owners: the rank that encoded each sample, int64 `[N]`. rounds: round → data-parallel rank → packs.
    """

    step: Step
    owners: np.ndarray
    rounds: list[list[list[int]]]


class Message(NamedTuple):
    """Rank 0's message to all ranks: blocks to encode with the owner of each sample, and the next step if planned.

    A message without a step asks for the reports of the oldest block.
    """

    blocks: list[tuple[Block, np.ndarray]]
    assigned: Assigned | None = None
    failure: Failure | None = None


class Report(NamedTuple):
    """A rank's report of its samples of a block. causes: place in the block → why a sample is bad."""

    found: Encoded
    causes: dict[int, str]
    failure: Failure | None


class BatchStream:
    """A stream of batches, one a round; every rank makes the same number of rounds.

    A step takes about four exchanges with rank 0, whatever the number of its samples. Only rank 0's loader thread
    plans; on the other ranks the planner only names the sources.

    Args:
        planner: draws and plans on rank 0.
        cost: of a sample.
        assign: (costs of a step's packs, data-parallel ranks) → rank → round → packs that make one batch.
        assemble: items of a batch → the batch; in a sequence group they have the pixels of this rank's frames alone.
        grid: this rank's place.
        workers: threads that encode.
    """

    def __init__(
        self,
        planner: Planner,
        cost: Cost | TowerCost,
        assign: Assign,
        assemble: Callable[[list[Item]], dict[str, Any]],
        grid: ParallelDims,
        workers: int = 1,
    ) -> None:
        self.planner, self.cost, self.assign, self.assemble, self.grid = planner, cost, assign, assemble, grid
        self.sources = list(planner.mixture.sources.values())
        self.places = {name: place for place, name in enumerate(planner.mixture.names)}
        self.group = gloo_group(grid.world)
        self.encoders = ThreadPoolExecutor(workers, thread_name_prefix="encoder")
        # For each block in progress: place, part, (source, index) and future items of this rank's samples.
        self.encoding: deque[list[tuple[int, int, tuple[int, int], Future[list[Item]]]]] = deque()
        self.kept: dict[Ref, Item] = {}  # encoded here and not sent yet
        self.uses: Counter[Ref] = Counter()
        self.assigned: Assigned | None = None
        self.rounds: deque[list[list[int]]] = deque()  # round → data-parallel rank → packs
        self._restored: list[Block] = []  # to be encoded with the first message
        self._reports: list[Report] | None = None  # on rank 0, of the oldest block
        self._cause: Exception | None = None  # of a failure of this rank
        self._compared = grid.world == 1
        # States of the planner: after the last planned step, and after the last step with all its batches returned.
        self._planned = self._returned = planner.state_dict() if grid.rank == 0 else {}

    def next(self) -> dict[str, Any]:
        """The next batch of this rank; collective.

        Raises:
            KeyeError: the error of any rank, the same on all.
        """
        if not self.rounds:
            self._plan()
        batch = self._batch(self.rounds.popleft())
        if not self.rounds:
            self._returned = self._planned
        return batch

    # --- planning

    def _plan(self) -> None:
        """Exchange messages and reports with rank 0 until the next step is planned."""
        if not self._compared:
            self._compare()
        while True:
            message = broadcast(self._message() if self.grid.rank == 0 else None, self.group)
            if message.failure is not None:
                raise message.failure.error from self._cause
            for block, owners in message.blocks:
                self._encode(block, owners)
            if message.assigned is not None:
                self.assigned, self.rounds = message.assigned, deque(message.assigned.rounds)
                return
            reports = gather_to_first(self._report(), self.group)
            if reports is not None:
                self._reports = reports

    def _compare(self) -> None:
        """Check that all ranks read the same data, because a plan consists of row numbers. Collective."""
        own = on_every_rank(lambda: [source.mark for source in self.sources], self.group)
        marks = gather_to_first((socket.gethostname(), own), self.group)
        agree(None if marks is None else different_data(self.planner.mixture.names, marks), self.group)
        self._compared = True

    def _message(self) -> Message:
        """Rank 0's next message; an error on rank 0 is sent to all ranks."""
        try:
            if self._reports is not None:
                reports, self._reports = self._reports, None
                failure = next((report.failure for report in reports if report.failure is not None), None)
                if failure is not None:
                    return Message([], failure=failure)
                found = Encoded.join([report.found for report in reports])
                causes = {place: why for report in reports for place, why in report.causes.items()}
                self.planner.take(found[np.argsort(found.place, kind="stable")], dict(sorted(causes.items())))
            blocks, self._restored = [*self._restored, *self.planner.draws()], []
            assigned = None
            if not self.planner.hungry():
                assigned = self._assign(self.planner.plan())
                self._planned = self.planner.state_dict()  # before anything of the next step is drawn
                blocks += self.planner.draws()
            return Message([(block, self._owners(block)) for block in blocks], assigned)
        except Exception as error:
            self._cause = error
            return Message([], failure=Failure.of(error, 0))

    def _assign(self, step: Step) -> Assigned:
        """Assign the packs of a step to the data-parallel ranks."""
        flops = step.samples.excess + step.samples.tokens * self.cost.per_token
        costs = [int(flops[a:b].sum()) for a, b in pairwise(step.starts.tolist())]
        ranks = self.assign(costs, self.grid.data_size)
        return Assigned(step, self._owners(step.samples), [list(groups) for groups in zip(*ranks, strict=True)])

    def _owners(self, drawn: Block | Samples) -> np.ndarray:
        owners = np.zeros(len(drawn), np.int64)
        for place, source in enumerate(self.sources):
            mine = drawn.source == place
            if mine.any():
                owners[mine] = source.owners(drawn.index[mine], self.grid.world)
        return owners

    # --- encoding

    def _encode(self, block: Block, owners: np.ndarray) -> None:
        """Start to encode this rank's samples of a block."""
        mine, started = [], {}
        for place in np.flatnonzero(owners == self.grid.rank).tolist():
            source, index, part = int(block.source[place]), int(block.index[place]), int(block.part[place])
            # The parts of a split document that wait in a restored pool come from one encoding.
            key = (source, index, place if part < 0 else -1)
            if key not in started:
                started[key] = self.encoders.submit(self.sources[source].items, index)
            mine.append((place, part, (source, index), started[key]))
        self.encoding.append(mine)

    def _report(self) -> Report:
        """The report of this rank's samples of the oldest block."""
        rows: list[tuple[int, Meta]] = []
        causes: dict[int, str] = {}
        failure = None
        for place, part, (source, index), future in self.encoding.popleft():
            try:
                items = future.result()
                if not items and index in self.sources[source].bad:
                    causes[place] = self.sources[source].bad[index]
                for item in items:
                    if part in (-1, item.part):
                        rows.append((place, Meta.of(item, self.cost)))
                        ref = (self.places[item.source], item.index, item.part)
                        self.kept[ref] = item
                        self.uses[ref] += 1
            except Exception as error:
                self._cause, failure = error, Failure.of(error, self.grid.rank)
        return Report(Encoded.of_rows(self.planner.mixture.names, rows), causes, failure)

    # --- batches

    def _batch(self, round_: list[list[int]]) -> dict[str, Any]:
        """Send the samples of a round to the ranks that train on them; make this rank's batch of those received."""
        batch, error, items = None, None, []
        blobs = [to_bytes([]) for _ in range(self.grid.world)]
        try:
            outgoing: list[list[tuple[int, Item]]] = [[] for _ in range(self.grid.world)]
            for data_rank, packs in enumerate(round_):
                self._send_to(data_rank, packs, outgoing)
            items, outgoing[self.grid.rank] = outgoing[self.grid.rank], []
            blobs = [to_bytes(sent) for sent in outgoing]
        except Exception as found:
            error = found
        received = [] if self.group is None else send(blobs, self.group)  # also after an error here
        try:
            if error is None:
                items = items + [pair for blob in received for pair in from_bytes(blob)]
                batch = self.assemble(self._checked(round_[self.grid.data_rank], items))
        except Exception as found:
            error = found
        agree(error, self.group)
        return batch

    def _rows(self, packs: list[int]) -> np.ndarray:
        starts = self.assigned.step.starts
        return np.concatenate([np.arange(starts[pack], starts[pack + 1]) for pack in packs])

    def _send_to(self, data_rank: int, packs: list[int], outgoing: list[list[tuple[int, Item]]]) -> None:
        """Add this rank's samples of a batch to `outgoing`."""
        rows = self._rows(packs)
        mine = np.flatnonzero(self.assigned.owners[rows] == self.grid.rank).tolist()
        if not mine:
            return
        samples = self.assigned.step.samples[rows]
        shares, refs = pixel_shares(samples, self.grid.sequence), samples.refs
        for place in mine:
            item = self.kept.get(refs[place])
            if item is None:  # the rank that waits for it reports the error
                continue
            for i, share in enumerate(shares[place]):
                outgoing[data_rank * self.grid.sequence + i].append((place, with_share(item, share)))
            self.uses[refs[place]] -= 1
            if not self.uses[refs[place]]:
                del self.uses[refs[place]], self.kept[refs[place]]

    def _checked(self, packs: list[int], received: list[tuple[int, Item]]) -> list[Item]:
        """The items of this rank's batch in order.

        Raises:
            KeyeError: they are not those of the plan.
        """
        items = dict(received)
        refs = self.assigned.step.samples[self._rows(packs)].refs
        counts = f"rank {self.grid.rank} expected {len(refs)} samples and received {len(received)}"
        for place, (source, index, part) in enumerate(refs):
            item = items.get(place)
            name = self.planner.mixture.names[source]
            if item is None or (item.source, item.index, item.part) != (name, index, part):
                owner = int(self.sources[source].owners(np.array([index]), self.grid.world)[0])
                raise KeyeError(f"{counts}: sample {index} of {name} did not come from rank {owner}")
        if len(received) != len(refs):
            raise KeyeError(counts)
        return [items[place] for place in range(len(refs))]

    # --- state

    def state_dict(self) -> dict[str, Any]:
        """State after the last step of which all batches were returned: rank 0's; the other ranks have none."""
        return {"planner": self._returned}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from rank 0's state in a run of any number of ranks; before the first `next`. On all ranks."""
        if self.grid.rank == 0:
            self._restored = self.planner.load_state_dict(state["planner"])
            self._planned = self._returned = state["planner"]

    def close(self) -> None:
        """Wait for the encoding threads; samples not yet started are dropped."""
        self.encoders.shutdown(cancel_futures=True)
