"""Merging: the weighted mean of models, or what their training added to a common base, tensor by tensor.

Pre-training ends with it: the same model is annealed on several mixtures, and the results are averaged (report
§pre-training, model merging). Only one tensor of each model is in memory at a time.
"""

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import Tensor

from keye.checkpoint.shards import INDEX, Computed, atomic_directory, open_checkpoint, read_json, write_shards
from keye.errors import CheckpointError

WEIGHTS = {".safetensors", ".bin", ".pt", ".pth"}
IGNORED = {"transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures"}
"""Keys of config.json in which models of the same architecture may differ."""


class Weights:
    """The tensors of a Hugging Face directory, sharded or not, and its config; only headers are read.

    Raises:
        CheckpointError: no safetensors there, or a damaged file.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.tensors = open_checkpoint(directory)
        self.config = read_json(self.directory / "config.json")

    def read(self, name: str) -> Tensor:
        """One tensor, as pages of its file; do not write to it."""
        return self.tensors[name].mapped()


def merge(
    directories: Sequence[str | Path],
    out: str | Path,
    weights: Sequence[float] | None = None,
    shard_bytes: int = 4 << 30,
    progress: bool = True,
    base: str | Path | None = None,
) -> Path:
    """Write the mean of the models in `directories` to `out`, with the first one's config, tokenizer and processor.

    The mean is computed in float32 and stored in the models' own dtype.

    Args:
        weights: how much each model counts, divided by their sum; equal weights by default.
        shard_bytes: largest size of an output file, unless one tensor is larger.
        progress: whether to report progress on stdout.
        base: the model that all were trained from. The result is then the base plus, for each model, its weight (not
            divided by the sum) times what its training changed (task arithmetic, arXiv 2212.04089). It may have another
            floating-point dtype, such as the bf16 of a release whose fine-tuned models are fp32.

    Raises:
        CheckpointError: a directory that holds no model, models that differ in more than their values, or `out` exists
            and is not empty.
    """
    if base is None:
        return combine(directories, _shares(directories, weights), out, shard_bytes, progress)
    given = [1 / len(directories)] * len(directories) if weights is None else list(weights)
    if len(given) != len(directories):
        raise CheckpointError(f"{len(given)} weights for {len(directories)} models; give one for each")
    return combine([*directories, base], [*given, 1 - sum(given)], out, shard_bytes, progress, mixed=True)


def combine(
    directories: Sequence[str | Path],
    shares: Sequence[float],
    out: str | Path,
    shard_bytes: int = 4 << 30,
    progress: bool = True,
    mixed: bool = False,
) -> Path:
    """Write the sum of models, each times its share (any number; models with share 0 are not read), as `merge` does.

    mixed: the models may have different floating-point dtypes; the sum is stored in those of the first.
    `out` appears under its name only when it is complete.
    """
    models, shares = [Weights(directory) for directory in directories], list(shares)
    check_compatible(models, mixed)
    parts = [(model, share) for model, share in zip(models, shares, strict=True) if share] or [(models[0], 0.0)]
    with atomic_directory(out) as part:
        for path in sorted(models[0].directory.iterdir()):
            if path.is_file() and path.suffix not in WEIGHTS and path.name != INDEX:
                shutil.copyfile(path, part / path.name)
        with _reporting(progress) as report:
            write_shards(_sums(parts), part, shard_bytes, report)
        recipe = {"models": [str(model.directory) for model in models], "weights": shares}
        (part / "merge.json").write_text(json.dumps(recipe, indent=2) + "\n")
    return Path(out)


def check_compatible(models: Sequence[Weights], mixed: bool = False) -> None:
    """Refuse models that differ in architecture or vocabulary; and in dtype, unless `mixed`.

    Raises:
        CheckpointError: names the tensor, key or file that differs.
    """
    first = models[0]
    for model in models[1:]:
        both = f"{first.directory} and {model.directory}"
        for name in sorted(first.tensors.keys() ^ model.tensors.keys()):
            has, lacks = (first, model) if name in first.tensors else (model, first)
            raise CheckpointError(
                f"tensor {name} is in {has.directory} but not in {lacks.directory}; merge models of one architecture"
            )
        for name, one in first.tensors.items():
            two = model.tensors[name]
            floats = mixed and one.known_dtype.is_floating_point and two.known_dtype.is_floating_point
            if one.shape != two.shape or one.code != two.code and not floats:
                raise CheckpointError(
                    f"tensor {name} is {one.code} {list(one.shape)} in {first.directory} but {two.code} "
                    f"{list(two.shape)} in {model.directory}; merge models of the same shapes and dtype"
                )
        key = _difference(first.config, model.config)
        if key is not None:
            raise CheckpointError(f"config.json of {both} differ in {key}; merge models of the same configuration")
        if _vocabulary(first.directory) != _vocabulary(model.directory):
            raise CheckpointError(f"tokenizer.json of {both} differ; merge models that share a vocabulary")


def _shares(directories: Sequence[str | Path], weights: Sequence[float] | None) -> list[float]:
    if len(directories) < 2:
        raise CheckpointError("one model cannot be averaged; name two or more")
    weights = [1.0] * len(directories) if weights is None else list(weights)
    if len(weights) != len(directories):
        raise CheckpointError(f"{len(weights)} weights for {len(directories)} models; give one for each")
    if not all(0 < weight < float("inf") for weight in weights):
        raise CheckpointError(f"weights {', '.join(f'{w:g}' for w in weights)} must all be above 0")
    return [weight / sum(weights) for weight in weights]


def _sums(parts: Sequence[tuple[Weights, float]]) -> dict[str, Computed]:
    """The tensors of the result, each computed when it is written; wide dtypes first, so that all are aligned."""
    first = parts[0][0].tensors
    names = sorted(first, key=lambda name: (-first[name].known_dtype.itemsize, name))
    return {name: Computed(first[name].shape, first[name].known_dtype, partial(_sum, parts, name)) for name in names}


def _sum(parts: Sequence[tuple[Weights, float]], name: str) -> Tensor:
    (one, share), *others = parts
    first = one.read(name)
    if not first.is_floating_point():
        for model, _ in others:
            if not torch.equal(first, model.read(name)):
                raise CheckpointError(
                    f"tensor {name} holds integers that differ in {one.directory} and {model.directory}; they have no "
                    "mean, merge models that share them"
                )
        return first
    total = first.float() * share
    for model, share in others:
        total.add_(model.read(name).float(), alpha=share)
    return total.to(first.dtype)


@contextmanager
def _reporting(enabled: bool) -> Iterator[Callable[[int, int], None] | None]:
    """What `write_shards` reports to: a bar in a terminal, otherwise ten lines of a log; None when not enabled."""
    live = enabled and sys.stdout.isatty()
    columns = (TextColumn("merging"), BarColumn(), TaskProgressColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, disable=not live) as bar:
        task, began, tenths = bar.add_task("", total=None), time.monotonic(), 0

        def report(done: int, total: int) -> None:
            nonlocal tenths
            bar.update(task, completed=done, total=total)
            if not live and done * 10 // total > tenths:
                tenths = done * 10 // total
                left = (time.monotonic() - began) / done * (total - done)
                print(f"merging: {done / total:.0%}, about {left:.0f} s left", flush=True)

        yield report if enabled else None


def _difference(one: Any, two: Any, prefix: str = "") -> str | None:
    """The first key in which two configs differ, or None."""
    for key in sorted(one.keys() | two.keys()):
        if key in IGNORED:
            continue
        a, b = one.get(key), two.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found = _difference(a, b, f"{prefix}{key}.")
            if found:
                return found
        elif a != b:
            return f"{prefix}{key} ({a} and {b})"
    return None


def _vocabulary(directory: Path) -> tuple[Any, Any] | None:
    """The tokens and ids in tokenizer.json, without its settings for padding and truncation."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        return None
    values = read_json(path)
    return values.get("model"), values.get("added_tokens")
