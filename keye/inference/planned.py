"""A video that a client has planned: frames as pictures at the sizes of a `VideoPlan`, sent with the plan."""

from typing import Any

import torch

from keye.aggregation.plans import encoded_sizes
from keye.encoded import EncodedVideo
from keye.errors import VideoError
from keye.slowfast.pixels import PixelFormat
from keye.slowfast.plan import VideoPlan
from keye.slowfast.resizing import patches
from keye.video.images import load_image


def planned_video(given: Any, max_bytes: int) -> EncodedVideo:
    """The video of a part `video_plan`: {"plan": the JSON of `VideoPlan.to_dict`, "frames": a `data:` URL each}.

    Raises:
        VideoError: not a plan, or frames that are not those of the plan.
    """
    if not isinstance(given, dict) or not isinstance(given.get("plan"), dict):
        raise VideoError('a video_plan needs a plan and frames; write {"plan": {…}, "frames": ["data:…", …]}')
    plan, frames = VideoPlan.from_dict(given["plan"]), given.get("frames")
    sizes = encoded_sizes(plan)
    if not isinstance(frames, list) or len(frames) != len(sizes):
        count = len(frames) if isinstance(frames, list) else 0
        raise VideoError(f"a video_plan has {count} frames and its plan {len(sizes)} entries; send one for each")
    if not all(isinstance(frame, str) and frame.startswith("data:") for frame in frames):
        raise VideoError("the frames of a video_plan must be data: URLs; send PNG pictures in base64")
    if sum(map(len, frames)) * 3 // 4 > max_bytes:
        raise VideoError(f"the frames of a video_plan are larger than {max_bytes:,} bytes; send a smaller video")
    side, rows, grid = plan.side // 2, [], []
    for number, (frame, (height, width)) in enumerate(zip(frames, sizes, strict=True)):
        picture = load_image(frame)
        if tuple(picture.shape[1:]) != (height, width):
            found = f"{picture.shape[2]}x{picture.shape[1]}"
            raise VideoError(f"frame {number} of a video_plan is {found} pixels and its plan has {width}x{height}")
        rows.append(patches(picture[None], side)[0])
        grid.append((1, height // side, width // side))
    return EncodedVideo(torch.cat(rows), torch.tensor(grid), plan, format=PixelFormat(torch.uint8))
