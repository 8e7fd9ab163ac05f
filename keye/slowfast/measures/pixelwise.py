"""Similarity measures that compare pixels; the default measure is in `keye.slowfast.measures.change`.

All compare frames at 48–256 tokens of 28 pixels, or a fixed fraction of that, whatever the size of the video. On a CPU
they process frame by frame: intermediate results of one frame fit the cache, those of eight do not.

At the thresholds of patch_l1, ssim, mse and lab, a quarter to two fifths of a film trailer's frames (2 fps) are slow.
"""

from collections.abc import Iterator

import numpy as np
import torch

from keye.errors import KeyeError
from keye.slowfast.budget import PATCH, SIDE, fit_size
from keye.slowfast.measures.base import Tower, register
from keye.slowfast.measures.colour import rgb_to_hsv, rgb_to_lab
from keye.slowfast.pixels import normalised
from keye.slowfast.resizing import copy, patches, resize
from keye.slowfast.threads import over_threads


def _at_comparison_size(frames: torch.Tensor) -> torch.Tensor:
    return resize(frames, fit_size(*frames.shape[-2:], 48, 256))


def _interleaved(frames: torch.Tensor) -> torch.Tensor:
    """Frames [T, 3, H, W] as rows of bytes [T, H, 3W]; no copy of channels-last memory, which resizing returns."""
    return frames.permute(0, 2, 3, 1).flatten(2).contiguous()


def _difference(reference: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """|a - b| of uint8 as float32, without float copies of a and b."""
    return (torch.maximum(features, reference) - torch.minimum(features, reference)).float()


def _pieces(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Single frames on a CPU, all frames together elsewhere."""
    return iter(tensor.split(1 if tensor.device.type == "cpu" else max(1, len(tensor))))


def _soft(values: torch.Tensor, same: float, changed: float) -> torch.Tensor:
    """0 at `same` and below, 1 at `changed` and above, linear between."""
    return ((values - same) / (changed - same)).clamp(0, 1)


@register
class PatchL1:
    """Unchanged fraction of the picture, by the mean absolute RGB difference of patches.

    Frames are compared at 48–256 tokens in cells of 14 pixels. A cell whose mean difference is below `SAME` (noise,
    compression flicker) counts as unchanged, above `CHANGED` as fully changed, linearly between. The score is one minus
    the mean change: a cut scores near 0, a small moving object reduces it by about the area it covers. On real clips a
    threshold of 0.3 finds only cuts, 0.6 strong motion too, and 0.9 and above small objects.
    """

    name = "patch_l1"
    threshold = 0.6

    CELL = 14
    SAME, CHANGED = 6.0, 48.0  # of 255

    def prepare(self, frames: torch.Tensor) -> torch.Tensor:
        return _interleaved(_at_comparison_size(frames))

    def compare(self, reference: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        return torch.cat([self._score(reference, piece) for piece in _pieces(features)])

    def _score(self, reference: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        strips = _difference(reference, features).unflatten(1, (-1, self.CELL)).mean(2)
        cells = strips.unflatten(2, (-1, 3 * self.CELL)).mean(-1)
        return 1 - _soft(cells, self.SAME, self.CHANGED).flatten(1).mean(1)


@register
class PatchCosine:
    """The released measure: fraction of 28-px patches whose HSV values have a cosine above 0.7 (keye-vl-utils 1.5.2).

    Frames are compared at 48–256 tokens, in OpenCV's uint8 HSV (hue 0–179). Patches that are black in both frames are
    left out; a pair that is black everywhere counts as identical, where the release gives NaN. HSV values are never
    negative, so the cosine is high for almost any two pictures, and most cuts are missed. It is kept as the baseline.

    Scores equal the release's to the bit: a cosine so near 0.7 that the order of additions could decide is computed
    again in the release's order. Features are bytes: HSV [P, 2352] of P patches, the three values of a pixel together.
    """

    name = "patch_cosine"
    threshold = 0.9

    SIMILAR = 0.7
    UNSURE = 1e-4  # above the float32 error of a sum of 2352 non-negative terms
    BLACK = 0.01
    EPSILON = 1e-8
    TOGETHER = 32  # patches at a time on a CPU: their float copies fit the cache

    def prepare(self, frames: torch.Tensor) -> torch.Tensor:
        height, width = fit_size(*frames.shape[-2:], 48, 256)
        rows, columns = height // SIDE, width // SIDE
        features = frames.new_empty(len(frames), rows * columns, SIDE * SIDE * 3)

        def convert(frame: torch.Tensor, values: torch.Tensor) -> None:
            pixels = resize(frame[None], (height, width))[0].permute(1, 2, 0)
            strips = rgb_to_hsv(pixels).view(rows, SIDE, columns, SIDE * 3)
            copy(strips.transpose(1, 2), values.view(rows, columns, SIDE, SIDE * 3))

        over_threads(convert, frames, features)
        return features

    def compare(self, reference: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        products, norms, reference_norms = self._products(reference, features)
        cosine = products / (reference_norms * norms).clamp(min=self.EPSILON)
        counted = (reference_norms >= self.BLACK) | (norms >= self.BLACK)
        unsure = ((cosine - self.SIMILAR).abs() < self.UNSURE) & counted
        if unsure.any():
            frame, patch = unsure.nonzero(as_tuple=True)
            cosine[frame, patch] = self._released_cosine(reference[patch], features[frame, patch])
        similar = ((cosine > self.SIMILAR) & counted).sum(-1).float()
        total = counted.sum(-1).float()
        return torch.where(total > 0, similar / total.clamp(min=1), torch.ones_like(total))

    def _products(self, reference: torch.Tensor, features: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Inner products with the reference [T, P], norms [T, P] and the reference's norms [P], float32."""
        if features.device.type != "cpu":
            values, other = features.float(), reference.float()
            return (values * other).sum(-1), values.norm(dim=-1), other.norm(dim=-1)
        # NumPy's inner products need one pass and no second copy, and do not wake torch's threads.
        products, norms = np.empty((2, *features.shape[:2]), np.float32)
        reference_norms = np.empty(len(reference), np.float32)
        for start in range(0, len(reference), self.TOGETHER):
            chunk = slice(start, start + self.TOGETHER)
            other = reference[chunk].numpy().astype(np.float32)
            np.vecdot(other, other, out=reference_norms[chunk])
            for frame, product, norm in zip(features.numpy(), products, norms, strict=True):
                values = frame[chunk].astype(np.float32)
                np.vecdot(values, other, out=product[chunk])
                np.vecdot(values, values, out=norm[chunk])
        return tuple(torch.from_numpy(part) for part in (products, np.sqrt(norms), np.sqrt(reference_norms)))

    def _released_cosine(self, reference: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Cosines [P] of HSV uint8 [P, 2352], with the release's operations in its order, on the CPU."""
        # In the release the three channels of a patch follow each other.
        first, second = (v.cpu().unflatten(-1, (-1, 3)).transpose(1, 2).flatten(1).float() for v in (reference, values))
        first_norm, second_norm = (torch.norm(v, p=2, dim=-1, keepdim=True) + self.EPSILON for v in (first, second))
        return ((first / first_norm) * (second / second_norm)).sum(dim=-1).to(reference.device)


@register
class SSIM:
    """Structural similarity of the grey pictures (Wang et al. 2004), 7x7 windows as in scikit-image, clipped at 0.

    Frames are compared at 48–256 tokens in 8-bit grey (0.299 R + 0.587 G + 0.114 B, rounded); sample covariance, data
    range 255, without the border of three pixels. Sums over a window are integers below 2**24, exact in float32.
    """

    name = "ssim"
    threshold = 0.45

    WINDOW = 7

    def prepare(self, frames: torch.Tensor) -> torch.Tensor:
        grey = [self._grey(piece) for piece in _pieces(_at_comparison_size(frames))]
        return torch.cat(grey) if grey else frames.new_empty(0, 1, 1)

    def compare(self, reference: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        first = reference.float()
        first_sum, first_squares = self._window(first), self._window(first * first)
        return torch.cat([self._score(first, first_sum, first_squares, piece) for piece in _pieces(features)])

    def _score(
        self, first: torch.Tensor, first_sum: torch.Tensor, first_squares: torch.Tensor, features: torch.Tensor
    ) -> torch.Tensor:
        # With s the sum and q the sum of squares over n pixels: mean = s / n, variance = (q - s * s / n) / (n - 1).
        n = self.WINDOW**2
        second = features.float()
        second_sum, products = self._window(second), self._window(second * first)
        squares = first_squares + self._window(second.square_())
        cross, both = first_sum * second_sum, first_sum.square() + second_sum.square()
        c1, c2 = (0.01 * 255) ** 2 * n * n, (0.03 * 255) ** 2 * (n - 1)
        # Both fractions are expanded by n * n and by n - 1, which saves a pass over the picture for each.
        structure = products.sub_(cross, alpha=1 / n).mul_(2).add_(c2)
        structure /= squares.sub_(both, alpha=1 / n).add_(c2)
        luminance = cross.mul_(2).add_(c1).div_(both.add_(c1))
        return luminance.mul_(structure).flatten(1).mean(1).clamp(0, 1)

    def _window(self, values: torch.Tensor) -> torch.Tensor:
        """Sums over all 7x7 windows of [..., H, W]: pairs, then fours, so that seven terms take four additions."""
        for dim in (-2, -1):
            size = values.shape[dim]
            twos = values.narrow(dim, 0, size - 1) + values.narrow(dim, 1, size - 1)
            fours = twos.narrow(dim, 0, size - 3) + twos.narrow(dim, 2, size - 3)
            valid = size - self.WINDOW + 1
            sevens = fours.narrow(dim, 0, valid) + twos.narrow(dim, 4, valid)
            values = sevens.add_(values.narrow(dim, 6, valid))
        return values

    @staticmethod
    def _grey(frames: torch.Tensor) -> torch.Tensor:
        red, green, blue = frames.float().unbind(1)
        return (0.299 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114).round_().to(torch.uint8)


@register
class MSE:
    """Peak signal-to-noise ratio of the RGB pictures, from the mean squared error.

    The score is the PSNR in dB over 50. A score of 1 is 50 dB or more (errors below one grey level), 0 is 0 dB (black
    against white). Frames are compared at 48–256 tokens.
    """

    name = "mse"
    threshold = 0.3

    MOST = 50.0  # dB

    def prepare(self, frames: torch.Tensor) -> torch.Tensor:
        return _interleaved(_at_comparison_size(frames))

    def compare(self, reference: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        errors = torch.cat([self._error(reference, piece) for piece in _pieces(features)])
        return (10 * torch.log10(255**2 / errors) / self.MOST).clamp(0, 1)

    @staticmethod
    def _error(reference: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Mean squared error float32 [T]; summed by rows first, which is more precise than one long sum."""
        rows = torch.linalg.vector_norm(_difference(reference, features), dim=-1)
        return torch.linalg.vector_norm(rows, dim=-1).square() / reference.numel()


@register
class Lab:
    """Fraction of the picture whose perceived colour is unchanged: CIE 1976 colour difference in CIELAB.

    Frames are compared at half the sides of 48–256 tokens. A cell of 14 of those pixels (a token) counts as unchanged
    up to a mean difference of `SAME`, the just noticeable 2.3 (Mahy et al. 1994), as fully changed above `CHANGED`,
    linearly between. The score is one minus the mean change.
    """

    name = "lab"
    threshold = 0.5

    SAME, CHANGED = 2.3, 20.0

    def prepare(self, frames: torch.Tensor) -> torch.Tensor:
        height, width = fit_size(*frames.shape[-2:], 48, 256)
        return torch.stack([rgb_to_lab(frame) for frame in resize(frames, (height // 2, width // 2))])

    def compare(self, reference: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        return torch.cat([self._score(reference, piece) for piece in _pieces(features)])

    def _score(self, reference: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        difference = torch.linalg.vector_norm(features - reference, dim=1)
        cells = difference.unflatten(1, (-1, SIDE // 2)).mean(2).unflatten(2, (-1, SIDE // 2)).mean(-1)
        return 1 - _soft(cells, self.SAME, self.CHANGED).flatten(1).mean(1)


@register
class Features:
    """Mean cosine between the vision tower's features of each token; negative cosines count as 0.

    `attach` a tower first; a `SlowFastEncoder` with a tower does so. Frames are compared at 48–64 tokens, so that
    scoring costs a small part of encoding. The threshold is LongVU's (0.83 with DINOv2, arXiv 2410.17434); another
    tower needs its own.
    """

    name = "features"
    threshold = 0.83

    def __init__(self) -> None:
        self.tower: Tower | None = None

    def attach(self, tower: Tower) -> None:
        """Use `tower` for the features of frames."""
        self.tower = tower

    def prepare(self, frames: torch.Tensor) -> torch.Tensor:
        if self.tower is None:
            raise KeyeError("measure 'features' needs a vision tower; give SlowFastEncoder a tower=, or attach() one")
        height, width = fit_size(*frames.shape[-2:], 48, 64)
        pixels = patches(resize(frames, (height, width), "bicubic"), PATCH).flatten(0, 1)
        grid = torch.tensor([(1, height // PATCH, width // PATCH)] * len(frames), device=frames.device).view(-1, 3)
        with torch.no_grad():
            features = self.tower(normalised(pixels), grid).float()
        tokens = (height // SIDE) * (width // SIDE)
        wanted = len(frames) * tokens
        if features.ndim != 2 or len(features) != wanted or not bool(features.isfinite().all()):
            raise KeyeError(
                f"the tower of measure 'features' returned {list(features.shape)} for {wanted} tokens, or values that "
                "are not finite; it must return finite features [tokens, hidden], one row per token of 28 pixels"
            )
        # Rows of length one. A zero row stays zero; the added column makes two zero rows similar to each other.
        features = torch.nn.functional.normalize(features, dim=-1)
        silent = (features.abs().amax(-1, keepdim=True) == 0).float()
        return torch.cat([features, silent], dim=-1).half().unflatten(0, (len(frames), tokens))

    def compare(self, reference: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        cosine = torch.nn.functional.cosine_similarity(features.float(), reference.float()[None], dim=-1)
        return cosine.clamp(0, 1).mean(-1)
