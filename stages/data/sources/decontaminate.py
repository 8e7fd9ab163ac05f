"""Near-duplicates: training pictures that an evaluation shows too, found by perceptual hash and kept out.

The hash is the classic one of the cosine transform (pHash): 64 signs of the lowest frequencies of a small grey picture.
It stays the same to a few bits when a picture is stored again, resized or made lighter; other pictures differ in about
half of the bits. It does not see through crops, mirrors or borders.
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

from keye.errors import KeyeError, ManifestError
from keye.processor.processor import KeyeProcessor, Sample
from keye.slowfast.pixels import normalised
from stages.data.sources.formats import Table, kept
from stages.recipe import SourceRecipe

SIDE, BITS = 32, 64
FLAT = 2 / 255  # standard deviation of grey values below which a picture shows nothing that could be known again
# The lowest frequencies but the mean, those of the least sum first.
_ORDER = sorted(((u, v) for u in range(SIDE) for v in range(SIDE)), key=lambda at: (sum(at), at))[1 : BITS + 1]
_ROWS, _COLUMNS = np.array(_ORDER).T
_WEIGHTS = np.uint64(1) << np.arange(BITS, dtype=np.uint64)


def perceptual_hash(picture: Tensor) -> np.uint64 | None:
    """picture float `[3, H, W]` in [−1, 1] → its hash; None where it shows one plain surface."""
    grey = (picture * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0, keepdim=True)[None]
    small = F.interpolate(grey, (SIDE, SIDE), mode="bilinear", antialias=True)[0, 0].numpy() / 2
    if small.std() < FLAT:
        return None
    waves = dctn(small, norm="ortho")[_ROWS, _COLUMNS]
    return (_WEIGHTS * (waves > np.median(waves))).sum(dtype=np.uint64)


def sample_hashes(sample: Sample) -> list[tuple[str, np.uint64]]:
    """What it is and its hash, of each still, and of the first, middle and last slow frame of each video."""
    named: list[tuple[str, Tensor]] = []
    if sample.pixel_values is not None:
        for number, picture in enumerate(_pictures(sample.pixel_values, sample.image_grid_thw), start=1):
            named.append((f"image {number}", picture))
    if sample.pixel_values_videos is not None:
        frames, first = _pictures(sample.pixel_values_videos, sample.video_grid_thw), 0
        for number, plan in enumerate(sample.plans, start=1):
            slow = (plan.frame_types == 0).nonzero()[:, 0].tolist()
            for at in sorted({slow[0], slow[len(slow) // 2], slow[-1]}):
                named.append((f"video {number} at {float(plan.timestamps[at]):.1f} s", frames[first + at]))
            first += len(plan)
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
    """Finds the nearest of many hashes without looking at all of them.

    Two hashes that differ in at most `bits` bits agree in one of `bits + 1` bands at least; only those are compared.
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
        """(place, bits that differ) of the nearest hash within `bits`, the first of equals, or None."""
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
    """The pictures of the evaluations. near: their hashes. names: what each is, in messages."""

    near: Near
    names: list[str]

    def like(self, sample: Sample) -> str | None:
        """Why a sample must not be trained on, or None."""
        for name, value in sample_hashes(sample):
            found = self.near.find(value)
            if found is not None:
                place, bits = found
                return f"its {name} is like {self.names[place]}, kept for evaluation ({bits} of {BITS} bits differ)"
        return None


def open_decontamination(
    paths: tuple[str, ...], bits: int, processor: KeyeProcessor, run: str = ""
) -> Decontamination | None:
    """What recognises all pictures of these manifests; None where there is no manifest.

    Hashes are kept beside the cache of `datasets`, so that an evaluation is decoded once.

    Raises:
        ManifestError: a manifest is missing or shows no picture.
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
    with np.load(kept("hashes", mark, ".npz", partial(_write, table, processor))) as saved:
        found, names = saved["hashes"], saved["names"].tolist()
    if not len(found):
        raise ManifestError(
            f"{path}: it shows no picture that training pictures could be like; correct data.decontaminate_against"
        )
    return found, names


def _write(table: Table, processor: KeyeProcessor, path: str) -> None:
    hashes: list[np.uint64] = []
    names: list[str] = []
    for index in range(len(table)):
        try:
            row, file, line, base = table.find(index)
            shown = sample_hashes(processor.sample(row["messages"], base))
        except KeyeError as error:
            file, line = table.place(index)
            logging.getLogger("stages").warning("not compared with %s line %d: %s", file, line, error)
            continue
        hashes += [value for _, value in shown]
        names += [f"{name} of {file} line {line}" for name, _ in shown]
    with open(path, "wb") as out:
        np.savez(out, hashes=np.array(hashes, dtype=np.uint64), names=np.array(names, dtype=str))
