"""The policy's weights for the servers of a rollout: written once when they have changed, then loaded by each server.

Each version is a folder with a name of its own, `<run>-<start of this process>-<step>`, so that a server never reads a
folder that changes, and answers of another run, or of an earlier start of this one, are recognised.
"""

from __future__ import annotations

import hashlib
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from rl.rollout.served import ServedRollout
from rl.run.agree import from_first
from stages.distributed.ranks import first_rank


class PolicySync:
    """Writes the policy and has the servers load it; every method is collective.

    Args:
        rollout: this rank's connections to the servers.
        folder: is written to; the servers permit it with --allow-reload. Folders of an earlier start of this run in it
            are removed.
        run: the folder that identifies the run.
        save: writes the policy to a folder, completely or not at all; collective.
    """

    def __init__(self, rollout: ServedRollout, folder: Path, run: Path, save: Callable[[Path], None]) -> None:
        self.rollout, self.folder, self.save = rollout, folder, save
        self.run = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:8]
        self.start = from_first(lambda: uuid.uuid4().hex[:6])
        self.step: int | None = None
        first_rank(lambda: self._keep(""), OSError)

    def __call__(self, step: int) -> None:
        """Have every server answer with the policy after `step` steps; nothing happens if they do already.

        Raises:
            KeyeError: on all ranks, if rank 0 cannot write it or a server does not load it.
        """
        if step == self.step:
            return
        version = f"{self.run}-{self.start}-{step}"
        first_rank(lambda: self.folder.mkdir(parents=True, exist_ok=True), OSError)
        self.save(self.folder / version)
        self.rollout.expect(version)
        first_rank(lambda: self.rollout.load(version))
        # Kept until the next one: a server that is started again loads it.
        first_rank(lambda: self._keep(version), OSError)
        self.step = step

    def close(self) -> None:
        """Remove what was written; the servers keep their weights."""
        first_rank(lambda: self._keep(""), OSError)

    def _keep(self, version: str) -> None:
        """Remove this run's folders except one."""
        for path in self.folder.glob(f"{self.run}-*"):
            if path.name != version:
                shutil.rmtree(path, ignore_errors=True)
