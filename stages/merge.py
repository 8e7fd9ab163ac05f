"""Merging: the weighted mean of models, or what their training added to a common base, tensor by tensor.

The report's pre-training ends with it: the same model is annealed on several mixtures, and the results are averaged
(report §pre-training, model merging). Memory holds one tensor of each model and the shard that is being filled.
"""

import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from keye.errors import CheckpointError

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth"}
IGNORED = {"transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures"}
"""Keys of config.json in which models of the same architecture may differ."""


class Weights:
    """The tensors of a Hugging Face directory, read one at a time; sharded or not.

    Raises:
        CheckpointError: there is no safetensors file, or one is damaged.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.file_of = {name: file for file in self._files() for name in self._open(file).keys()}  # noqa: SIM118
        self.config = _read_json(self.directory / "config.json")

    def _files(self) -> list[str]:
        if (self.directory / INDEX).is_file():
            return sorted(set(_read_json(self.directory / INDEX).get("weight_map", {}).values()))
        if (self.directory / WHOLE).is_file():
            return [WHOLE]
        raise CheckpointError(
            f"{self.directory} has no {WHOLE}; give a model's directory like runs/demo/annealing/model"
        )

    def _open(self, file: str) -> Any:
        try:
            return safe_open(self.directory / file, framework="pt")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{self.directory / file} cannot be read ({error}); copy or save the model again"
            ) from error

    def kind(self, name: str) -> tuple[list[int], str]:
        """Shape and safetensors dtype ("F32", "BF16" …) of a tensor, which is not read."""
        part = self._open(self.file_of[name]).get_slice(name)
        return part.get_shape(), part.get_dtype()

    def read(self, name: str) -> Tensor:
        """One tensor. The file is opened each time, so that the pages of earlier tensors can be freed."""
        return self._open(self.file_of[name]).get_tensor(name)


def merge(
    directories: Sequence[str | Path],
    out: str | Path,
    weights: Sequence[float] | None = None,
    shard_bytes: int = 4 << 30,
    progress: bool = True,
    base: str | Path | None = None,
) -> Path:
    """Write the mean of the models in `directories` to `out`, with the first one's config, tokenizer and processor.

    The mean is taken in fp32 and stored in the models' own dtype.

    Args:
        weights: of the models, divided by their sum; without them all count the same.
        shard_bytes: size of one output file at most, unless one tensor is larger.
        base: the model that all were trained from. The result is then the base plus, for each model, its weight (as it
            is) times what training changed (task arithmetic, arXiv 2212.04089).

    Raises:
        CheckpointError: a directory is not a model, models differ in more than their values, or `out` is in use.
    """
    if base is None:
        return combine(directories, _shares(directories, weights), out, shard_bytes, progress)
    given = [1 / len(directories)] * len(directories) if weights is None else list(weights)
    if len(given) != len(directories):
        raise CheckpointError(f"{len(given)} weights for {len(directories)} models; give one for each")
    return combine([*directories, base], [*given, 1 - sum(given)], out, shard_bytes, progress)


def combine(
    directories: Sequence[str | Path],
    shares: Sequence[float],
    out: str | Path,
    shard_bytes: int = 4 << 30,
    progress: bool = True,
) -> Path:
    """Write the sum of models, each times its share (any number; models with share 0 are not read), as `merge` does.

    `out` is written under another name and renamed, so that it is complete or does not exist.
    """
    models, shares = [Weights(directory) for directory in directories], list(shares)
    check_compatible(models)
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists already; name another place or remove it")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for path in sorted(models[0].directory.iterdir()):
        if path.is_file() and path.suffix not in WEIGHTS and path.name != INDEX:
            shutil.copyfile(path, partial / path.name)
    parts = [(model, share) for model, share in zip(models, shares, strict=True) if share] or [(models[0], 0.0)]
    _write(_sums(parts, progress), partial, shard_bytes)
    recipe = {"models": [str(model.directory) for model in models], "weights": shares}
    (partial / "merge.json").write_text(json.dumps(recipe, indent=2) + "\n")
    if out.exists():
        out.rmdir()
    return partial.rename(out)


def check_compatible(models: Sequence[Weights]) -> None:
    """Refuse models that differ in architecture or vocabulary.

    Raises:
        CheckpointError: names the tensor, key or file that differs.
    """
    first = models[0]
    for model in models[1:]:
        both = f"{first.directory} and {model.directory}"
        for name in sorted(first.file_of.keys() ^ model.file_of.keys()):
            has, lacks = (first, model) if name in first.file_of else (model, first)
            raise CheckpointError(
                f"tensor {name} is in {has.directory} but not in {lacks.directory}; merge models of one architecture"
            )
        for name in first.file_of:
            (one, one_type), (two, two_type) = first.kind(name), model.kind(name)
            if (one, one_type) != (two, two_type):
                raise CheckpointError(
                    f"tensor {name} is {one_type} {one} in {first.directory} but {two_type} {two} in "
                    f"{model.directory}; merge models of the same shapes and dtype"
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
        raise CheckpointError(
            f"weights {', '.join(f'{w:g}' for w in weights)} are not all above 0; correct them or leave them out"
        )
    return [weight / sum(weights) for weight in weights]


def _sums(parts: Sequence[tuple[Weights, float]], progress: bool) -> Iterator[tuple[str, Tensor]]:
    first = parts[0][0]
    names = sorted(first.file_of)
    sizes = [torch.Size(first.kind(name)[0]).numel() for name in names]
    live = progress and sys.stdout.isatty()
    columns = (TextColumn("merging"), BarColumn(), TaskProgressColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, disable=not live) as bar:
        task, began = bar.add_task("", total=sum(sizes)), time.monotonic()
        for i, (name, size) in enumerate(zip(names, sizes, strict=True), 1):
            yield name, _sum(parts, name)
            bar.advance(task, size)
            if progress and not live and i * 10 // len(names) > (i - 1) * 10 // len(names):
                left = (time.monotonic() - began) / sum(sizes[:i]) * sum(sizes[i:])
                print(f"merging: {i} of {len(names)} tensors, about {left:.0f} s left", flush=True)


def _sum(parts: Sequence[tuple[Weights, float]], name: str) -> Tensor:
    (one, share), *others = parts
    first = one.read(name)
    if not first.is_floating_point():
        for model, _ in others:
            if not torch.equal(first, model.read(name)):
                raise CheckpointError(
                    f"tensor {name} has integers that differ in {one.directory} and {model.directory}; "
                    "they have no mean: merge models that share them"
                )
        return first
    total = first.float() * share
    for model, share in others:
        total.add_(model.read(name).float(), alpha=share)
    return total.to(first.dtype)


def _write(tensors: Iterator[tuple[str, Tensor]], out: Path, shard_bytes: int) -> None:
    """Tensors → one file, or shards of at most `shard_bytes` and their index."""
    shard: dict[str, Tensor] = {}
    shards: list[list[str]] = []
    total = used = 0

    def close() -> None:
        save_file(shard, out / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if shard and used + size > shard_bytes:
            close()
            used = 0
        shard[name] = tensor
        used, total = used + size, total + size
    close()
    if len(shards) == 1:
        (out / "shard-0").rename(out / WHOLE)
        return
    places = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (out / f"shard-{i}").rename(out / file)
        places |= dict.fromkeys(names, file)
    (out / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2) + "\n")


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


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); save the model again") from error


def _vocabulary(directory: Path) -> tuple[Any, Any] | None:
    """The tokens and ids in tokenizer.json, without its settings for padding and truncation."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        return None
    values = _read_json(path)
    return values.get("model"), values.get("added_tokens")
