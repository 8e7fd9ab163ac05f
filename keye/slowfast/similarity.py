"""How alike two frames are: one small protocol, several measures, every score in [0, 1] and never NaN.

A measure first turns frames into features (`prepare`, batched, once per frame) and then scores one reference against
many (`compare`). `register` adds your own under a name that recipes and the command line can use.
"""

from typing import Protocol

import torch
import torch.nn.functional as F

from keye.errors import KeyeError
from keye.slowfast.budget import SIDE, fit_size


class Measure(Protocol):
    """Scores how alike frames are. `name` is its registered name, `threshold` the value below which a frame is slow."""

    name: str
    threshold: float

    def prepare(self, frames: torch.Tensor) -> torch.Tensor:
        """Features [T, ...] of frames [T, 3, H, W] uint8 RGB; frames of one clip share one size."""
        ...

    def compare(self, reference: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Scores [T] float32 in [0, 1], 1 = the same, of features [T, ...] against one reference [...]."""
        ...


_MEASURES: dict[str, type[Measure]] = {}


def register(measure: type[Measure]) -> type[Measure]:
    """Make a measure class known under its `name`; use it as a decorator. It is built without arguments."""
    _MEASURES[measure.name] = measure
    return measure


def known_measures() -> list[str]:
    """The names `get_measure` knows."""
    return sorted(_MEASURES)


def get_measure(name: str) -> Measure:
    """The measure registered as `name`; an unknown name is a KeyeError that lists the known ones."""
    if name not in _MEASURES:
        raise KeyeError(f"similarity measure {name!r} is not known; use one of {', '.join(known_measures())}")
    return _MEASURES[name]()


def resize(frames: torch.Tensor, size: tuple[int, int], mode: str = "bilinear") -> torch.Tensor:
    """Frames [T, 3, H, W] uint8 resized to `size` (height, width) with antialiasing, rounded to uint8."""
    if tuple(frames.shape[-2:]) == tuple(size):
        return frames
    # The uint8 kernels are about three times faster on channels-last memory, and give the same bytes.
    frames = frames.contiguous(memory_format=torch.channels_last)
    return F.interpolate(frames, size=size, mode=mode, antialias=True, align_corners=False)


def patches(frames: torch.Tensor, side: int = SIDE) -> torch.Tensor:
    """Frames [T, C, H, W] cut into patches [T, P, C, side, side] in raster order; sides must divide."""
    count, channels, height, width = frames.shape
    grid = frames.reshape(count, channels, height // side, side, width // side, side)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(count, -1, channels, side, side)


@register
class PatchL1:
    """Share of the picture that stayed: per patch, the mean absolute RGB difference, soft between "same" and "changed".

    Frames are compared at 48–256 tokens in cells of 14 pixels. A cell whose mean difference is below `SAME` (noise,
    compression flicker) counts as unchanged, above `CHANGED` as wholly changed, linearly between. The score is one
    minus the mean change: a cut scores near 0, a small moving object costs about the area it covers. On real clips,
    below a threshold of 0.3 there are only cuts, at 0.6 strong motion too; 0.9 and above notice small objects.
    """

    name = "patch_l1"
    threshold = 0.6

    CELL = 14
    SAME, CHANGED = 6.0, 48.0  # of 255

    def prepare(self, frames: torch.Tensor) -> torch.Tensor:
        return resize(frames, fit_size(*frames.shape[-2:], 48, 256)).contiguous()

    def compare(self, reference: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        # |a - b| in uint8, without a float copy of every frame: one of the two saturating differences is always zero.
        difference = torch.maximum(features, reference) - torch.minimum(features, reference)
        cells = F.avg_pool2d(difference.float().mean(1, keepdim=True), self.CELL)
        change = ((cells - self.SAME) / (self.CHANGED - self.SAME)).clamp(0, 1)
        return 1 - change.flatten(1).mean(1)


@register
class PatchCosine:
    """The released measure: share of 28-px patches whose HSV values have a cosine above 0.7 (keye-vl-utils 1.5.2).

    Frames are compared at 48–256 tokens, in OpenCV's uint8 HSV (hue 0–179). Patches black in both frames are left out;
    a pair black everywhere counts as the same, where the release has NaN. HSV values are never negative, so the
    cosine is high for almost any two pictures and most cuts pass unseen: kept as the baseline.
    """

    name = "patch_cosine"
    threshold = 0.9

    SIMILAR = 0.7
    BLACK = 0.01
    EPSILON = 1e-8

    def prepare(self, frames: torch.Tensor) -> torch.Tensor:
        frames = resize(frames, fit_size(*frames.shape[-2:], 48, 256))
        return patches(rgb_to_hsv(frames)).flatten(2)

    def compare(self, reference: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        first, second = reference.float(), features.float()
        first_norm, second_norm = (values.norm(dim=-1, keepdim=True) + self.EPSILON for values in (first, second))
        cosine = ((first / first_norm) * (second / second_norm)).sum(-1)
        counted = ~((first_norm < self.BLACK) & (second_norm < self.BLACK)).squeeze(-1)
        similar = ((cosine > self.SIMILAR) & counted).sum(-1).float()
        total = counted.sum(-1).float()
        return torch.where(total > 0, similar / total.clamp(min=1), torch.ones_like(total))


@register
class SSIM:
    """Structural similarity of the grey pictures (Wang et al. 2004), 7x7 windows as in scikit-image, clipped at 0.

    Compared at 48–256 tokens; sample covariance, data range 255, the border of three pixels left out.
    """

    name = "ssim"
    threshold = 0.6

    WINDOW = 7

    def prepare(self, frames: torch.Tensor) -> torch.Tensor:
        frames = resize(frames, fit_size(*frames.shape[-2:], 48, 256))
        weights = torch.tensor([0.299, 0.587, 0.114], device=frames.device)
        return torch.einsum("tchw,c->thw", frames.float(), weights)

    def compare(self, reference: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        # Moments are taken about mid-grey: in float32 the squares of raw values would lose the small variances.
        first, second = (reference - 128.0)[None, None], (features - 128.0)[:, None]

        def window(values: torch.Tensor) -> torch.Tensor:
            return F.avg_pool2d(values, self.WINDOW, stride=1)

        unbiased = self.WINDOW**2 / (self.WINDOW**2 - 1)
        first_mean, second_mean = window(first), window(second)
        first_variance = unbiased * (window(first * first) - first_mean**2)
        second_variance = unbiased * (window(second * second) - second_mean**2)
        covariance = unbiased * (window(first * second) - first_mean * second_mean)
        first_mean, second_mean = first_mean + 128.0, second_mean + 128.0
        c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        luminance = (2 * first_mean * second_mean + c1) / (first_mean**2 + second_mean**2 + c1)
        structure = (2 * covariance + c2) / (first_variance + second_variance + c2)
        return (luminance * structure).flatten(1).mean(1).clamp(0, 1)


def _division_table(numerator: int) -> torch.Tensor:
    """round(numerator * 4096 / i) for i in 0 … 255, with 0 at 0: fixed-point reciprocals."""
    steps = torch.arange(256, dtype=torch.float64).clamp(min=1)
    table = (numerator * 4096 / steps).round().int()
    table[0] = 0
    return table


def rgb_to_hsv(frames: torch.Tensor) -> torch.Tensor:
    """RGB [T, 3, H, W] uint8 to HSV uint8 with OpenCV's integer arithmetic: hue 0–179, saturation and value 0–255."""
    red, green, blue = frames.int().unbind(-3)
    value = frames.amax(-3).int()
    spread = value - frames.amin(-3).int()
    saturation_of = _division_table(255).to(frames.device)
    hue_of = _division_table(30).to(frames.device)  # 180 degrees over six sectors
    saturation = (spread * saturation_of[value] + 2048) >> 12
    sector = torch.where(
        value == red,
        green - blue,
        torch.where(value == green, blue - red + 2 * spread, red - green + 4 * spread),
    )
    hue = (sector * hue_of[spread] + 2048) >> 12
    hue = torch.where(hue < 0, hue + 180, hue)
    return torch.stack([hue, saturation, value], dim=-3).to(torch.uint8)
