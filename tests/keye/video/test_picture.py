import gc
import io
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation
from PIL import Image

from keye.video.clip import open_clip
from keye.video.decoding.containers import open_container
from keye.video.decoding.decoder import Decoder
from keye.video.decoding.picture import FrameConverter
from scripts.clips import clip
from tests.keye.video.make import numbered, write_video


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


def opened(source, fps=2.0):
    return Decoder(open_container(source, str(source)), str(source), fps, 1000)


def write_planes(planes: list[np.ndarray], form: str, *, size=(64, 64), codec="ffv1", count=3, **tags) -> io.BytesIO:
    """A lossless film of the same planes over and over."""
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream(codec, rate=5)
        stream.width, stream.height, stream.pix_fmt = *size, form
        for key, value in tags.items():
            setattr(stream.codec_context, key, value)
        for index in range(count):
            frame = av.VideoFrame(*size, form)
            for plane, values in zip(frame.planes, planes, strict=True):
                rows = np.zeros((plane.height, plane.line_size), dtype=np.uint8)
                raw = np.ascontiguousarray(values).view(np.uint8)
                rows[:, : raw.shape[1]] = raw
                plane.update(rows.tobytes())
            frame.pts, frame.time_base = index, Fraction(1, 5)
            for key, value in tags.items():
                setattr(frame, key, value)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return io.BytesIO(file.getvalue())


# ITU-T H.273: (Kr, Kb) and the number of the matrix
MATRICES = {6: (0.299, 0.114), 1: (0.2126, 0.0722), 9: (0.2627, 0.0593)}


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("bits", [8, 10])
def test_colours_follow_the_tags(matrix, full, bits):
    red, green, blue = (
        np.linspace(low, high, 64)[None].repeat(64, 0) / 255 for low, high in ((30, 220), (200, 40), (90, 160))
    )
    kr, kb = MATRICES[matrix]
    luma = kr * red + (1 - kr - kb) * green + kb * blue
    chroma = [(blue - luma) / (2 - 2 * kb), (red - luma) / (2 - 2 * kr)]
    scale = 1 << (bits - 8)
    most = (1 << bits) - 1
    planes = [luma * most] if full else [(16 + 219 * luma) * scale]
    planes += [128 * scale + part * (most if full else 224 * scale) for part in chroma]
    planes = [plane.round().astype("u1" if bits == 8 else "<u2") for plane in planes]
    form = "yuv444p" if bits == 8 else "yuv444p10le"
    film = write_planes(planes, form, colorspace=matrix, color_range=2 if full else 1)
    decoder = opened(film, 5.0)
    pixels = next(iter(decoder.frames())).pixels.float()
    decoder.close()
    expected = torch.from_numpy(np.stack([red, green, blue]) * 255).float()
    assert (pixels - expected).abs().max() <= 3


def test_lossy_conversions_are_warnings():
    grey = np.full((64, 64), 512, dtype="<u2")
    hdr = opened(write_planes([grey] * 3, "yuv444p10le", colorspace=9, color_range=1, color_trc=16, color_primaries=9))
    assert len(list(hdr.frames())) == 2
    assert any("is HDR (PQ)" in warning for warning in hdr.warnings)
    hdr.close()
    strange = opened(write_planes([np.full((64, 64), 128, np.uint8)] * 3, "yuv444p", colorspace=14))
    pixels = next(iter(strange.frames())).pixels
    assert pixels.unique().numel() == 1 and list(strange.frames())
    assert any("an unsupported colour matrix (14); BT.709 is used" in warning for warning in strange.warnings)
    strange.close()


def test_grey_and_transparent_pixels():
    ramp = np.arange(64, dtype=np.uint8)[None].repeat(64, 0) * 4
    decoder = opened(write_planes([ramp], "gray", color_range=2))
    assert torch.equal(next(iter(decoder.frames())).pixels, torch.from_numpy(ramp).expand(3, 64, 64))
    decoder.close()
    black, clear = np.zeros((64, 64), np.uint8), ramp
    decoder = opened(write_planes([np.stack([black, black, black, clear], 2).reshape(64, 256)], "bgra"))
    blended = next(iter(decoder.frames())).pixels  # black of decreasing transparency on white
    assert torch.equal(blended, torch.from_numpy(255 - ramp).expand(3, 64, 64))
    decoder.close()


def test_a_size_that_changes_is_resized_to_the_first(tmp_path):
    parts = [numbered(10, 64, 96), numbered(10, 96, 160)]
    paths = [write_video(tmp_path / f"{n}.webm", part, codec="libvpx", rate=10) for n, part in enumerate(parts)]
    with av.open(str(tmp_path / "both.webm"), "w") as both:
        stream = None
        for part, path in enumerate(paths):
            with av.open(str(path)) as source:
                stream = stream or both.add_stream_from_template(source.streams.video[0])
                for packet in source.demux(video=0):
                    if packet.size:
                        packet.pts, packet.dts = packet.pts + 1000 * part, None
                        packet.stream = stream
                        both.mux(packet)
    decoder = opened(tmp_path / "both.webm", 10.0)
    frames = list(decoder.frames())
    assert len(frames) == 20 and {tuple(frame.pixels.shape) for frame in frames} == {(3, 64, 96)}
    assert any("changes from 96x64 to 160x96 at 1.00 s" in warning for warning in decoder.warnings)
    decoder.close()


def test_a_decoded_frame_is_freed_once_it_is_converted(tmp_path):
    path = write_video(tmp_path / "clip.mp4", numbered(60))
    gc.collect()
    before = _live_frames()  # fixtures of other tests may keep frames
    gc.disable()  # what is left then is part of a reference cycle, and keeps its picture until a collection
    try:
        with open_clip(path, 25.0, 60) as clip:
            most = max(_live_frames() for _ in clip) - before
    finally:
        gc.enable()
    assert most <= 8  # those in the decoder's hands and ahead of the reader


def _live_frames() -> int:
    return sum(type(one) is VideoFrame for one in gc.get_objects())
