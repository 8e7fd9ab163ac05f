import av
import numpy as np
import pytest

from keye.slowfast.picture import Painter


@pytest.mark.parametrize("form", ["yuv420p", "yuvj420p", "yuv422p", "yuv444p"])
@pytest.mark.parametrize("width", [2, 6, 18, 32, 40, 56, 64, 90, 360, 424, 854, 1080])
def test_every_column_is_written(form, width):
    """Whatever the memory held before, and as FFmpeg's own conversion to interleaved colours has it."""
    drawn = np.random.default_rng(width).integers(0, 256, (20, width, 3), dtype=np.uint8)
    frame = av.VideoFrame.from_ndarray(drawn, format="rgb24").reformat(format=form)
    expected = frame.reformat(format="rgb24").to_ndarray().transpose(2, 0, 1).astype(int)
    for filling in (0, 97, 255):
        soiled = [np.full(3 * 20 * (width + 64), filling, dtype=np.uint8) for _ in range(20)]
        del soiled
        painted = Painter("clip", 1).paint(frame, 0.0).numpy()
        assert np.abs(painted - expected).max() <= 3
