"""Log-probabilities of the pairs' answers under the start model, computed once before training and kept with the run.

So training needs no second model in memory. A chunk of neighbouring pairs is one file of float32 `[n, 2]`: the summed
log-probabilities of the chosen and the rejected answer, NaN for a pair whose media cannot be read. A start that was
stopped continues with the missing chunks, on any number of processes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from keye.errors import CheckpointError, KeyeError, writing
from keye.files import atomic_file, write_atomically
from rl.policy.scoring import Group, score
from rl.preference.losses import sequence_log_probs
from rl.preference.phase import progress_bar
from rl.run.agree import agree, from_first, gather
from stages.distributed.ranks import first_rank

RECORD = "settings.json"


def pair_scores(model: nn.Module, groups: list[Group]) -> tuple[Tensor, Tensor]:
    """Summed log-probabilities and lengths float32 [P, 2] of the answers of P pairs; each prompt is read once."""
    scored = score(model, groups)
    sums, lengths = sequence_log_probs(scored.log_probs, scored.owner, 2 * len(groups))
    return sums.view(-1, 2), lengths.view(-1, 2)


class References:
    """The start model's log-probabilities of `count` pairs.

    Args:
        folder: is created. settings: what they depend on; a folder with other settings is emptied.
        count: pairs. batch: pairs of a forward pass.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], count: int, batch: int) -> None:
        self.folder, self.count, self.batch = folder, count, batch
        self.rejected: dict[int, str] = {}  # place of a pair → why it cannot be read, on all ranks after `compute`
        self.chunk = min(4096, max(8, count // 512))
        first_rank(lambda: self._open(json.loads(json.dumps(settings | {"pairs": count}))), OSError)

    def _open(self, settings: dict[str, Any]) -> None:
        record = self.folder / RECORD
        try:
            same = json.loads(record.read_text(encoding="utf-8")) == settings
        except (OSError, ValueError):
            same = False
        if not same:
            shutil.rmtree(self.folder, ignore_errors=True)
        with writing(self.folder, "the references", CheckpointError):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(record, json.dumps(settings, indent=1) + "\n")

    def _file(self, chunk: int) -> Path:
        return self.folder / f"{chunk:06d}.npy"

    def missing(self) -> list[int]:
        """The chunks that are not computed yet, the same on every rank; collective."""
        chunks = range(-(-self.count // self.chunk))
        return from_first(lambda: [chunk for chunk in chunks if not self._file(chunk).is_file()])

    @torch.no_grad()
    def compute(self, model: nn.Module, encode: Callable[[int], Group], idle: Group) -> None:
        """Compute the missing chunks with the start model; collective, with the same forward passes on every rank.

        Args:
            model: the model or its DeepSpeed engine, before the first update; in training mode, in which a rank without
                pictures also runs the tower.
            encode: place of a pair → its group; raises KeyeError for media that cannot be read.
            idle: what a rank reads when it has no pair, because ZeRO-3 needs all ranks in each forward pass.
        """
        missing, rank, world = self.missing(), dist.get_rank(), dist.get_world_size()
        with progress_bar() as bar:
            task = bar.add_task("reference log-probabilities", total=len(missing))
            for begin in range(0, len(missing), world):
                mine = missing[begin : begin + world][rank : rank + 1]
                places = range(mine[0] * self.chunk, min((mine[0] + 1) * self.chunk, self.count)) if mine else range(0)
                values = self._values(model, places, encode, idle)
                if mine:
                    agree(lambda chunk=mine[0], values=values: self._write(chunk, values))
                else:
                    agree(lambda: None)
                bar.advance(task, min(world, len(missing) - begin))
        self.rejected = {place: why for part in gather(self.rejected) for place, why in part.items()}

    def _values(self, model: nn.Module, places: range, encode: Callable[[int], Group], idle: Group) -> np.ndarray:
        """float32 [n, 2] of the pairs at `places`; `chunk / batch` forward passes whatever their number."""
        values = np.full((len(places), 2), np.nan, np.float32)
        for begin in range(0, self.chunk, self.batch):
            read: dict[int, Group] = {}

            def encoded(part: range = places[begin : begin + self.batch], read: dict[int, Group] = read) -> None:
                for place in part:
                    try:
                        read[place - places[0]] = encode(place)
                    except KeyeError as error:
                        self.rejected[place] = str(error)

            agree(encoded)
            sums, _ = pair_scores(model, list(read.values()) or [idle])
            if read:
                values[list(read)] = sums.float().cpu().numpy()
        return values

    def _write(self, chunk: int, values: np.ndarray) -> None:
        with writing(self.folder, "the references", CheckpointError):
            with atomic_file(self._file(chunk)) as part, part.open("wb") as file:
                np.save(file, values)

    def load(self) -> np.ndarray:
        """All values float32 [count, 2], after `compute`.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        try:
            parts = [np.load(self._file(chunk)) for chunk in range(-(-self.count // self.chunk))]
            values = np.concatenate(parts)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.folder} cannot be read ({error}); remove it to compute it again") from error
        if values.shape != (self.count, 2):
            raise CheckpointError(f"{self.folder} has {len(values)} of {self.count} pairs; remove it")
        return values
