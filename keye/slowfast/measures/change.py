"""The default measure: how much of the picture changed in a way that light, noise, coding or a tremor cannot explain.

Both frames are reduced to a small grid of cells, four along the side of a token. What remains of their difference
after the camera's move and the light have been accounted for counts, the more the more it is gathered in one place: a
person who enters a still view covers one per cent of it, and scattered noise far more.
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
    """One minus the change between two frames, half of it by its strongest places and half by the picture as a whole.

    Frames are compared at 48-256 tokens, as the mean RGB of cells of 7 pixels (12 kB a frame). The first frame follows
    a camera that moved by up to two cells (`follow`) and is lit like the second (`light`); per cell, the difference
    that remains is reduced by what a shift of a fraction of a cell, rounding and the noise seen all over the picture
    would make (`residual`). The changed shares of token-sized places are averaged by their fourth power, so that few
    wholly changed ones weigh more than many slightly changed ones. To this local change comes a global one (`whole`):
    the smaller of how far the tokens' mean colours moved and of how far the distribution of colours did. Motion moves
    the first alone, light the second alone, a cut both. The constants were tuned on the tuning
    clips of scripts/bench/encoder/recall.py.

    Every sum is one of whole numbers, so a frame scores the same, to the bit, in any batch.
    Known to be weak: a cut between two fine, even textures of one colour (grass, gravel) is a small change here.
    """

    name = "change"
    threshold = 0.85

    GLOBAL = 0.5  # weight of the global change
    REACH = 2  # cells that a camera's move is followed
    FOLLOW = 0.75  # a move is followed when it takes the difference below this share of what it is without
    LIGHT_GAIN = (0.4, 2.5)
    LIGHT_OFFSET = 48.0  # of 255
    ROUNDING = 3.0  # differences up to this are nothing
    TREMOR = 0.2  # of the local contrast: a shift by a fifth of a cell
    LIT = 0.25  # of the change in light: how wrong its account may be
    NOISE, NOISE_MAX = 1.5, 3.0  # how many times the noise is taken off; beyond the maximum it is change
    COLOUR = 1.5  # weight of a difference in colour, relative to one in luminance
    SAME = 4.0  # what is left of the difference in a cell that counts as the same
    CHANGED, CHANGED_MAX, BUSY = 30.0, 100.0, 3.0  # … as wholly changed: where it was flat, at most, per local contrast

    def prepare(self, frames: torch.Tensor) -> torch.Tensor:
        """Mean RGB of the cells, [T, 3, h, w] uint8 with h and w multiples of 4."""
        height, width = (side // CELL for side in fit_size(*frames.shape[-2:], 48, 256))
        # Of large pictures every other (third, …) pixel is enough for a cell's mean, and far quicker to read.
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
        return (1 - (1 - self.GLOBAL) * local - self.GLOBAL * self.whole(lit, second)).clamp(0, 1).float()

    def follow(self, first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The first frame [1, 3, h, w] moved as the camera did for each of the second [T, 3, h, w], and where it shows.

        All moves of up to `REACH` cells are tried on the grey pictures, at every second cell that shows in all of them.
        """
        height, width = first.shape[-2:]
        up, left = (min(self.REACH, side // 6) for side in (height, width))

        def moves(cells: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
            return cells.unfold(-2, rows, 1).unfold(-2, columns, 1)  # [..., down, across, rows, columns]

        inner = second.sum(1)[:, None, None, up : height - up : 2, left : width - left : 2]
        tried = moves(first.sum(1)[0], height - 2 * up, width - 2 * left)[..., ::2, ::2]
        errors = (tried - inner).abs().sum((-2, -1)).flatten(1)
        still = errors.shape[1] // 2
        order = torch.arange(errors.shape[1], device=errors.device) / errors.shape[1]  # among equals the first
        least, best = (errors + order).min(1)
        best = torch.where(least < self.FOLLOW * errors[:, still], best, still)
        down, across = best // (2 * left + 1), best % (2 * left + 1)
        margins = (left, left, up, up)
        moved = moves(F.pad(first, margins, mode="replicate"), height, width)[0].permute(1, 2, 0, 3, 4)
        shows = moves(F.pad(first.new_ones(height, width), margins), height, width)
        return moved[down, across], shows[down, across][:, None] > 0

    def light(self, first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gain and offset [T, 3, 1, 1] that turn the colours [T, 3, P] of the first frame's tokens into the second's.

        Least squares for each colour, three times, each time over the tokens that the last one explained. Where the
        frames do not resemble each other (a cut) the light is left as it is.
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
        """How much each place changed, [T, P] int64 from 0 to 255 * its cells; arguments [T, 3, h, w].

        Places are as large as tokens and lie half a token apart, so that it does not matter where a thing stands.
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
        # Over 2x2 cells: what is connected stays, a lone cell loses three quarters.
        left = F.pad(left, (0, 1, 0, 1), mode="replicate").mul(16).round()
        left = left[..., 1:, :] + left[..., :-1, :]
        left = (left[..., 1:] + left[..., :-1]) / 64
        # A line on blank paper is all there is to see there; the same difference amid texture is not. 3x3 cells.
        busy = F.pad(torch.minimum(*slopes), (1, 1, 1, 1), mode="replicate")
        busy = torch.maximum(torch.maximum(busy[..., 1:-1, :], busy[..., :-2, :]), busy[..., 2:, :])
        busy = torch.maximum(torch.maximum(busy[..., 1:-1], busy[..., :-2]), busy[..., 2:])
        wholly = (self.CHANGED + self.BUSY * busy).clamp(max=self.CHANGED_MAX)
        changed = ((left - self.SAME) / (wholly - self.SAME)).clamp(0, 1).mul(255).round()
        halves = _sums(changed, PER_TOKEN // 2)
        halves = halves[..., 1:, :] + halves[..., :-1, :]
        return (halves[..., 1:] + halves[..., :-1]).flatten(1).long()

    def whole(self, lit: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """The global change [T] in [0, 1] from the first frame in the second's light [T, 3, h, w] to the second."""
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
    """The correlation [T, C, 1] of [T, C, P] with [T, C, P]; flat pictures correlate."""
    mean_first, mean_second = first.mean(-1, keepdim=True), second.mean(-1, keepdim=True)
    variances = [(v * v).mean(-1, keepdim=True) - m**2 + 9 for v, m in ((first, mean_first), (second, mean_second))]
    covariance = (first * second).mean(-1, keepdim=True) - mean_first * mean_second + 9
    return covariance / (variances[0] * variances[1]).clamp(min=1).sqrt()


def _contrast(grey: torch.Tensor) -> torch.Tensor:
    """The slope of a grey picture [T, 1, h, w] at each cell, by its four neighbours."""
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
