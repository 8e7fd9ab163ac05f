from fractions import Fraction

import av
import numpy as np
import pytest
from av.video.reformatter import Interpolation
from PIL import Image

from keye.video.clip import open_clip
from keye.video.decoding.picture import FrameConverter
from scripts.clips import clip


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
        painted = FrameConverter("clip", 1).paint(frame, 0.0).numpy()
        assert np.abs(painted - expected).max() <= 3


def film(path, frames, *, aspect=None, matrix=None, codec="libx264", **tags) -> str:
    """Frames [T, H, W, 3] uint8 with a sample aspect ratio, a display matrix or colour tags."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=5, options={"crf": "4"} if codec == "libx264" else {})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        if matrix:
            stream.set_display_matrix(matrix)
        for key, value in tags.items():
            setattr(stream.codec_context, key, value)
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, 5)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return str(path)


def smooth(height: int, width: int, count: int = 3) -> np.ndarray:
    """Frames [count, height, width, 3] uint8 of soft blobs; all rows, columns and corners differ."""
    rows, columns = np.mgrid[:height, :width]
    waves = [np.sin(rows / 23 + columns / (17 + 9 * part)) + columns / width - rows / height for part in range(3)]
    picture = (127 + 60 * np.stack(waves, 2)).clip(0, 255).astype(np.uint8)
    return np.repeat(picture[None], count, 0)


def first(path, **options) -> np.ndarray:
    """The first frame [H, W, 3] as uint8."""
    with open_clip(path, 5.0, 10, **options) as clip:
        frame = next(iter(clip)).pixels
        assert clip.size == tuple(frame.shape[1:])
    return frame.permute(1, 2, 0).numpy()


def coded(path, stretched: tuple[int, int] | None = None) -> np.ndarray:
    """The first frame as PyAV decodes it, or stretched to (height, width) by Pillow.

    FFmpeg rounds the colours of frames that it does not scale down by a level or so, and those it scales, exactly.
    """
    exactly = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
    with av.open(path) as container:
        frame = next(container.decode(video=0))
    pixels = frame.reformat(format="rgb24", interpolation=exactly if stretched else None).to_ndarray()
    return (
        np.asarray(Image.fromarray(pixels).resize(stretched[::-1], Image.Resampling.BICUBIC)) if stretched else pixels
    )


@pytest.mark.parametrize("suffix", [".mkv", ".mp4", ".ts", ".avi"])
@pytest.mark.parametrize(
    ("size", "aspect", "expected"),
    [
        ((288, 352), Fraction(2, 1), (288, 704)),
        ((480, 720), Fraction(8, 9), (540, 720)),  # the shorter side of a pixel grows: nothing is thrown away
        ((576, 720), Fraction(16, 15), (576, 768)),
        ((288, 352), Fraction(1, 1), (288, 352)),
        ((288, 352), Fraction(100, 1), (288, 352)),  # nobody's film
    ],
)
def test_pixels_that_are_not_square_are_stretched(tmp_path, suffix, size, aspect, expected):
    path = film(tmp_path / f"a{suffix}", smooth(*size), aspect=aspect)
    shown = first(path)
    assert shown.shape == (*expected, 3)
    assert np.abs(shown.astype(int) - coded(path, None if expected == size else expected)).mean() < 1


def test_the_real_clip_with_narrow_pixels():
    """176x144 with pixels of 128:117; 176 * 128 / 117 = 192.5."""
    assert first(clip("carphone_pristine.mp4")).shape == (144, 193, 3)


# The eight ways to lay a picture on a screen: a, b, c, d of the display matrix.
LAID = [
    (1, 0, 0, 1),
    (-1, 0, 0, 1),
    (1, 0, 0, -1),
    (-1, 0, 0, -1),
    (0, 1, 1, 0),
    (0, 1, -1, 0),
    (0, -1, 1, 0),
    (0, -1, -1, 0),
]


@pytest.mark.parametrize("laid", LAID)
@pytest.mark.parametrize("aspect", [None, Fraction(2, 1)])
def test_rotated_and_mirrored_videos_follow_their_matrix(tmp_path, laid, aspect):
    """Against the definition: the pixel at (x, y) is shown at (a x + c y, b x + d y), moved into the picture."""
    a, b, c, d = (part << 16 for part in laid)
    path = film(tmp_path / "a.mp4", smooth(64, 96), matrix=(a, b, 0, c, d, 0, 0, 0, 1 << 30), aspect=aspect)
    plain = coded(path, (64, 192) if aspect else None)
    height, width = plain.shape[:2]
    y, x = np.mgrid[:height, :width]
    across, down = laid[0] * x + laid[2] * y, laid[1] * x + laid[3] * y
    across, down = across - across.min(), down - down.min()
    expected = np.empty((down.max() + 1, across.max() + 1, 3), int)
    expected[down, across] = plain
    shown = first(path)
    assert shown.shape == expected.shape and np.abs(shown - expected).mean() < 1


@pytest.mark.parametrize(
    ("size", "tag", "luma"),
    [  # (height, width), the matrix in the file, (Kr, Kb) of the matrix that is meant
        ((720, 1280), 2, (0.2126, 0.0722)),
        ((1080, 608), 2, (0.2126, 0.0722)),
        ((576, 720), 2, (0.299, 0.114)),
        ((480, 854), 2, (0.299, 0.114)),
        ((720, 1280), 6, (0.299, 0.114)),
        ((480, 640), 1, (0.2126, 0.0722)),
    ],
)
def test_untagged_colours_are_those_of_the_pictures_size(tmp_path, size, tag, luma):
    values = (90, 170, 60)  # Y, Cb, Cr, limited range
    path = tmp_path / "flat.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=5)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.colorspace = tag
        frame = av.VideoFrame(size[1], size[0], "yuv420p")
        for plane, value in zip(frame.planes, values, strict=True):
            plane.update(bytes([value]) * plane.buffer_size)
        frame.pts, frame.time_base, frame.colorspace = 0, Fraction(1, 5), tag
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    (kr, kb), y = luma, (values[0] - 16) / 219
    blue, red = ((values[1] - 128) * (2 - 2 * kb) / 224 + y, (values[2] - 128) * (2 - 2 * kr) / 224 + y)
    green = (y - kr * red - kb * blue) / (1 - kr - kb)
    expected = np.clip(np.array([red, green, blue]) * 255, 0, 255)
    assert np.abs(first(path).reshape(-1, 3).mean(0) - expected).max() < 1.5


def test_the_real_hd_clip_against_opencv():
    """OpenCV's reader ignores colour tags, too, and takes BT.601; only red and blue differ by that."""
    cv2 = pytest.importorskip("cv2")
    capture = cv2.VideoCapture(str(clip("bigbuckbunny.mp4")))
    theirs = capture.read()[1][:, :, ::-1].astype(float)
    capture.release()
    # Back to Y, Cb and Cr by BT.601 and forward by BT.709, in full range.
    y = theirs @ (0.299, 0.587, 0.114)
    blue, red = (theirs[..., 2] - y) / 1.772, (theirs[..., 0] - y) / 1.402
    expected = np.stack([y + 1.5748 * red, y - 0.18732 * blue - 0.46812 * red, y + 1.8556 * blue], 2).clip(0, 255)
    assert np.abs(first(clip("bigbuckbunny.mp4")) - expected).mean() < 2.5 < np.abs(theirs - expected).mean() + 2.5
