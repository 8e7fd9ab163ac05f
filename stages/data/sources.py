"""Sources: a manifest of chats → encoded samples, one after the other, for ever; a bad line never stops a run."""

import json
import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from keye.errors import KeyeError, ManifestError
from keye.prompt.processor import KeyeProcessor, Sample
from stages.recipe import SourceRecipe

PIXELS = ("pixel_values", "pixel_values_videos")


@dataclass(frozen=True)
class Item:
    """One encoded sample, where it came from (`source`, `index`: enough to encode it again) and its caption."""

    sample: Sample
    source: str
    index: int
    kind: str
    caption: str

    @property
    def tokens(self) -> int:
        return len(self.sample.input_ids)

    @property
    def ref(self) -> list[Any]:
        return [self.source, self.index]


class Quarantine:
    """Counts bad samples and writes each once to a JSONL file: file, line, reason."""

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = Path(path) if path else None
        self.seen: set[tuple[str, int]] = set()
        # A resumed run meets the same bad lines again; they may have been mended meanwhile, so only writing is spared.
        self.written = {(row["file"], row["line"]) for row in self.rows()}

    def __len__(self) -> int:
        return len(self.seen)

    def rows(self) -> list[dict[str, Any]]:
        """What all processes have written so far."""
        if self.path is None or not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]

    def add(self, file: str, line: int, reason: str) -> None:
        """Record one bad sample; `line` counts from 1."""
        if (file, line) in self.seen:
            return
        self.seen.add((file, line))
        logging.getLogger("stages").warning("skipped %s line %d: %s", file, line, reason)
        if self.path is not None and (file, line) not in self.written:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as out:
                out.write(json.dumps({"file": file, "line": line, "reason": reason}) + "\n")


class Cache:
    """Encoded samples in RAM up to `limit` bytes; when full, what was used longest ago goes first.

    Normalised pixels that came from 8-bit frames are kept as 8 bits, a quarter of the room.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0
        self.entries: OrderedDict[Any, tuple[Item, int]] = OrderedDict()

    def get(self, key: Any) -> Item | None:
        if key not in self.entries:
            return None
        self.entries.move_to_end(key)
        return _unpacked(self.entries[key][0])

    def put(self, key: Any, item: Item) -> None:
        packed = _packed(item)
        tensors = [value for value in vars(packed.sample).values() if isinstance(value, Tensor)]
        size = sum(t.numel() * t.element_size() for t in tensors)
        if key in self.entries or size > self.limit:
            return
        self.entries[key] = (packed, size)
        self.used += size
        while self.used > self.limit:
            self.used -= self.entries.popitem(last=False)[1][1]


class Source:
    """The samples of one manifest that have the wanted kind and families, in an order that only the seed decides.

    Args:
        recipe: which part of which manifest.
        processor: encodes a chat; its settings are part of the cache key.
        seed: of the order; every epoch has another.
        shard: (i, n): this process sees every n-th sample, beginning with the i-th; the same ones in every epoch.
        cache, quarantine: shared by all sources of a process.
        limit: samples of more tokens are quarantined.
        run: what `{run}` in the recipe's path stands for.

    Raises:
        ManifestError: no such file, or nothing in it fits.
    """

    def __init__(
        self,
        recipe: SourceRecipe,
        processor: KeyeProcessor,
        seed: int,
        cache: Cache,
        quarantine: Quarantine,
        shard: tuple[int, int] = (0, 1),
        limit: int = 1 << 30,
        run: str = "",
    ) -> None:
        self.recipe, self.processor, self.seed, self.limit = recipe, processor, seed, limit
        self.cache, self.quarantine = cache, quarantine
        # Checkpoints know a source by its name, so the name stays when the run's folder moves.
        self.path = recipe.path.replace("{run}", run)
        self.name = f"{recipe.path}#{recipe.kind}" + "".join(f"+{family}" for family in recipe.families)
        self.settings = json.dumps([processor.encoder, processor.image], sort_keys=True)
        self.lines = read_lines(self.path)
        chosen = [i for i, line in enumerate(self.lines) if self._wanted(line, i, report=shard[0] == 0)]
        self.indices = chosen[shard[0] :: shard[1]]
        if not self.indices:
            raise ManifestError(
                f"{self.path}: only {len(chosen)} {recipe.kind} samples of families "
                f"{', '.join(recipe.families) or '(any)'} for {shard[1]} readers; give more or mend data.sources"
            )
        self.epoch, self.position, self.failures = 0, 0, 0

    def _wanted(self, line: str, index: int, report: bool) -> bool:
        if not line.strip():
            return False
        try:
            row = json.loads(line)
            kind = kind_of(row["messages"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if report:
                reason = f"no 'messages' list ({error})" if not isinstance(error, ValueError) else f"not JSON ({error})"
                self.quarantine.add(self.path, index + 1, reason)
            return False
        families = self.recipe.families
        return kind == self.recipe.kind and (not families or row.get("family") in families)

    def next(self) -> Item:
        """The next good sample; bad ones are quarantined and passed over.

        Raises:
            ManifestError: a whole epoch without a good one.
        """
        while True:
            item = self.item(self._advance())
            if item is not None:
                self.failures = 0
                return item
            self.failures += 1
            # The good ones may come first in one epoch and last in the next: with one of n, 2n − 2 bad in a row.
            if self.failures >= 2 * len(self.indices) - 1:
                raise ManifestError(
                    f"{self.name}: none of its {len(self.indices)} samples can be used; see quarantine.jsonl for why"
                )

    def _advance(self) -> int:
        if self.position == len(self.indices):
            self.epoch, self.position = self.epoch + 1, 0
        if self.position == 0 or not hasattr(self, "_order"):
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
            self._order = torch.randperm(len(self.indices), generator=generator).tolist()
        self.position += 1
        return self.indices[self._order[self.position - 1]]

    def item(self, index: int) -> Item | None:
        """Sample `index` (line − 1) of the manifest, encoded or from the cache; None when it is bad."""
        key = (self.path, index, self.settings)
        if (self.path, index + 1) in self.quarantine.seen:
            return None
        item = self.cache.get(key)
        if item is None:
            item = self._encode(index)
            if item is None:
                return None
            self.cache.put(key, item)
        if item.tokens > self.limit:
            self.quarantine.add(
                self.path, index + 1, f"{item.tokens} tokens are more than the context of {self.limit}"
            )
            return None
        return replace(item, source=self.name)

    def _encode(self, index: int) -> Item | None:
        messages = json.loads(self.lines[index])["messages"]
        try:
            sample = self.processor.sample(messages, base_dir=Path(self.path).parent)
            if not bool((sample.labels[1:] != -100).any()):
                raise ManifestError("the assistant says nothing; add an assistant message")
            return Item(sample, self.name, index, self.recipe.kind, caption_of(messages))
        except KeyeError as error:
            self.quarantine.add(self.path, index + 1, str(error))
            return None
        except Exception as error:  # a template, a decoder or an image library may raise anything at odd content
            self.quarantine.add(self.path, index + 1, f"{type(error).__name__}: {error}")
            return None

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]
        self.__dict__.pop("_order", None)
        if 0 < self.position <= len(self.indices):
            # The order is made when an epoch begins; make this epoch's now.
            position, self.position = self.position, 0
            self._advance()
            self.position = position


def read_lines(path: str) -> list[str]:
    """JSON lines of a manifest: JSONL line by line, so that one bad line costs only itself, or Parquet row by row.

    Raises:
        ManifestError: no such file.
    """
    import datasets

    if not Path(path).is_file():
        raise ManifestError(f"{path}: no such manifest; mend data.sources in the recipe or make it first")
    datasets.disable_progress_bars()
    if path.endswith(".parquet"):
        rows = datasets.load_dataset("parquet", data_files=path, split="train", keep_in_memory=True)
        return [json.dumps(row) for row in rows]
    rows = datasets.load_dataset("text", data_files=path, split="train", encoding_errors="replace")
    return list(rows["text"])


def kind_of(messages: list[dict[str, Any]]) -> str:
    """ "video", "image" or "text": the dearest thing a chat holds."""
    parts = [part for message in messages if not isinstance(message["content"], str) for part in message["content"]]
    types = {part["type"] for part in parts}
    return "video" if "video" in types else "image" if "image" in types else "text"


def caption_of(messages: list[dict[str, Any]]) -> str:
    """All the assistant's words."""
    words = []
    for message in messages:
        if message["role"] == "assistant":
            content = message["content"]
            words += [content] if isinstance(content, str) else [p["text"] for p in content if p["type"] == "text"]
    return " ".join(words)


def _packed(item: Item) -> Item:
    changed = {name: _map(getattr(item.sample, name), _to_bytes) for name in PIXELS}
    return replace(item, sample=replace(item.sample, **changed))


def _unpacked(item: Item) -> Item:
    changed = {name: _map(getattr(item.sample, name), _from_bytes) for name in PIXELS}
    return replace(item, sample=replace(item.sample, **changed))


def _map(pixels: Tensor | None, change: Callable[[Tensor], Tensor]) -> Tensor | None:
    return None if pixels is None else change(pixels)


def _to_bytes(pixels: Tensor) -> Tensor:
    small = ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    # Only what comes back the same to fp32 rounding may be kept so.
    return small if torch.allclose(_from_bytes(small), pixels, atol=1e-6) else pixels


def _from_bytes(pixels: Tensor) -> Tensor:
    return pixels.float() / 127.5 - 1 if pixels.dtype == torch.uint8 else pixels
