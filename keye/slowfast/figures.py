"""Pictures of a plan: a filmstrip on a true time axis, the slow and the fast lane, the similarity curve."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from keye.errors import VideoError
from keye.slowfast.budget import size_tokens
from keye.slowfast.pathways import FAST, SLOW
from keye.slowfast.video import read_frames_at

if TYPE_CHECKING:
    from keye.slowfast.plan import VideoPlan

SLOW_COLOUR, FAST_COLOUR, INK, QUIET = "#d9480f", "#1c7ed6", "#212529", "#868e96"
_CONNECTOR = 0.26  # inches between the filmstrip and the lanes
_WIDTH, _MARGIN = 13.0, (0.065, 0.985)  # inches, and the shares of it between which the time axis runs


def draw_plan(
    plan: "VideoPlan", path: str | os.PathLike, frames: Sequence[torch.Tensor] | torch.Tensor | None = None
) -> None:
    """Draw `plan` into `path` (PNG, PDF or SVG by its suffix); see `VideoPlan.plot`."""
    # The object interface only: pyplot would choose a screen backend and keep every figure alive.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if frames is not None and len(frames) != len(plan):
        raise VideoError(
            f"the plan of {plan.source} has {len(plan)} frames but {len(frames)} pictures; give one for each"
        )
    end = _end(plan)
    pictures = _strip_pictures(plan, frames, end)
    heights = ([_strip_height(plan, pictures)] if pictures else []) + [0.9, 1.75]
    figure = Figure(figsize=(_WIDTH, sum(heights) + 1.45), dpi=120, facecolor="white")
    FigureCanvasAgg(figure)
    total = figure.get_figheight()
    axes, top = [], total - 0.62
    for height in heights:
        axes.append(figure.add_axes((_MARGIN[0], (top - height) / total, _MARGIN[1] - _MARGIN[0], height / total)))
        top -= height + (0.0 if pictures and len(axes) == 1 else 0.12)
    for axis in axes:
        axis.set_xlim(0, end)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(colors=QUIET, labelsize=8)
        axis.spines[["left", "bottom"]].set_color("#ced4da")
    for axis in axes[:-1]:
        axis.tick_params(labelbottom=False, bottom=False)
    _title(figure, plan, total)
    if pictures:
        _draw_strip(axes[0], plan, pictures, end, heights[0])
    _draw_lanes(axes[-2], plan, end)
    _draw_similarity(axes[-1], plan)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise VideoError(
            f"the figure cannot be written to {path} ({error}); give a .png in a folder that exists"
        ) from error


def _end(plan: "VideoPlan") -> float:
    """Right end of the time axis: the clip's end, or one frame interval past the last frame."""
    times = plan.timestamps
    interval = float(times[-1] - times[-2]) if len(plan) > 1 else 1.0 / plan.settings.get("fps", 1.0)
    last = float(times[-1])
    return plan.duration if plan.duration > last else last + interval


def _title(figure: object, plan: "VideoPlan", total: float) -> None:
    slow = int((plan.frame_types == SLOW).sum())
    height, width = plan.source_size
    left, saved = _MARGIN[0], 1 - plan.tokens / (len(plan) * size_tokens(plan.slow_size))
    figure.text(left, 1 - 0.2 / total, Path(plan.source).name, fontsize=13, weight="bold", color=INK, va="center")
    says = (
        f"{width}×{height}, {plan.duration:.1f} s   ·   {slow} slow + {len(plan) - slow} fast frames   ·   "
        f"{plan.tokens:,} of {plan.max_tokens:,} tokens, {saved:.0%} fewer than all slow"
    )
    figure.text(left, 1 - 0.43 / total, says, fontsize=9, color=QUIET, va="center")


def _strip_pictures(
    plan: "VideoPlan", frames: Sequence[torch.Tensor] | torch.Tensor | None, end: float
) -> dict[int, np.ndarray]:
    """Pictures [h, w, 3] uint8 of at most 10 frames (16 upright ones) along the time; empty without a source."""
    places = 10 if plan.source_size[1] >= plan.source_size[0] else 16
    times = plan.timestamps.double().numpy()
    if len(plan) <= places:
        chosen = list(range(len(plan)))
    else:
        chosen = sorted({_speaking_frame(plan, times, *span) for span in _spans(end, places)})
    if frames is not None:
        return {index: frames[index].permute(1, 2, 0).numpy() for index in chosen}
    if not Path(plan.source).is_file():
        return {}
    found = read_frames_at(plan.source, [float(times[index]) for index in chosen])
    return {index: frame.pixels.permute(1, 2, 0).numpy() for index, frame in zip(chosen, found, strict=False)}


def _spans(end: float, places: int) -> list[tuple[float, float]]:
    return [(place * end / places, (place + 1) * end / places) for place in range(places)]


def _speaking_frame(plan: "VideoPlan", times: np.ndarray, start: float, stop: float) -> int:
    """The frame that stands for a span of time: its first slow one, else the one on the screen in its middle."""
    slow = np.flatnonzero((plan.frame_types.numpy() == SLOW) & (times >= start) & (times < stop))
    return int(slow[0]) if len(slow) else max(0, int(np.searchsorted(times, (start + stop) / 2, side="right")) - 1)


def _strip_height(plan: "VideoPlan", pictures: dict[int, np.ndarray]) -> float:
    """Inches that the pictures need side by side over the whole width, connectors included."""
    tile = _WIDTH * (_MARGIN[1] - _MARGIN[0]) / len(pictures)
    return min(max(tile * plan.source_size[0] / plan.source_size[1], 0.3), 1.5) + _CONNECTOR


def _draw_strip(axis: object, plan: "VideoPlan", pictures: dict[int, np.ndarray], end: float, height: float) -> None:
    """Pictures side by side, each tied by a line to its own time in the lanes below."""
    unit = end / (_WIDTH * (_MARGIN[1] - _MARGIN[0]))  # seconds per inch
    tile = end / len(pictures)
    span = min(tile - 0.06 * unit, (height - _CONNECTOR) * plan.source_size[1] / plan.source_size[0] * unit)
    bottom = _CONNECTOR / height
    nexts = [*plan.timestamps.tolist()[1:], end]
    axis.set_axis_off()
    for place, (index, picture) in enumerate(pictures.items()):
        centre = (place + 0.5) * tile
        step = max(1, picture.shape[0] // 240)
        box = (centre - span / 2, centre + span / 2, bottom, 1)
        axis.imshow(picture[::step, ::step], extent=box, aspect="auto", interpolation="antialiased")
        colour = SLOW_COLOUR if plan.frame_types[index] == SLOW else FAST_COLOUR
        axis.plot(box[:2], [bottom, bottom], color=colour, linewidth=3, solid_capstyle="butt")
        middle = (float(plan.timestamps[index]) + nexts[index]) / 2
        axis.plot([centre, middle], [bottom, 0], color=colour, linewidth=0.9, alpha=0.8)
    axis.set_xlim(0, end)
    axis.set_ylim(0, 1)


def _draw_lanes(axis: object, plan: "VideoPlan", end: float) -> None:
    """A block per frame from its time to the next one's, as high as the tokens it costs."""
    times = plan.timestamps.double().numpy()
    spans = np.diff(np.append(times, end))
    tokens = plan.tokens_per_frame.numpy()
    edge = 0.6 if len(plan) <= 200 else 0.0
    for kind, colour in ((SLOW, SLOW_COLOUR), (FAST, FAST_COLOUR)):
        mask = plan.frame_types.numpy() == kind
        axis.bar(
            times[mask],
            tokens[mask],
            spans[mask],
            align="edge",
            color=colour,
            edgecolor="white",
            linewidth=edge,
            zorder=2,
        )
    axis.set_ylim(0, max(size_tokens(plan.slow_size), 1) * 1.05)
    axis.set_yticks(sorted({size_tokens(plan.slow_size), size_tokens(plan.fast_size)}))
    axis.set_ylabel("tokens\nper frame", fontsize=8, color=QUIET)
    axis.grid(axis="y", color="#f1f3f5", zorder=0)
    axis.set_axisbelow(True)


def _draw_similarity(axis: object, plan: "VideoPlan") -> None:
    times, scores = plan.timestamps.numpy(), plan.similarity.numpy()
    slow = plan.frame_types.numpy() == SLOW
    threshold, policy = plan.settings.get("threshold"), plan.settings.get("policy", "adaptive")
    axis.plot(times, scores, color="#adb5bd", linewidth=1, zorder=2)
    size = 26 if len(plan) <= 200 else 8
    first = np.where(np.isnan(scores), 1.0, scores)
    axis.scatter(times[~slow], scores[~slow], s=size, color=FAST_COLOUR, label="fast", zorder=3, clip_on=False)
    axis.scatter(times[slow], first[slow], s=size, color=SLOW_COLOUR, label="slow", zorder=3, clip_on=False)
    if threshold is not None and policy == "adaptive":
        axis.axhline(
            threshold, color=INK, linewidth=0.9, linestyle=(0, (5, 3)), label=f"threshold {threshold:g}", zorder=1
        )
    finite = scores[~np.isnan(scores)]
    low = min([*finite.tolist(), threshold if policy == "adaptive" and threshold is not None else 1.0, 0.95])
    axis.set_ylim(max(0.0, low - 0.06 * (1.0 - low) - 0.01), 1.0 + 0.02 * (1.0 - low))
    axis.set_ylabel(
        f"similarity with the\nlatest slow frame\n({plan.settings.get('measure', 'measure')})", fontsize=8, color=QUIET
    )
    axis.set_xlabel("seconds", fontsize=8, color=QUIET)
    axis.grid(color="#f1f3f5", zorder=0)
    axis.legend(
        loc="upper right",
        bbox_to_anchor=(1.0, -0.12),
        ncols=3,
        frameon=False,
        fontsize=8,
        labelcolor=INK,
        borderaxespad=0,
    )
