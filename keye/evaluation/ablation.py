"""Sweep the similarity threshold: tokens of a video, share of slow frames, detail that is kept, accuracy of a model.

The report gives a threshold but no ablation of it. A sweep writes every result as soon as it is measured, and an
interrupted sweep resumes where it stopped if the settings are the same.
"""

import csv
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from keye.encoder import SlowFastEncoder
from keye.errors import KeyeError
from keye.evaluation.report import Report
from keye.files import write_atomically
from keye.slowfast.budget import SIDE, fit_size
from keye.slowfast.clip_walk import reads_packets
from keye.slowfast.frame_buffer import FULL_SIZE_BYTES
from keye.slowfast.resizing import resize
from keye.video.clip import open_clip
from keye.visualize.figures import save_figure

REFERENCE_TOKENS = 768
"""Original frames of more tokens (28 × 28 pixels each) are compared at this size, to bound memory."""
LOSSLESS = 60.0
"""Largest PSNR in decibels: it is infinite for a frame that the model sees unchanged."""
CSV, STATE, ANSWERS = "ablation.csv", "state.json", "accuracy.jsonl"
MEANS = ("tokens", "tokens_share", "slow_share", "psnr", "ssim")


@dataclass(frozen=True)
class AblationRow:
    """Results at one threshold: means over the clips, NaN for what was not measured.

    Attributes:
        threshold: a frame less similar than this to the latest slow frame is slow.
        tokens: visual tokens per clip.
        tokens_share: tokens as a share of the tokens of the clip with every frame slow.
        slow_share: share of the frames that are slow.
        psnr: PSNR in decibels, at most 60, between the enlarged frames of the model and the original frames; RGB.
        ssim: structural similarity of the same frames, at most 1; luma.
        accuracy: share of the held-out questions that the trained model answers correctly at this threshold.
        accuracy_stderr: its standard error.
        questions: number of questions.
        families: family of questions → n, accuracy, stderr, chance, majority.
        controls: control → accuracy on the questions to which it applies (`keye.evaluation.CONTROLS`).
    """

    threshold: float
    tokens: float
    tokens_share: float
    slow_share: float
    psnr: float
    ssim: float
    accuracy: float = math.nan
    accuracy_stderr: float = math.nan
    questions: int = 0
    families: dict[str, dict[str, float]] = field(default_factory=dict)
    controls: dict[str, float] = field(default_factory=dict)


def sweep(
    clips: Sequence[str | Path],
    thresholds: Sequence[float],
    settings: dict | None = None,
    accuracy: Callable[..., Report] | None = None,
    out: str | Path | None = None,
    asked: dict | None = None,
    progress: bool = True,
    controls: Sequence[str] = (),
) -> tuple[list[AblationRow], list[dict]]:
    """Encode every clip at every threshold, and ask a model its questions at every threshold.

    Args:
        clips: paths of the clips.
        thresholds: similarity thresholds, 0 to 1.
        settings: further arguments of `SlowFastEncoder`; `threshold` and `policy` are ignored.
        accuracy: threshold → report of a model's answers; with a control as its second argument, under that control.
        out: directory for partial results; results of the same settings that are there are not measured again.
        asked: JSON values that identify the model and the questions of `accuracy`; answers in `out` are reused only if
            these values are the same.
        progress: show a bar, or lines if the output is not a terminal.
        controls: names in `keye.evaluation.CONTROLS`, measured at every threshold as well.

    Returns:
        One row per threshold, and one dict per clip and threshold.

    Raises:
        VideoError: a clip cannot be read.
    """
    settings = {key: value for key, value in (settings or {}).items() if key not in ("threshold", "policy")}
    encoder = {**SlowFastEncoder(**settings).settings, "threshold": None, "reference_tokens": REFERENCE_TOKENS}
    store = Store(out, encoder, asked)
    with _progress(progress) as show:
        for done, clip in enumerate(clips):
            missing = [t for t in thresholds if store.key(clip, t) not in store.clips]
            for entry in measure_clip(clip, missing, settings) if missing else ():
                store.add_clip(clip, entry)
            show("clips", done + 1, len(clips), Path(clip).name)
        for done, threshold in enumerate(thresholds if accuracy else ()):
            if threshold not in store.answers:
                missing_input = {control: accuracy(threshold, control) for control in controls}
                store.add_answers(threshold, accuracy(threshold), missing_input)
            score = store.answers[threshold]["accuracy"]
            show("questions", done + 1, len(thresholds), f"threshold {threshold:g}: accuracy {score:.1%}")
    details = [store.clips[store.key(clip, threshold)] for threshold in thresholds for clip in clips]
    rows = []
    for threshold in thresholds:
        here = [entry for entry in details if entry["threshold"] == threshold]
        means = {key: float(np.mean([entry[key] for entry in here])) for key in MEANS}
        rows.append(AblationRow(threshold, **means, **(store.answers.get(threshold, {}) if accuracy else {})))
    return rows, details


def measure_clip(clip: str | Path, thresholds: Sequence[float], settings: dict) -> Iterator[dict]:
    """One dict per threshold: tokens of the clip and detail that is kept of its frames."""
    base = SlowFastEncoder(**settings, policy="all_slow")
    if base.aggregation not in (None, "none"):
        raise KeyeError(
            f"aggregation={base.aggregation!r} pools features, and the detail of pictures does not measure that; "
            "omit --aggregation"
        )
    originals, source, times = sampled(clip, base)
    clock = {} if times is None else {"timestamps": times}
    all_slow = base.plan(source, **clock).tokens
    settings = {**settings, "max_frames": base.most_frames}  # the same frames are sampled at every threshold
    seen: dict[tuple, tuple[float, float]] = {}
    for threshold in thresholds:
        encoded = SlowFastEncoder(**settings, threshold=threshold)(source, **clock)
        scores = []
        for i, picture in zip(encoded.plan.frame_indices.tolist(), encoded.pictures(), strict=True):
            # The detail of a frame depends on its size only.
            key = (i, tuple(picture.shape))
            if key not in seen:
                seen[key] = detail(picture, originals[i])
            scores.append(seen[key])
        psnr, ssim = np.mean(scores, axis=0)
        yield {
            "clip": Path(clip).name,
            "threshold": threshold,
            "frames": len(encoded.plan),
            "tokens": encoded.plan.tokens,
            "tokens_share": encoded.plan.tokens / all_slow,
            "slow_share": encoded.plan.slow_share,
            "psnr": float(psnr),
            "ssim": float(ssim),
        }


def sampled(
    clip: str | Path, encoder: SlowFastEncoder
) -> tuple[dict[int, torch.Tensor], str | Path | torch.Tensor, list[float] | None]:
    """The frames that `encoder` samples by their index in a plan, uint8 [3, H, W] at their source size, or at
    `REFERENCE_TOKENS` if larger.

    Also returns what to encode at every threshold: the frames [T, 3, H, W] and their times if they fit into memory, so
    that the clip is decoded once; otherwise, and for a measure that reads packets, the path of the clip and None.
    """
    with open_clip(clip, encoder.fps, encoder.most_frames) as opened:
        height, width = opened.size
        large = height * width > REFERENCE_TOKENS * SIDE * SIDE
        size = fit_size(height, width, 1, REFERENCE_TOKENS) if large else opened.size
        in_memory = not reads_packets(encoder.measure) and 3 * height * width * opened.expected <= FULL_SIZE_BYTES
        originals, frames, times = {}, [], []
        for frame in opened:
            index = len(frames) if in_memory else frame.index
            originals[index] = resize(frame.pixels[None], size, "bicubic")[0]
            if in_memory:
                frames.append(frame.pixels)
                times.append(frame.time)
    return originals, torch.stack(frames) if in_memory else clip, times if in_memory else None


def detail(picture: torch.Tensor, original: torch.Tensor) -> tuple[float, float]:
    """(PSNR in dB of RGB, SSIM of luma) of `picture` uint8 [3, h, w], at the size of `original` uint8 [3, H, W]."""
    shown = resize(picture[None], tuple(original.shape[1:]), "bicubic")[0]
    if torch.equal(shown, original):
        return LOSSLESS, 1.0
    psnr = peak_signal_noise_ratio(original.numpy(), shown.numpy(), data_range=255)
    luma = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    one, two = ((p.float() * luma).sum(0).numpy() for p in (original, shown))
    return min(float(psnr), LOSSLESS), float(structural_similarity(one, two, data_range=255.0))


class Store:
    """Results of a sweep, in memory and in the directory `out`, so that an interrupted sweep can resume.

    `ablation.csv` has a line per clip and threshold, `accuracy.jsonl` a line per threshold, and `state.json` the
    settings of both. An incomplete last line, which a killed process leaves, is dropped.
    """

    def __init__(self, out: str | Path | None, encoder: dict, asked: dict | None) -> None:
        self.out = None if out is None else Path(out)
        self.clips: dict[tuple, dict] = {}
        self.answers: dict[float, dict] = {}
        if self.out is None:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        state = json.loads(json.dumps({"encoder": encoder, "asked": asked}))
        before = _read_state(self.out / STATE)
        if before.get("encoder") == state["encoder"]:
            found = {(e.pop("path"), e.pop("bytes"), e["threshold"]): e for e in _read_csv(self.out / CSV)}
            # A clip of another size has changed.
            self.clips = {key: entry for key, entry in found.items() if key == self.key(key[0], key[2])}
        if before == state:
            self.answers = _read_answers(self.out / ANSWERS)
        (self.out / CSV).unlink(missing_ok=True)
        (self.out / ANSWERS).unlink(missing_ok=True)
        write_atomically(self.out / STATE, json.dumps(state, indent=1) + "\n")
        for (path, size, _), entry in self.clips.items():
            self._append_clip(path, size, entry)
        for threshold, answers in self.answers.items():
            self._append_answers(threshold, answers)

    @staticmethod
    def key(clip: str | Path, threshold: float) -> tuple[str, int, float]:
        """The key of a line of the table: the path and size in bytes of the clip, and the threshold."""
        path = Path(clip).absolute()
        return str(path), path.stat().st_size if path.is_file() else 0, threshold

    def add_clip(self, clip: str | Path, entry: dict) -> None:
        """Store the result of one clip at one threshold."""
        path, size, threshold = self.key(clip, entry["threshold"])
        self.clips[path, size, threshold] = entry
        if self.out is not None:
            self._append_clip(path, size, entry)

    def add_answers(self, threshold: float, report: Report, controls: Mapping[str, Report]) -> None:
        """Store the scores of a model's answers at one threshold, and of its answers under controls."""
        overall, families = report.overall, {name: asdict(score) for name, score in report.families.items()}
        scores = {"accuracy": overall.accuracy, "accuracy_stderr": overall.stderr, "questions": overall.n}
        means = {name: control.overall.accuracy for name, control in controls.items()}
        self.answers[threshold] = {**scores, "families": families, "controls": means}
        if self.out is not None:
            self._append_answers(threshold, self.answers[threshold])

    def _append_clip(self, path: str, size: int, entry: dict) -> None:
        line = {**entry, "path": path, "bytes": size}
        new = not (self.out / CSV).exists()
        with (self.out / CSV).open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(line))
            if new:
                writer.writeheader()
            writer.writerow(line)

    def _append_answers(self, threshold: float, answers: dict) -> None:
        with (self.out / ANSWERS).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"threshold": threshold, **answers}) + "\n")


def line(row: AblationRow) -> str:
    """A row as one line of text."""
    text = f"threshold {row.threshold:.2f}: {row.tokens:8.0f} tokens a clip ({row.tokens_share:4.0%} of all-slow), "
    text += f"{row.slow_share:4.0%} slow, detail {row.psnr:.1f} dB, SSIM {row.ssim:.3f}"
    if not math.isnan(row.accuracy):
        text += f", accuracy {row.accuracy:.1%} ± {row.accuracy_stderr:.1%}"
    return text + "".join(f", {name} {share:.1%}" for name, share in row.controls.items())


def save(out: str | Path, rows: Sequence[AblationRow], details: Sequence[dict], settings: dict) -> None:
    """Write `ablation.json` (rows, clips, settings) and `ablation.png`, and a missing `ablation.csv`."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    if not (out / CSV).exists():
        with (out / CSV).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(details[0]))
            writer.writeheader()
            writer.writerows(details)
    plain = [{k: None if isinstance(v, float) and math.isnan(v) else v for k, v in asdict(row).items()} for row in rows]
    report = {"settings": settings, "rows": plain, "clips": list(details)}
    write_atomically(out / "ablation.json", json.dumps(report, indent=1, allow_nan=False) + "\n")
    draw(out / "ablation.png", rows, details)


def draw(path: Path, rows: Sequence[AblationRow], details: Sequence[dict]) -> None:
    """Plot curves over the threshold: thin lines for clips and families of questions, thick lines for their means."""
    from matplotlib.figure import Figure

    panels = {
        "tokens_share": "tokens, share of all-slow",
        "slow_share": "share of slow frames",
        "psnr": "detail: PSNR with the original, dB",
        "ssim": "detail: SSIM with the original",
    }
    if not all(math.isnan(row.accuracy) for row in rows):
        panels["accuracy"] = "accuracy of the trained model"
    x = [row.threshold for row in rows]
    figure = Figure(figsize=(4 * len(panels), 3.4), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        if key == "accuracy":
            for family in dict.fromkeys(name for row in rows for name in row.families):
                y = [row.families.get(family, {}).get("accuracy", math.nan) for row in rows]
                axes.plot(x, y, linewidth=1, alpha=0.6, label=family)
            spread = [row.accuracy_stderr for row in rows]
            thick = {"color": "#1d6fb8", "marker": "o", "capsize": 2, "linewidth": 2.4, "label": "all"}
            axes.errorbar(x, [row.accuracy for row in rows], yerr=spread, **thick)
        else:
            for clip in dict.fromkeys(entry["clip"] for entry in details):
                points = [(entry["threshold"], entry[key]) for entry in details if entry["clip"] == clip]
                axes.plot(*zip(*points, strict=True), linewidth=1, alpha=0.6, label=clip)
            axes.plot(x, [getattr(row, key) for row in rows], color="#1d6fb8", linewidth=2.4, label="mean")
        axes.set(title=title, xlabel="threshold")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=8)
    if "accuracy" in panels:
        figure.axes[-1].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    save_figure(figure, path, dpi=140)


@contextmanager
def _progress(enabled: bool) -> Iterator[Callable[[str, int, int, str], None]]:
    """A function of (task, done, total, latest result) that updates a bar with the time left, or prints a line."""
    live = enabled and sys.stdout.isatty()
    began: dict[str, float] = {}
    columns = (TextColumn("{task.description:9}"), BarColumn(), MofNCompleteColumn(), TextColumn("left"))
    with Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[latest]}"), disable=not live) as bar:
        tasks: dict[str, Any] = {}
        last = time.monotonic()

        def show(what: str, done: int, total: int, latest: str) -> None:
            nonlocal last
            if what not in tasks:
                tasks[what], began[what] = bar.add_task(what, total=total, latest=""), last
            last = time.monotonic()
            bar.update(tasks[what], completed=done, latest=latest)
            if enabled and not live:
                left = (last - began[what]) / done * (total - done)
                print(f"{what} {done}/{total}  {latest}" + (f", about {left:.0f} s left" if left else ""), flush=True)

        yield show


def _read_state(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _read_csv(path: Path) -> list[dict]:
    kinds = {"clip": str, "path": str, "frames": int, "tokens": int, "bytes": int}
    entries = []
    if path.is_file():
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                try:
                    entry = {key: kinds.get(key, float)(value) for key, value in row.items()}
                except (TypeError, ValueError):
                    continue
                if {"path", "bytes", "threshold", *MEANS} <= entry.keys():
                    entries.append(entry)
    return entries


def _read_answers(path: Path) -> dict[float, dict]:
    answers = {}
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            entry = json.loads(text)
        except ValueError:
            continue
        answers[entry.pop("threshold")] = entry
    return answers
