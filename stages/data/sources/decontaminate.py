"""Decontaminate: exclude training pictures that an evaluation also shows, found by perceptual hash.

The hash is pHash, of the cosine transform: 64 signs of the lowest frequencies of a small grey picture. It changes by a
few bits if a picture is stored again, resized or made lighter; different pictures differ in about half of the bits. It
does not recognize crops, mirror images or borders.
"""

import json
import logging
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from scipy.fft import dctn
from torch import Tensor

from keye.aggregation.plans import entry_frames
from keye.errors import ManifestError
from keye.processor.processor import KeyeProcessor, Sample
from keye.slowfast.pixels import normalised
from stages.data.recipe import SourceRecipe
from stages.data.sources.formats import Table
from stages.data.sources.parquet import NotReadableNow
from stages.data.sources.stored import arrays_of, kept_array

SIDE, BITS = 32, 64
FLAT = 2 / 255  # standard deviation of grey values below which a picture has no recognizable content
# The lowest frequencies except the mean, sorted by their sum.
_ORDER = sorted(((u, v) for u in range(SIDE) for v in range(SIDE)), key=lambda at: (sum(at), at))[1 : BITS + 1]
_ROWS, _COLUMNS = np.array(_ORDER).T
_WEIGHTS = np.uint64(1) << np.arange(BITS, dtype=np.uint64)


def perceptual_hash(picture: Tensor) -> np.uint64 | None:
    """The hash of a picture float `[3, H, W]` in [−1, 1]; None for a uniform one."""
    grey = (picture * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0, keepdim=True)[None]
    small = F.interpolate(grey, (SIDE, SIDE), mode="bilinear", antialias=True)[0, 0].numpy() / 2
    if small.std() < FLAT:
        return None
    waves = dctn(small, norm="ortho")[_ROWS, _COLUMNS]
    return (_WEIGHTS * (waves > np.median(waves))).sum(dtype=np.uint64)


def sample_hashes(sample: Sample) -> list[tuple[str, np.uint64]]:
    """(name, hash) of each still, and of the first, middle and last slow frame of each video."""
    named: list[tuple[str, Tensor]] = []
    if sample.pixel_values is not None:
        for number, picture in enumerate(_pictures(sample.pixel_values, sample.image_grid_thw), start=1):
            named.append((f"image {number}", picture))
    if sample.pixel_values_videos is not None:
        frames, first = _pictures(sample.pixel_values_videos, sample.video_grid_thw), 0
        for number, plan in enumerate(sample.plans, start=1):
            slow, shown = (plan.frame_types == 0).nonzero()[:, 0].tolist(), entry_frames(plan)
            for at in sorted({slow[0], slow[len(slow) // 2], slow[-1]}):
                named.append((f"video {number} at {float(plan.timestamps[at]):.1f} s", frames[first + shown[at]]))
            first += max(shown) + 1
    hashed = [(name, perceptual_hash(picture)) for name, picture in named]
    return [(name, value) for name, value in hashed if value is not None]


def _pictures(patches: Tensor, grids: Tensor) -> list[Tensor]:
    """patches `[N, 3, 14, 14]`, bytes or in [−1, 1], grids `[F, 3]` → F pictures `[3, 14 h, 14 w]`."""
    sizes = grids.tolist()
    parts = normalised(patches).split([t * h * w for t, h, w in sizes])
    return [
        part.unflatten(0, (h, w)).permute(2, 0, 3, 1, 4).reshape(3, 14 * h, 14 * w)
        for part, (_, h, w) in zip(parts, sizes, strict=True)
    ]


class Near:
    """Finds the nearest of many hashes without comparing all of them.

    Two hashes that differ in at most `bits` bits agree in at least one of `bits + 1` bands; only those are compared.
    """

    def __init__(self, hashes: np.ndarray, bits: int) -> None:
        self.hashes, self.bits = hashes.astype(np.uint64), bits
        edges = np.linspace(0, BITS, bits + 2).astype(int)
        self.bands = []
        for low, high in zip(edges[:-1], edges[1:], strict=True):
            shift, mask = np.uint64(low), np.uint64((1 << int(high - low)) - 1)
            values = (self.hashes >> shift) & mask
            order = np.argsort(values, kind="stable")
            self.bands.append((shift, mask, order, values[order]))

    def find(self, value: np.uint64) -> tuple[int, int] | None:
        """(place, differing bits) of the nearest hash within `bits`, the first of equals; else None."""
        places = []
        for shift, mask, order, values in self.bands:
            band = (value >> shift) & mask
            places.append(order[np.searchsorted(values, band) : np.searchsorted(values, band, side="right")])
        near = np.unique(np.concatenate(places))
        if not len(near):
            return None
        distances = np.bitwise_count(self.hashes[near] ^ value)
        best = int(distances.argmin())
        return (int(near[best]), int(distances[best])) if distances[best] <= self.bits else None


@dataclass(frozen=True)
class Decontamination:
    """The pictures of the evaluations. near: their hashes. names: of each in messages."""

    near: Near
    names: list[str]

    def match(self, sample: Sample) -> str | None:
        """Why a sample must be excluded from training, or None."""
        for name, value in sample_hashes(sample):
            found = self.near.find(value)
            if found is not None:
                place, bits = found
                difference = f"{bits} of {BITS} bits differ"
                return f"its {name} is similar to {self.names[place]}, kept for evaluation ({difference})"
        return None


def open_decontamination(
    paths: tuple[str, ...], bits: int, processor: KeyeProcessor, run: str = ""
) -> Decontamination | None:
    """A filter for the pictures of these manifests; None without a manifest.

    Hashes are stored next to the cache of `datasets`, so an evaluation is decoded once.

    Args:
        paths: manifests of evaluations.
        bits: that may differ.
        processor: encodes their chats.
        run: replaces `{run}` in the paths.

    Raises:
        ManifestError: a manifest is missing or has no picture.
    """
    if not paths:
        return None
    hashes: list[np.ndarray] = []
    names: list[str] = []
    for path in paths:
        found, where = _manifest_hashes(path.replace("{run}", run), processor)
        hashes.append(found)
        names += where
    return Decontamination(Near(np.concatenate(hashes), bits), names)


def _manifest_hashes(path: str, processor: KeyeProcessor) -> tuple[np.ndarray, list[str]]:
    table = Table(SourceRecipe(path, "image"), path)
    settings = [processor.encoder, processor.image]
    mark = json.dumps([path, [part.mark for part in table.parts], settings, SIDE, BITS], sort_keys=True)
    saved = kept_array("hashes", mark, ".npz", partial(_write, table, processor), arrays_of)
    found, names = saved["hashes"], saved["names"].tolist()
    if not len(found):
        raise ManifestError(
            f"{path}: it has no picture to compare with training pictures; correct data.decontaminate_against"
        )
    return found, names


def _write(table: Table, processor: KeyeProcessor, path: str) -> None:
    hashes: list[np.uint64] = []
    names: list[str] = []
    for index in range(len(table)):
        try:
            row, file, line, base = table.find(index)
            shown = sample_hashes(processor.sample(row["messages"], base))
        except NotReadableNow:  # the stored hashes would be incomplete
            raise
        except Exception as error:  # templates, decoders and image libraries may raise any class
            file, line = table.place(index)
            logging.getLogger("stages").warning("not compared with %s line %d: %s", file, line, error)
            continue
        hashes += [value for _, value in shown]
        names += [f"{name} of {file} line {line}" for name, _ in shown]
    with open(path, "wb") as out:
        np.savez(out, hashes=np.array(hashes, dtype=np.uint64), names=np.array(names, dtype=str))
