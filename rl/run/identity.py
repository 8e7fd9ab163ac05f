"""The recipe, start model and data that a phase of a run was started with, so that a resumed run has the same."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from keye.errors import CheckpointError
from keye.files import write_atomically
from rl.preference.recipe import Mpo, Sft
from rl.recipe import PHASES, Gspo, RlRecipe
from rl.run.agree import gather
from stages.distributed.checkpoints import checkpoints, checksum
from stages.distributed.engine import resolve_precision
from stages.distributed.ranks import first_rank
from stages.recipe import DataRecipe
from stages.typed_toml import former_names

FILE = "run.json"
MAY_CHANGE = (
    "gspo.steps", "gspo.checkpoint_every", "gspo.keep_checkpoints", "gspo.decode_batch_size", "gspo.cache_mb",
    "gspo.micro_batch_tokens", "gspo.sequence_parallel", "gspo.checkpointing", "gspo.offload", "gspo.mlp_tiles",
    "rollout.cache_mb", "rollout.urls", "rollout.model", "rollout.folder", "rollout.concurrency", "rollout.patience",
    "trackers", "mpo.micro_pairs",
    "mpo.checkpointing", "mpo.offload", "mpo.mlp_tiles",
    "sft.data.cache_mb", "sft.data.workers", "sft.keep_finished",
    "sft.async_checkpoints", "sft.heldout_every", "sft.heldout_steps",
)  # fmt: skip
"""Keys that a resumed run may change: neither the learning rate nor what a step computes depends on them.

Those of `gspo` stand for the same keys of the other phases.

The learning rate of another schedule than "constant" depends on `gspo.steps`, which may not change then.
"""
MAY_CHANGE_OF_REWARDS = (
    "url", "api_key_env", "concurrency", "timeout", "patience", "wait", "price", "max_cost", "time_limit", "batch",
)  # fmt: skip
"""Keys of a table `[rewards.<name>]` that a resumed run may change: how a judge is reached, not what it judges."""
GIVEN = ("rewards", "seed")
"""Tables and keys that every record has, so that no default stands in for them."""
READ = (".safetensors", ".json", ".jinja", ".txt", ".model")
"""Suffixes of a model's files: weights, configs, tokenizer, chat template and processor."""


@dataclasses.dataclass(frozen=True)
class Identity:
    """What identifies a run.

    recipe: key → value. files: path, relative to the run's folder → digest or checksum. phase: of the recipe.
    """

    recipe: dict[str, Any]
    files: dict[str, str]
    phase: str = "gspo"


def identity(run: Path, recipe: RlRecipe, digests: dict[str, str], phase: str = "gspo") -> Identity:
    """The identity of a phase of `recipe` in the folder `run`.

    Of a large file of the start model only the ends are read, see `stages.distributed.checkpoints.checksum`.

    Args:
        digests: manifest, as the recipe names it → SHA-256 of the file.
        phase: "sft", "mpo" or "gspo"; the other phases of the recipe may change.
    """
    config = getattr(recipe, phase)
    settings = _settings(recipe, phase) | {f"{phase}.precision": resolve_precision(config.precision)}
    if phase == "gspo":
        loss = config.policy_loss
        settings |= {"gspo.epsilon_low": loss.epsilon_low, "gspo.epsilon_high": loss.epsilon_high}
    start = model_files(run / config.start / "model", f"{config.start}/model/")
    return Identity(settings, digests | start, phase)


def _settings(recipe: RlRecipe, phase: str) -> dict[str, Any]:
    """Key → value of what a phase of a recipe depends on."""
    others = {*PHASES, "blindness", "hints"} - ({"gspo", "blindness", "hints"} if phase == "gspo" else {phase})
    return _flat({key: value for key, value in dataclasses.asdict(recipe).items() if key not in others})


def model_files(folder: Path, prefix: str = "") -> dict[str, str]:
    """Path of each file of a model's directory, after `prefix` → its size and checksum."""
    return {
        f"{prefix}{path.relative_to(folder)}": f"{path.stat().st_size} bytes, CRC-32 {checksum(path)}"
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix in READ and not path.name.startswith(".")
    }


def check_ranks(mine: Identity) -> None:
    """Refuse ranks that read another recipe or other files than rank 0, such as a node's own copy; collective.

    Raises:
        CheckpointError: on all ranks, with the first key or file that differs.
    """
    first, *others = gather(mine)
    for rank, other in enumerate(others, 1):
        for name in _differing(first.files, other.files):
            raise CheckpointError(f"rank {rank} reads another {name} than rank 0; give all nodes the same files")
        for key in _differing(first.recipe, other.recipe):
            values = f"{first.recipe.get(key)!r} on rank 0 and {other.recipe.get(key)!r} on rank {rank}"
            raise CheckpointError(f"{key} is {values}; give all nodes the same recipe and the same --set")


def claim(out: Path, run: Path, now: Identity) -> None:
    """Record in `out/run.json` what this run starts from; a resumed or finished run is compared with the record.

    Call it on one rank, before anything of `out` is loaded.

    Raises:
        CheckpointError: `out` has checkpoints of another recipe, start model or manifest, or no valid record; names the
            key or file and the remedy. Or `out` is a finished GSPO run without its checkpoints.
    """
    if now.phase == "gspo" and (out / "eval.json").exists() and not checkpoints(out / "checkpoints"):
        raise CheckpointError(
            f"{out / 'eval.json'} is of a finished run, but {out / 'checkpoints'} has no complete checkpoint to go on "
            f"from; put the checkpoints back, {_remedy(out)}"
        )
    if checkpoints(out / "checkpoints") or now.phase != "gspo" and (out / "eval.json").exists():
        _check(out, run, now, _read(out))
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / FILE, json.dumps(dataclasses.asdict(now), indent=1) + "\n")


def check_finished(run: Path, recipe: RlRecipe) -> None:
    """Refuse a finished phase `gspo` of the folder `run` that another recipe, start model or data made; collective.

    For a caller that does not train it again. A phase that is trained further is checked by `claim`.

    Raises:
        CheckpointError: on all ranks; names the key or file and the remedy.
    """

    def check() -> None:
        digests = {name: digest_of(run / name) for name in (recipe.gspo.manifest, recipe.heldout.manifest)}
        _check(run / "gspo", run, identity(run, recipe, digests), _read(run / "gspo"))

    first_rank(check, OSError)


def digest_of(file: Path) -> str:
    """SHA-256 of a file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _remedy(out: Path) -> str:
    return f"remove {out} to train again, or use another --out"


def _read(out: Path) -> Identity:
    """The record in `out/run.json`."""
    record = out / FILE
    try:
        found = Identity(**json.loads(record.read_text(encoding="utf-8")))
        if isinstance(found.recipe, dict) and isinstance(found.files, dict):
            return Identity(_present(found.recipe, found.phase), found.files, found.phase)
        reason = "its recipe or files are not tables"
    except FileNotFoundError:
        reason = "it does not exist"
    except (ValueError, TypeError) as error:
        reason = f"it is damaged or of another version: {error}"
    except OSError as error:
        reason = error.strerror or str(error)
    raise CheckpointError(
        f"{out} has checkpoints, but {record} does not say what they were trained from ({reason}); {_remedy(out)}"
    )


def _present(recipe: dict[str, Any], phase: str) -> dict[str, Any]:
    """A recorded recipe with the present names of its keys; keys that it does not have yet are at their defaults."""
    cls = {"sft": Sft, "mpo": Mpo, "gspo": Gspo}[phase]
    former = {f"{phase}.{old}": f"{phase}.{new}" for old, new in former_names(cls).items()}
    required = {"data": DataRecipe(())} if cls is Sft else {}
    default = RlRecipe(**{phase: cls(steps=1, learning_rate=1.0, **required)})
    defaults = {key: value for key, value in _settings(default, phase).items() if key.partition(".")[0] not in GIVEN}
    return defaults | {former.get(key, key): value for key, value in recipe.items()}


def _check(out: Path, run: Path, now: Identity, before: Identity) -> None:
    name = now.phase
    steps, schedule = (before.recipe.get(f"{name}.steps"), now.recipe[f"{name}.steps"]), now.recipe[f"{name}.schedule"]
    if schedule != "constant" and steps[0] != steps[1]:
        raise CheckpointError(
            f"{out} was trained with {name}.steps = {steps[0]}, but the recipe says {steps[1]}; {name}.schedule = "
            f"{schedule!r} depends on the number of steps, so put it back, {_remedy(out)}"
        )
    for key in _differing(before.recipe, now.recipe):
        may_change = key in MAY_CHANGE or key.replace(f"{name}.", "gspo.") in MAY_CHANGE
        if not may_change and not _reaches_judge(key):
            old, new = before.recipe.get(key), now.recipe.get(key)
            raise CheckpointError(
                f"{out} was trained with {key} = {old!r}, but the recipe says {new!r}; {_remedy(out)}"
            )
    for name in _differing(before.files, now.files):
        what = "is new" if name not in before.files else "is gone" if name not in now.files else "has changed"
        raise CheckpointError(
            f"{run / name} {what} since the checkpoints of {out} were trained; put it back as it was, {_remedy(out)}"
        )


def _reaches_judge(key: str) -> bool:
    return key.startswith("rewards.") and key.rpartition(".")[2] in MAY_CHANGE_OF_REWARDS and key.count(".") > 1


def _differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return [key for key in sorted(one.keys() | other.keys()) if one.get(key) != other.get(key)]


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one: `gspo.steps` → value, after a round trip through JSON."""
    flat: dict[str, Any] = {}
    for key, value in json.loads(json.dumps(table)).items():
        name = f"{prefix}{key}"
        flat |= _flat(value, name + ".") if isinstance(value, dict) else {name: value}
    return flat
