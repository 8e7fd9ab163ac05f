"""What a run makes before its first stage: the world and the tokenizer of its recipe, the record of its environment."""

import dataclasses
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from keye.checkpoint.shards import read_json
from keye.errors import CheckpointError, writing
from keye.files import write_atomically
from keye.processor.tokenizer import load_tokenizer, train_tokenizer
from stages.recipe import Recipe

WORLD = "world.json"  # the part of the recipe that a run's world was drawn with


def prepare_world(recipe: Recipe, run: Path) -> None:
    """Draw the recipe's SlowFastWorld unless it exists.

    Raises:
        CheckpointError: the run has another one.
    """
    world = recipe.data.world
    if world is None:
        return
    from keye.world import generate

    settings, record = json.loads(json.dumps(dataclasses.asdict(world))), run / "world" / WORLD
    remedy = f"remove {run / 'world'} to draw the world again"
    found = read_json(record, remedy) if record.exists() else settings
    changed = [key for key in settings if found.get(key) != settings[key]]
    if changed:
        drawn, now = differing(found.get(changed[0]), settings[changed[0]])
        raise CheckpointError(
            f"{run / 'world'} was drawn with {changed[0]} = {drawn!r}, but data.world says {now!r}; take another "
            f"--out, or remove {run}, with its trained stages, to start again"
        )
    with writing(record.parent, "the world", CheckpointError):
        record.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(record, json.dumps(settings) + "\n")
    for split, counts in (("train", world.counts), ("heldout", world.heldout)):
        if counts and not (run / "world" / f"{split}.jsonl").exists():
            generate(run / "world", split, counts=counts, seed=world.seed, **world.settings)


def differing(one: Any, other: Any) -> tuple[Any, Any]:
    """Two values; of two tables only the entries that differ."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return one, other
    keys = {key for key in one | other if key not in one or key not in other or one[key] != other[key]}
    return {k: v for k, v in one.items() if k in keys}, {k: v for k, v in other.items() if k in keys}


def prepare_tokenizer(recipe: Recipe, run: Path) -> None:
    """`run/tokenizer`: the recipe's, or one trained on the world's text and the manifests' words."""
    if (run / "tokenizer").exists():
        return
    named = recipe.model.tokenizer or recipe.model.path
    if named:
        tokenizer = load_tokenizer(named)
    else:
        from keye.world import texts

        tokenizer = train_tokenizer(texts(recipe.seed), recipe.model.vocab_size)
    tokenizer.save_pretrained(run / "tokenizer")


def environment(value: int) -> dict[str, object]:
    """Versions, machine and seed of a run."""
    names = ("torch", "transformers", "deepspeed", "datasets", "av", "numpy")
    return {
        "python": sys.version.split()[0],
        "packages": {name: importlib.metadata.version(name) for name in names},
        "machine": platform.platform(),
        "cores": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "processes": dist.get_world_size() if dist.is_initialized() else 1,
        "seed": value,
    }
