"""What a GSPO run was started with, its recipe and its start model, so that two runs are never mixed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from keye.errors import CheckpointError
from rl.recipe import RlRecipe
from stages.checkpoints import checksum

FILE = "run.json"
MAY_CHANGE = ("gspo.steps", "gspo.checkpoint_every", "gspo.decode_batch")
"""Keys that a resumed run may change: the learning rate does not depend on them, nor does what a step computes."""


def claim(out: Path, recipe: RlRecipe, start: Path) -> None:
    """Records in `out/run.json` what this run starts from, or checks that it is what the run started from before.

    Call it on one rank, before anything of `out` is loaded.

    Raises:
        CheckpointError: `out` holds the training of another recipe or of other start weights, named with the remedy.
    """
    told = {"recipe": _flat(dataclasses.asdict(recipe)), "start": fingerprint(start)}
    record = out / FILE
    if any((out / "checkpoints").glob("step-*")):
        _check(out, start, told, json.loads(record.read_text()) if record.is_file() else None)
    out.mkdir(parents=True, exist_ok=True)
    part = record.with_name(record.name + ".part")
    part.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    part.replace(record)


def fingerprint(model: Path) -> str:
    """SHA-256 of the names, sizes and checksums of a model directory's weights and config."""
    digest = hashlib.sha256()
    for path in sorted([*model.glob("*.safetensors"), model / "config.json"]):
        digest.update(f"{path.name} {path.stat().st_size} {checksum(path)}\n".encode())
    return digest.hexdigest()


def _check(out: Path, start: Path, told: dict[str, Any], before: dict[str, Any] | None) -> None:
    remedy = f"remove {out} to train again, or use another --run"
    if before is None:
        raise CheckpointError(f"{out} holds checkpoints, but no {FILE} says what they were trained from; {remedy}")
    if before["start"] != told["start"]:
        raise CheckpointError(f"{out} was trained from other weights than {start} has now; {remedy}")
    for key in sorted(told["recipe"].keys() | before["recipe"].keys()):
        old, new = before["recipe"].get(key), told["recipe"].get(key)
        if old != new and key not in MAY_CHANGE:
            raise CheckpointError(f"{out} was trained with {key} = {old!r}, but the recipe says {new!r}; {remedy}")


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one: `gspo.steps` → value, as JSON gives it back."""
    flat: dict[str, Any] = {}
    for key, value in json.loads(json.dumps(table)).items():
        name = f"{prefix}{key}"
        flat |= _flat(value, name + ".") if isinstance(value, dict) else {name: value}
    return flat
