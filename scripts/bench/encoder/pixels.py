"""Do the model's pixels equal a single full-resolution antialiased bicubic resize?

`SlowFastEncoder()(clip).pictures()` may have been scaled twice, because frames of long films are stored at a reduced
size. The reference decodes every frame at full size with PyAV, and Pillow resizes the frames of the plan once.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from keye import SlowFastEncoder
from keye.errors import run
from scripts.bench.common.record import Claim, Table, arguments, out_of, save
from scripts.bench.encoder.media.corpus import real_clips
from scripts.bench.encoder.media.films import film

GOAL = 1.0  # of 255 grey levels
LARGE = 8  # levels that an eye may notice


@dataclass(frozen=True)
class Difference:
    """Of one clip, in grey levels (0–255): mean over all pixels, of the worst frame, and the share above `LARGE`."""

    frames: int
    mean: float
    worst: float
    large: float


def differences(path: Path, **settings: object) -> Difference:
    """The encoder's pictures of a clip against frames that are decoded whole and resized once."""
    encoded = SlowFastEncoder(**settings)(path)
    means, large = [], []
    pictures = zip(encoded.pictures(), full_frames(path, encoded.plan.timestamps.tolist()), strict=True)
    for picture, frame in pictures:
        height, width = picture.shape[1:]
        direct = np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC), np.int16)
        off = np.abs(picture.permute(1, 2, 0).numpy().astype(np.int16) - direct)
        means.append((off.mean(), off.size))
        large.append(((off > LARGE).mean(), off.size))
    weights = [size for _, size in means]
    return Difference(
        len(means),
        float(np.average([mean for mean, _ in means], weights=weights)),
        float(max(mean for mean, _ in means)),
        float(np.average([share for share, _ in large], weights=weights)),
    )


def full_frames(path: Path, times: list[float]) -> Iterator[np.ndarray]:
    """For each of the ascending times (seconds, the container's) the frame shown then, [H, W, 3] uint8 RGB."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        held = None
        following = iter(times)
        wanted = next(following, None)
        for frame in container.decode(stream):
            while wanted is not None and held is not None and frame.time > wanted + 1e-4:
                yield _shown(held, stream.sample_aspect_ratio)
                wanted = next(following, None)
            if wanted is None:
                return
            held = frame
        while wanted is not None:
            yield _shown(held, stream.sample_aspect_ratio)
            wanted = next(following, None)


def _shown(frame: av.VideoFrame, aspect: Fraction | None) -> np.ndarray:
    """A frame with square pixels [H, W, 3], in BT.709 where it is HD and says nothing of colours."""
    aspect = aspect or Fraction(1)
    width, height = round(frame.width * max(aspect, 1)), round(frame.height / min(aspect, 1))
    matrix = "ITU709" if frame.colorspace == 2 and (frame.width >= 1280 or frame.height > 576) else None
    kernel = None if (width, height) == (frame.width, frame.height) else "BICUBIC"
    shown = frame.reformat(width, height, "rgb24", src_colorspace=matrix, dst_colorspace=matrix, interpolation=kernel)
    return shown.to_ndarray()


def main() -> None:
    args = arguments(__doc__).parse_args()
    began = time.monotonic()
    clips = real_clips(["bikes.mp4", "carphone_pristine.mp4"] if args.quick else None)
    seconds, size = (12, (180, 320)) if args.quick else (600, (720, 1280))
    for bframes in (False, True):
        path = film(seconds, bframes, size)
        clips[path.name] = path
    found: dict[str, Difference] = {}
    for name, path in clips.items():
        found[name] = differences(path)
        print(f"  {name:30} mean {found[name].mean:.3f}, worst frame {found[name].worst:.3f}", flush=True)
    worst = max(found, key=lambda name: found[name].mean)
    films = [name for name in found if name.startswith(f"{seconds}s-")]
    claims = [
        Claim(
            f"pixels against a direct full-resolution resize, {len(found)} clips",
            "≤ 1 of 255 grey levels, mean",
            f"at most {found[worst].mean:.3f} ({worst})",
            met=found[worst].mean <= GOAL,
        ),
        Claim(
            "the same, films whose frames are kept smaller than they are decoded",
            "≤ 1 of 255 grey levels, mean",
            ", ".join(f"{found[name].mean:.3f} ({name})" for name in films),
            met=all(found[name].mean <= GOAL for name in films),
        ),
    ]
    rows = [
        (name, one.frames, f"{one.mean:.3f}", f"{one.worst:.3f}", f"{100 * one.large:.2f} %")
        for name, one in found.items()
    ]
    columns = ("clip", "frames", "mean", "mean of the worst frame", f"pixels off by more than {LARGE}")
    tables = [Table("Differences in grey levels, 0–255", columns, rows)]
    save(out_of(args), "pixels", claims, tables, seconds=time.monotonic() - began, quick=args.quick)


if __name__ == "__main__":
    run(main)
