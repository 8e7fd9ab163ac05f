"""Part f: the encoder with a GPU: decoding, scores, patches and tower of real clips, and clips a minute.

Scores and patches on the GPU are compared with those on the CPU, to the bit.
"""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import av
import torch
from av.codec.hwaccel import HWAccel, hwdevices_available
from torch import Tensor

from keye import SlowFastEncoder
from keye.batch.workers import iter_many
from keye.errors import KeyeError, run
from keye.model.config import KeyeConfig
from keye.model.keye import KeyeForConditionalGeneration
from keye.slowfast.measures import get_measure
from keye.slowfast.resizing import patches, resize
from scripts.bench.common.record import Claim, Table
from scripts.bench.gpu.journal import Journal, Values, begin_peak, cell, parser, peak_gb, synchronize
from scripts.clips import fetch_clips

PART = "encoder"
MEASURES = ("change", "patch_cosine", "patch_l1")
COPIES = 16  # of every clip, for the rate of many clips
FRAMES = 24  # of a clip that are scored and resized
COLUMNS = ("what", "clip or measure", "seconds", "frames or clips a second", "equal to the CPU", "GB at the peak")
NOTES = [
    "Decoding: every frame of the clip, by PyAV; NVDEC copies its frames to host memory. Scores: of all frames with "
    "the first. Patches: bicubic resizing and cutting. Tower and projector: of the 8B model with random weights, on "
    "the patches of the default plan. All: from the file to the features, one clip after the other, and with worker "
    "processes that plan and encode while one process runs the tower. Seconds are medians of three, of the last two "
    "one.",
]


def timed(call: Callable[[], object], device: torch.device, rounds: int = 3) -> float:
    """Median seconds by the clock, after a warm-up."""
    taken = []
    for number in range(rounds + 1):
        began = time.perf_counter()
        call()
        synchronize(device)
        taken += [time.perf_counter() - began] if number else []
    return median(taken)


def decode(clip: Path, hardware: bool) -> int:
    """Number of frames of a clip that were decoded to RGB bytes."""
    options = {"hwaccel": HWAccel("cuda", allow_software_fallback=False)} if hardware else {}
    with av.open(str(clip), **options) as container:
        return sum(1 for frame in container.decode(video=0) if frame.to_ndarray(format="rgb24") is not None)


def frames_of(clip: Path) -> Tensor:
    """The first frames of a clip: uint8 [T, 3, H, W]."""
    found = []
    with av.open(str(clip)) as container:
        for frame in container.decode(video=0):
            found.append(torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1))
            if len(found) == FRAMES:
                break
    return torch.stack(found)


def measure_decoding(clip: Path, hardware: bool) -> Values:
    """Raises KeyeError where PyAV has no NVDEC, or cannot use it."""
    if hardware and "cuda" not in hwdevices_available():
        raise KeyeError(f"PyAV was built without NVDEC; it has {', '.join(hwdevices_available()) or 'none'}")
    began = time.perf_counter()
    try:
        count = decode(clip, hardware)
    except (av.FFmpegError, RuntimeError) as error:
        if not hardware:
            raise
        raise KeyeError(f"PyAV cannot decode with NVDEC here: {error}") from error
    took = time.perf_counter() - began
    return {"seconds": took, "rate": count / took}


def measure_scores(name: str, frames: Tensor, device: torch.device) -> Values:
    """Scores of all frames with the first on a device, and on the CPU."""
    measure = get_measure(name)

    def scores(frames: Tensor) -> Tensor:
        features = measure.prepare(frames)
        return measure.compare(features[0], features)

    moved, expected = frames.to(device), scores(frames)
    begin_peak(device)
    found = scores(moved).cpu()
    took = timed(lambda: scores(moved), device)
    return {"seconds": took, "rate": len(frames) / took, "peak": peak_gb(device)} | compared(found, expected, device)


def compared(found: Tensor, expected: Tensor, device: torch.device) -> Values:
    """Whether a device's result is the CPU's, and the largest difference; on a CPU nothing is compared."""
    if device.type == "cpu":
        return {}
    apart = float((found.double() - expected.double()).abs().max())
    return {"equal": bool(torch.equal(found, expected)), "apart": apart}


def measure_patches(frames: Tensor, size: tuple[int, int], device: torch.device) -> Values:
    """Frames resized to `size` and cut into patches on a device, and on the CPU."""

    def cut(frames: Tensor) -> Tensor:
        return patches(resize(frames, size, "bicubic"), 14)

    moved, expected = frames.to(device), cut(frames)
    begin_peak(device)
    found = cut(moved).cpu()
    took = timed(lambda: cut(moved), device)
    return {"seconds": took, "rate": len(frames) / took, "peak": peak_gb(device)} | compared(found, expected, device)


class Tower:
    """Tower and projector of the 8B model with random weights."""

    def __init__(self, journal: Journal) -> None:
        small = journal.small
        config = KeyeConfig.preset("tiny", vocab_size=300) if small else KeyeConfig.preset("keye_8b")
        config.text_config.num_hidden_layers = 1
        config.text_config.layer_types = config.text_config.layer_types[:1]
        torch.manual_seed(0)
        with torch.device(journal.device):
            model = KeyeForConditionalGeneration(config)
        self.model, self.device = model.to(torch.float32 if small else torch.bfloat16).eval(), journal.device

    @torch.inference_mode()
    def __call__(self, pixels: Tensor, grid: Tensor) -> Tensor:
        """Bytes [N, 3, 14, 14] and grid [T, 3] → tokens [N / 4, hidden]."""
        return self.model.encode_vision(pixels.to(self.device), grid.to(self.device))


def measure_tower(clip: Path, encoder: SlowFastEncoder, tower: Tower) -> Values:
    """Tower and projector over the plan of a clip."""
    video = encoder(clip, dtype=torch.uint8)
    begin_peak(tower.device)
    took = timed(lambda: tower(video.pixel_values, video.grid_thw), tower.device)
    return {
        "seconds": took, "rate": len(video.plan) / took, "tokens": video.plan.tokens, "peak": peak_gb(tower.device)
    }  # fmt: skip


def measure_all(sources: Sequence[Path], encoder: SlowFastEncoder, tower: Tower, workers: int) -> Values:
    """Clips a second from the file to the features.

    workers: processes that plan and encode; 0: this one.
    """
    began, tokens = time.perf_counter(), 0
    begin_peak(tower.device)
    for done in iter_many(encoder, sources, workers=workers, pixels=True, dtype=torch.uint8):
        if done.failure is not None:
            raise KeyeError(f"{done.failure.source} was not encoded: {done.failure.reason}")
        tokens += len(tower(done.result.pixel_values, done.result.grid_thw))
    synchronize(tower.device)
    took = time.perf_counter() - began
    return {"seconds": took, "rate": len(sources) / took, "tokens": tokens, "peak": peak_gb(tower.device)}


def table_of(journal: Journal) -> Table:
    rows = []
    for key, found in journal.found.items():
        what, _, which = key.partition(": ")
        equal = "–"
        if "equal" in found:
            equal = "yes" if found["equal"] else f"off by {found['apart']:.2g}"
        rows.append((what, which, f"{found['seconds']:.4f}", f"{found['rate']:.1f}", equal, cell(found.get("peak"))))
    return Table("Work of the encoder", COLUMNS, rows)


def claims_of(journal: Journal) -> list[Claim]:
    compared = {key: row for key, row in journal.found.items() if "equal" in row}
    claims = []
    for what in ("scores", "patches"):
        rows = {key: row for key, row in compared.items() if key.startswith(what)}
        if rows:
            worst = max(row["apart"] for row in rows.values())
            claim = f"{what} on the GPU against those on the CPU, largest difference of {len(rows)} cases"
            claims.append(Claim(claim, "0", f"{worst:g}", met=worst == 0))
    for key, row in journal.found.items():
        if key.startswith("all"):
            claims.append(Claim(f"clips a minute from the file to the features, {key}", "–", f"{row['rate'] * 60:.0f}"))
    return claims


def main() -> int:
    args = parser(__doc__, PART).parse_args()
    journal = Journal.open(args, PART)
    journal.tables = lambda: [table_of(journal)]
    small, device = journal.small, journal.device
    found = fetch_clips()[-1:] if small else fetch_clips()
    settings = {"max_tokens": 64, "min_tokens_per_frame": 4, "max_tokens_per_frame": 16} if small else {}
    encoder = SlowFastEncoder(**settings)
    for clip in found:
        journal.row(f"decoding: {clip.name}", lambda clip=clip: measure_decoding(clip, False))
        journal.row(f"decoding with NVDEC: {clip.name}", lambda clip=clip: measure_decoding(clip, True))
        frames = frames_of(clip)
        for name in MEASURES:
            journal.row(
                f"scores: {name}, {clip.name}", lambda name=name, frames=frames: measure_scores(name, frames, device)
            )
        size = encoder.plan(clip).slow_size
        journal.row(
            f"patches: {clip.name}", lambda frames=frames, size=size: measure_patches(frames, size, device)
        )  # fmt: skip
    tower = Tower(journal)
    for clip in found:
        journal.row(f"tower and projector: {clip.name}", lambda clip=clip: measure_tower(clip, encoder, tower))
    many = found * (1 if small else COPIES)
    for workers in (0, 1 if small else min(16, os.cpu_count() or 1)):
        journal.row(
            f"all: {len(many)} clips, {workers} workers",
            lambda workers=workers: measure_all(many, encoder, tower, workers),
        )
    journal.save(claims_of(journal), NOTES)
    return 0


if __name__ == "__main__":
    run(main)
