"""The measures of how alike two frames are that come with the package; `keye.slowfast.change` holds the default."""

import torch
import torch.nn.functional as F

from keye.slowfast.budget import fit_size
from keye.slowfast.colour import rgb_to_hsv
from keye.slowfast.similarity import patches, register, resize


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
