"""Sweep the similarity threshold: what a video costs, what share is slow, what detail is kept, what it is worth.

The report gives a threshold and no ablation of it; this is the ablation.
"""

import csv
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from skimage.metrics import structural_similarity

from keye.encoder import SlowFastEncoder
from keye.slowfast.similarity import resize


@dataclass(frozen=True)
class AblationRow:
    """One threshold; means over the clips, NaN for what was not measured.

    Attributes:
        threshold: a frame less similar than this to the latest slow frame is slow.
        tokens: visual tokens a clip.
        tokens_share: tokens as a share of what the clip costs with every frame slow.
        slow_share: share of the frames that are slow.
        detail: structural similarity (in [0, 1], luma) between the frames as the model sees them, enlarged again, and
            the same frames with every one slow.
        accuracy, accuracy_stderr: of the trained model on the held-out questions, with this threshold at inference.
        questions: how many were asked.
    """

    threshold: float
    tokens: float
    tokens_share: float
    slow_share: float
    detail: float
    accuracy: float = math.nan
    accuracy_stderr: float = math.nan
    questions: int = 0


def sweep(
    clips: Sequence[str | Path],
    thresholds: Sequence[float],
    settings: dict | None = None,
    accuracy: Callable[[float], tuple[float, float, int]] | None = None,
    progress: Callable[[str], None] = print,
) -> tuple[list[AblationRow], list[dict]]:
    """Encode every clip at every threshold.

    Args:
        settings: further arguments of `SlowFastEncoder`.
        accuracy: threshold → (accuracy, standard error, questions) of a model.
        progress: called with a line for every threshold.

    Returns:
        One row per threshold, and one dict per clip and threshold.
    """
    settings = {key: value for key, value in (settings or {}).items() if key not in ("threshold", "policy")}
    references = {str(clip): SlowFastEncoder(**settings, policy="all_slow")(clip) for clip in clips}
    pictures = {clip: encoded.pictures() for clip, encoded in references.items()}
    seen: dict[tuple, float] = {}
    rows, details = [], []
    for threshold in thresholds:
        encoder = SlowFastEncoder(**settings, threshold=threshold)
        here = []
        for clip, reference in references.items():
            encoded = encoder(clip)
            plan = encoded.plan
            scores = []
            for i, picture in enumerate(encoded.pictures()):
                # A frame at a size it was already seen at need not be compared again.
                key = (clip, i, tuple(picture.shape))
                if key not in seen:
                    seen[key] = detail(picture, pictures[clip][i])
                scores.append(seen[key])
            here.append(
                {
                    "clip": Path(clip).name,
                    "threshold": threshold,
                    "frames": len(plan),
                    "tokens": plan.tokens,
                    "tokens_share": plan.tokens / reference.plan.tokens,
                    "slow_share": plan.slow_share,
                    "detail": float(np.mean(scores)),
                }
            )
        details += here
        means = {k: float(np.mean([c[k] for c in here])) for k in ("tokens", "tokens_share", "slow_share", "detail")}
        rows.append(AblationRow(threshold, **means, **_accuracy(accuracy, threshold)))
        progress(line(rows[-1]))
    return rows, details


def detail(picture: torch.Tensor, reference: torch.Tensor) -> float:
    """Structural similarity with `reference` uint8 [3, H, W] of `picture` uint8 [3, h, w], enlarged to its size."""
    if picture.shape != reference.shape:
        picture = resize(picture[None], tuple(reference.shape[1:]), "bicubic")[0]
    luma = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    one, two = ((p.float() * luma).sum(0).numpy() for p in (picture, reference))
    return float(structural_similarity(one, two, data_range=255.0))


def line(row: AblationRow) -> str:
    """A row as one line of text."""
    said = f"threshold {row.threshold:.2f}: {row.tokens:8.0f} tokens a clip ({row.tokens_share:4.0%} of all-slow), "
    said += f"{row.slow_share:4.0%} slow, detail {row.detail:.3f}"
    return said if math.isnan(row.accuracy) else f"{said}, accuracy {row.accuracy:.1%} ± {row.accuracy_stderr:.1%}"


def save(out: str | Path, rows: Sequence[AblationRow], details: Sequence[dict], settings: dict) -> None:
    """Write `ablation.csv` (a line per clip and threshold), `ablation.json` (rows, settings) and `ablation.png`."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with (out / "ablation.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(details[0]))
        writer.writeheader()
        writer.writerows(details)
    plain = [{k: None if isinstance(v, float) and math.isnan(v) else v for k, v in asdict(row).items()} for row in rows]
    report = {"settings": settings, "rows": plain, "clips": list(details)}
    (out / "ablation.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    draw(out / "ablation.png", rows, details)


def draw(path: Path, rows: Sequence[AblationRow], details: Sequence[dict]) -> None:
    """Curves over the threshold: tokens, slow share and detail (a thin line a clip, a thick one the mean), accuracy."""
    from matplotlib.figure import Figure

    x = [row.threshold for row in rows]
    panels = [
        ("tokens_share", "tokens, share of all-slow"),
        ("slow_share", "share of slow frames"),
        ("detail", "detail"),
    ]
    if not all(math.isnan(row.accuracy) for row in rows):
        panels.append(("accuracy", "accuracy of the trained model"))
    figure = Figure(figsize=(4 * len(panels), 3.4), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        if key == "accuracy":
            spread = [row.accuracy_stderr for row in rows]
            axes.errorbar(x, [row.accuracy for row in rows], yerr=spread, color="#1d6fb8", marker="o", capsize=2)
        else:
            for clip in dict.fromkeys(entry["clip"] for entry in details):
                y = [entry[key] for entry in details if entry["clip"] == clip]
                axes.plot(x, y, linewidth=1, alpha=0.6, label=clip)
            axes.plot(x, [getattr(row, key) for row in rows], color="#1d6fb8", linewidth=2.4, label="mean")
        axes.set(title=title, xlabel="threshold")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=140)


def _accuracy(measure: Callable[[float], tuple[float, float, int]] | None, threshold: float) -> dict:
    names = [field.name for field in fields(AblationRow)][-3:]
    return dict(zip(names, measure(threshold), strict=True)) if measure else {}
