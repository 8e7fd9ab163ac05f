"""The default measure: the part of the picture that changed, apart from light, noise, coding and camera shake.

Both frames are reduced to a small grid of cells, four along the side of a token. Camera motion and light are
compensated. The remaining difference weighs more where it is concentrated: a person who enters a still scene covers one
per cent of the picture, and scattered noise far more.
"""

import torch
import torch.nn.functional as F

from keye.slowfast.budget import SIDE, fit_size
from keye.slowfast.measures.base import register
from keye.slowfast.resizing import resize

CELL = 7  # pixels at the size of comparison
PER_TOKEN = SIDE // CELL  # cells along a token
SAMPLES = 6  # pixels read along a cell, where there are as many


@register
class Change:
    """One minus the change between two frames: half of it local change, half global change.

    Frames are compared at 48-256 tokens, as the mean RGB of cells of 7 pixels (12 kB a frame). The first frame is moved
    with the camera by up to two cells (`follow`) and given the light of the second (`light`). Per cell, the remaining
    difference is reduced by what a shift of a fraction of a cell, rounding, and the noise level of the picture would
    cause (`residual`). Local change is the mean of the fourth powers of the changed fractions of token-sized places, so
    that a few fully changed places weigh more than many slightly changed ones. Global change (`global_change`) is the
    smaller of two differences: of the tokens' mean colours, and of the distribution of colours. Motion changes only the
    first, light only the second, a cut both. The constants were tuned on the tuning clips of
    scripts/bench/encoder/recall.py.

    All sums are over integers, so a frame has the same score to the bit in any batch.
    Known weaknesses: a cut between two fine, even textures of one colour (grass, gravel) is a small change here. So is
    a page of text that replaces another of the same layout (0.92 to 0.99 at 1080p): a fixed threshold misses it, the
    policy `adaptive_budget` does not.
    """

    name = "change"
    threshold = 0.85

    GLOBAL = 0.5  # weight of the global change
    REACH = 2  # cells: largest camera motion that is followed
    FOLLOW = 0.75  # motion is followed where it reduces the difference below this fraction
    LIGHT_GAIN = (0.4, 2.5)
    LIGHT_OFFSET = 48.0  # of 255
    ROUNDING = 3.0  # differences up to this are ignored
    TREMOR = 0.2  # of the local contrast: the effect of a shift by a fifth of a cell
    LIT = 0.25  # of the change in light: the possible error of its estimate
    NOISE, NOISE_MAX = 1.5, 3.0  # factor by which noise is subtracted; noise above the maximum counts as change
    COLOUR = 1.5  # weight of a difference in colour, relative to one in luminance
    SAME = 4.0  # remaining difference up to which a cell counts as unchanged
    # Remaining difference from which a cell counts as fully changed: in flat areas, at most, and per local contrast.
    CHANGED, CHANGED_MAX, BUSY = 30.0, 100.0, 3.0

    def prepare(self, frames: torch.Tensor) -> torch.Tensor:
        """Mean RGB of the cells, uint8 [T, 3, h, w] with h and w multiples of 4."""
        height, width = (side // CELL for side in fit_size(*frames.shape[-2:], 48, 256))
        # For large pictures every second (third, …) pixel suffices for a cell's mean, and is much faster to read.
        step = max(1, min(frames.shape[-2] // (SAMPLES * height), frames.shape[-1] // (SAMPLES * width)))
        return resize(frames[..., ::step, ::step], (height, width)).contiguous()

    def compare(self, reference: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        first, second = reference[None].float(), features.float()
        first, inside = self.follow(first, second)
        gain, offset = self.light(tokens(first), tokens(second))
        lit = torch.where(inside, (gain * first + offset).clamp(0, 255).round(), second)
        changed = self.residual(first, lit, second)
        fourth = (changed**4).double().sum(1) / changed.shape[1] / (255.0 * PER_TOKEN**2) ** 4
        local = fourth.sqrt().sqrt()
        return (1 - (1 - self.GLOBAL) * local - self.GLOBAL * self.global_change(lit, second)).clamp(0, 1).float()

    def follow(self, first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Move the first frame [1, 3, h, w] with the camera, for each of the second frames [T, 3, h, w].

        All shifts of up to `REACH` cells are tried on the grey pictures, at every second cell that is visible in all.

        Returns:
            (moved first frame [T, 3, h, w], bool [T, 1, h, w]: where it has pixels of the picture)
        """
        height, width = first.shape[-2:]
        up, left = (min(self.REACH, side // 6) for side in (height, width))

        def moves(cells: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
            return cells.unfold(-2, rows, 1).unfold(-2, columns, 1)  # [..., down, across, rows, columns]

        inner = second.sum(1)[:, None, None, up : height - up : 2, left : width - left : 2]
        tried = moves(first.sum(1)[0], height - 2 * up, width - 2 * left)[..., ::2, ::2]
        errors = (tried - inner).abs().sum((-2, -1)).flatten(1)
        still = errors.shape[1] // 2
        order = torch.arange(errors.shape[1], device=errors.device) / errors.shape[1]  # of equal ones the first
        least, best = (errors + order).min(1)
        best = torch.where(least < self.FOLLOW * errors[:, still], best, still)
        down, across = best // (2 * left + 1), best % (2 * left + 1)
        margins = (left, left, up, up)
        moved = moves(F.pad(first, margins, mode="replicate"), height, width)[0].permute(1, 2, 0, 3, 4)
        shows = moves(F.pad(first.new_ones(height, width), margins), height, width)
        return moved[down, across], shows[down, across][:, None] > 0

    def light(self, first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gain and offset [T, 3, 1, 1] that map the colours [T, 3, P] of the first frame's tokens to the second's.

        Three rounds of least squares per channel, each over the tokens that the round before explained. Where the
        frames do not correlate (a cut), gain is 1 and offset 0.
        """
        first, second = first.double(), second.double()
        counted = torch.ones_like(second)
        for _ in range(3):
            number = counted.sum(-1, keepdim=True)
            mean_first = (counted * first).sum(-1, keepdim=True) / number
            mean_second = (counted * second).sum(-1, keepdim=True) / number
            variance = (counted * first * first).sum(-1, keepdim=True) / number - mean_first**2
            covariance = (counted * first * second).sum(-1, keepdim=True) / number - mean_first * mean_second
            gain = ((covariance + 25) / (variance + 25)).clamp(*self.LIGHT_GAIN)
            offset = (mean_second - gain * mean_first).clamp(-self.LIGHT_OFFSET, self.LIGHT_OFFSET)
            error = (second - gain * first - offset).abs()
            middle = error.kthvalue((error.shape[-1] + 1) // 2, dim=-1, keepdim=True).values
            counted = (error <= 2.5 * middle + 1).double()
        trust = ((_correlation(first, second) - 0.5) / 0.3).clamp(0, 1)
        gain, offset = 1 + (gain - 1) * trust, offset * trust
        return gain[..., None].float(), offset[..., None].float()

    def residual(self, first: torch.Tensor, lit: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """How much each place changed, int64 [T, P] from 0 to 255 * its cells; arguments [T, 3, h, w].

        Places have the size of tokens and are half a token apart, so that the position of an object hardly matters.
        """
        difference = second - lit
        luminance = (77 * difference[:, :1] + 150 * difference[:, 1:2] + 29 * difference[:, 2:]) / 256
        colour = (difference[:, ::2] - luminance).abs()
        grey_lit, grey_second = lit.mean(1, keepdim=True), second.mean(1, keepdim=True)
        slopes = _contrast(grey_lit), _contrast(grey_second)
        relit = (lit - first).abs().amax(1, keepdim=True)
        allowed = self.ROUNDING + self.TREMOR * torch.maximum(*slopes) + self.LIT * relit
        over = (luminance.abs() - allowed + self.ROUNDING).clamp(min=0).mul(16).round()
        noise = tokens(over)[:, 0].div(16)
        noise = noise.kthvalue((2 * noise.shape[-1] + 4) // 5, dim=-1).values.clamp(max=self.NOISE_MAX)
        allowed = allowed + self.NOISE * noise[:, None, None, None]
        left = (luminance.abs() - allowed).clamp(min=0)
        left = left + self.COLOUR * (colour - allowed).clamp(min=0).sum(1, keepdim=True)
        # Mean over 2x2 cells: connected change remains, a single cell loses three quarters.
        left = F.pad(left, (0, 1, 0, 1), mode="replicate").mul(16).round()
        left = left[..., 1:, :] + left[..., :-1, :]
        left = (left[..., 1:] + left[..., :-1]) / 64
        # In flat areas a small difference matters; in texture the same difference does not. Maximum over 3x3 cells.
        busy = F.pad(torch.minimum(*slopes), (1, 1, 1, 1), mode="replicate")
        busy = torch.maximum(torch.maximum(busy[..., 1:-1, :], busy[..., :-2, :]), busy[..., 2:, :])
        busy = torch.maximum(torch.maximum(busy[..., 1:-1], busy[..., :-2]), busy[..., 2:])
        full = (self.CHANGED + self.BUSY * busy).clamp(max=self.CHANGED_MAX)
        changed = ((left - self.SAME) / (full - self.SAME)).clamp(0, 1).mul(255).round()
        halves = _sums(changed, PER_TOKEN // 2)
        halves = halves[..., 1:, :] + halves[..., :-1, :]
        return (halves[..., 1:] + halves[..., :-1]).flatten(1).long()

    def global_change(self, lit: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Global change [T] in [0, 1] from the first frame in the second's light [T, 3, h, w] to the second."""
        moved = (tokens(second) - tokens(lit)).abs().amax(1)
        moved = ((moved - 6) / 54).clamp(0, 1).mul(255).round().double().mean(-1) / 255
        bins = (_histogram(second) - _histogram(lit)).abs().sum(-1).double()
        return torch.minimum(moved, bins / (2 * lit.shape[-1] * lit.shape[-2]))


def tokens(cells: torch.Tensor) -> torch.Tensor:
    """Means over tokens [T, C, P] of cells [T, C, h, w]."""
    return (_sums(cells, PER_TOKEN) / PER_TOKEN**2).flatten(2)


def _sums(cells: torch.Tensor, side: int) -> torch.Tensor:
    """Sums over squares of `side` cells; adding slices is several times faster than pooling."""
    rows = sum(cells[..., i::side, :] for i in range(1, side)) + cells[..., ::side, :]
    return sum(rows[..., i::side] for i in range(1, side)) + rows[..., ::side]


def _correlation(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The correlation [T, C, 1] of [T, C, P] with [T, C, P]; 1 for flat pictures."""
    mean_first, mean_second = first.mean(-1, keepdim=True), second.mean(-1, keepdim=True)
    variances = [(v * v).mean(-1, keepdim=True) - m**2 + 9 for v, m in ((first, mean_first), (second, mean_second))]
    covariance = (first * second).mean(-1, keepdim=True) - mean_first * mean_second + 9
    return covariance / (variances[0] * variances[1]).clamp(min=1).sqrt()


def _contrast(grey: torch.Tensor) -> torch.Tensor:
    """The slope of a grey picture [T, 1, h, w] at each cell, from its four neighbours."""
    padded = F.pad(grey, (1, 1, 1, 1), mode="replicate")
    across = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]).abs()
    down = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]).abs()
    return (across + down) / 2


def _histogram(cells: torch.Tensor) -> torch.Tensor:
    """Counts [T, 128] of the colours of cells [T, 3, h, w] 0-255: eight steps of luminance, four by four of colour."""
    red, green, blue = cells.int().unbind(1)
    luminance = (77 * red + 150 * green + 29 * blue) >> 8
    blueness, redness = ((blue - luminance + 128) >> 6).clamp(0, 3), ((red - luminance + 128) >> 6).clamp(0, 3)
    bins = ((luminance >> 5) * 16 + blueness * 4 + redness).flatten(1).long()
    counts = torch.zeros(len(cells), 128, dtype=torch.long, device=cells.device)
    return counts.scatter_add_(1, bins, torch.ones_like(bins))
