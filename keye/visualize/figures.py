"""Figures of a plan: filmstrip, tokens per frame and per second, and similarity, over time."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from keye.errors import KeyeError, VideoError
from keye.slowfast.policies import FAST, SLOW
from keye.video.clip import read_frames_at
from keye.visualize.drawable import Drawable
from keye.visualize.tables import seconds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Pictures = Sequence[torch.Tensor] | torch.Tensor

SLOW_COLOUR, FAST_COLOUR, RATE_COLOUR, INK, QUIET = "#d9480f", "#1c7ed6", "#5f3dc4", "#212529", "#868e96"
_CONNECTOR = 0.26  # inches between the filmstrip and the lanes
_WIDTH, _MARGIN = 13.0, (0.065, 0.985)  # inches, and the fractions of the width where the time axis begins and ends
_TIME_AXIS = _WIDTH * (_MARGIN[1] - _MARGIN[0])  # inches
_MANY = 200  # with more frames, edges are left out and dots are small


def draw_plan(plan: Drawable, path: str | os.PathLike, frames: Pictures | None = None) -> None:
    """Draw `plan` into `path` (PNG, PDF or SVG by its suffix); see `VideoPlan.plot`."""
    # Not pyplot, which would choose a screen backend and keep a reference to every figure.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lanes = TimelineEntries.of(plan)
    pictures = pictures_of(plan, strip_frames(plan, 10 if plan.source_size[1] >= plan.source_size[0] else 16), frames)
    heights = ([_strip_height(plan, pictures)] if pictures else []) + [0.9, 0.6, 1.75]
    figure = Figure(figsize=(_WIDTH, sum(heights) + 1.57), dpi=120, facecolor="white")
    FigureCanvasAgg(figure)
    total = figure.get_figheight()
    axes, top = [], total - 0.62
    for height in heights:
        axes.append(figure.add_axes((_MARGIN[0], (top - height) / total, _MARGIN[1] - _MARGIN[0], height / total)))
        top -= height + (0.0 if pictures and len(axes) == 1 else 0.12)
    for axis in axes:
        axis.set_xlim(*plan.span)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(colors=QUIET, labelsize=8)
        axis.spines[["left", "bottom"]].set_color("#ced4da")
        axis.set_axisbelow(True)
        axis.set_xticks(*zip(*time_ticks(*plan.span), strict=True))
    for axis in axes[:-1]:
        axis.tick_params(labelbottom=False, bottom=False)
        axis.yaxis.set_label_coords(-0.044, 0.5)
    _title(figure, plan, total)
    if pictures:
        _draw_strip(axes[0], plan, lanes, pictures, heights[0])
    _draw_tokens(axes[-3], plan, lanes)
    _draw_rate(axes[-2], plan, lanes)
    _draw_similarity(axes[-1], plan)
    save_figure(figure, path, VideoError)


def save_figure(
    figure: "Figure", path: str | os.PathLike, kind: type[KeyeError] = KeyeError, dpi: float | None = None
) -> None:
    """Write `figure` to `path`, whose suffix gives the format.

    Args:
        kind: class of the error. dpi: pixels per inch; None: the figure's own.

    Raises:
        KeyeError: of `kind`; the file cannot be written, or the format is unknown.
    """
    try:
        figure.savefig(path, dpi=dpi or "figure")
    except (OSError, ValueError) as error:
        raise kind(f"the figure cannot be written to {path} ({error}); give a .png in a folder that exists") from error


@dataclass(frozen=True)
class TimelineEntries:
    """The entries of a plan as blocks over time, float64 [T] each.

    starts, ends: seconds. tokens: heights. bottoms: the tokens of earlier entries of the same time (two_stream), else
    0.
    """

    starts: np.ndarray
    ends: np.ndarray
    tokens: np.ndarray
    bottoms: np.ndarray

    @classmethod
    def of(cls, plan: Drawable) -> "TimelineEntries":
        starts = plan.timestamps.double().numpy()
        tokens = plan.tokens_per_frame.double().numpy()
        below = np.concatenate([[0.0], np.cumsum(tokens)[:-1]])
        first = np.searchsorted(starts, starts)  # the first entry of the same time
        return cls(starts, plan.frame_ends.double().numpy(), tokens, below - below[first])

    @property
    def top(self) -> float:
        """The most tokens at one time."""
        return float((self.bottoms + self.tokens).max())

    def rate(self, bins: int) -> tuple[np.ndarray, np.ndarray]:
        """(edges [bins + 1] in seconds, tokens per second [bins]); each frame's tokens are spread over its time."""
        edges = np.linspace(self.starts[0], self.ends[-1], bins + 1)
        last = np.append(np.diff(self.starts) > 0, True)  # the last entry of each time
        corners = np.append(self.starts[:1], self.ends[last])
        spent = np.append(0.0, np.cumsum(self.tokens)[last])
        widths = np.diff(edges)  # zero where float32 does not separate the times
        return edges, np.diff(np.interp(edges, corners, spent)) / np.maximum(widths, np.finfo(np.float32).tiny)

    def bins(self) -> int:
        """Number of windows, of at least four frames each, so that a single slow frame does not look like a peak."""
        return int(np.clip(len(np.unique(self.starts)) // 4, 1, 100))


def strip_frames(plan: Drawable, places: int) -> list[int]:
    """At most `places` entries whose pictures represent the clip, ascending, each at another time."""
    times = plan.timestamps.double().numpy()
    distinct = np.unique(times, return_index=True)[1]
    if len(distinct) <= places:
        return distinct.tolist()
    edges = np.linspace(*plan.span, places + 1)
    slow = plan.frame_types.numpy() == SLOW
    chosen = set()
    for start, stop in zip(edges, edges[1:], strict=False):
        inside = np.flatnonzero(slow & (times >= start) & (times < stop))
        middle = np.searchsorted(times[distinct], (start + stop) / 2, side="right") - 1
        chosen.add(int(inside[0]) if len(inside) else int(distinct[max(0, middle)]))
    return sorted(chosen)


def pictures_of(plan: Drawable, entries: Sequence[int], frames: Pictures | None) -> dict[int, np.ndarray]:
    """Pictures uint8 [h, w, 3] of `entries`: of `frames`, or read again from the plan's file or folder if it exists."""
    if frames is not None:
        if len(frames) != len(plan):
            raise VideoError(
                f"the plan of {plan.source} has {len(plan)} frames but {len(frames)} pictures; give one for each"
            )
        return {entry: frames[entry].permute(1, 2, 0).numpy() for entry in entries}
    source = Path(plan.source)
    try:
        if not source.exists():
            return {}
    except OSError:  # names of URLs or of bytes may be invalid paths
        return {}
    # A folder has no clock: it is read at one frame a second, so that a picture's index is its time.
    clock = plan.frame_indices.double() if source.is_dir() else plan.timestamps.double()
    found = read_frames_at(plan.source, [float(clock[entry]) for entry in entries])
    return {entry: frame.pixels.permute(1, 2, 0).numpy() for entry, frame in zip(entries, found, strict=False)}


def time_ticks(start: float, end: float, most: int = 7) -> list[tuple[float, str]]:
    """(seconds, text) of about `most` round times or fewer: "2.5 s" below a minute, then "1:30"."""
    steps = [base * 10**power for power in range(-3, 1) for base in (1, 2, 5)] + [10, 15, 30, 60, 120, 300, 600, 1800]
    steps += [3600 * hours for hours in (1, 2, 6, 12, 24, 48, 120, 240, 720)]
    step = next((step for step in steps if (end - start) / step <= most), end - start)
    times = [number * step for number in range(math.ceil(start / step - 1e-6), math.floor(end / step + 1e-6) + 1)]
    return [(time, f"{time:.10g} s" if step < 1 or time < 60 else seconds(time)) for time in times]


def shown_threshold(plan: Drawable) -> float | None:
    """The threshold, where the policy uses it."""
    adaptive = plan.settings.get("policy", "adaptive").startswith("adaptive")
    return plan.settings.get("threshold") if adaptive else None


def _title(figure: object, plan: Drawable, total: float) -> None:
    slow, fast = plan.counts
    height, width = plan.source_size
    left, name = _MARGIN[0], Path(plan.source).name
    name = name if len(name) <= 100 else f"{name[:60]} … {name[-35:]}"
    figure.text(left, 1 - 0.2 / total, name, fontsize=13, weight="bold", color=INK, va="center", parse_math=False)
    text = (
        f"{width}×{height}, {seconds(plan.duration)}   ·   {slow} slow + {fast} fast frames   ·   "
        f"{plan.tokens:,} of {plan.max_tokens:,} tokens"
    )
    if plan.saved >= 0.005:
        text += f", {plan.saved:.0%} fewer than all slow"
    figure.text(left, 1 - 0.43 / total, text, fontsize=9, color=QUIET, va="center")


def _strip_height(plan: Drawable, pictures: dict[int, np.ndarray]) -> float:
    """Height in inches of the pictures side by side over the full width, including connectors."""
    tile = _TIME_AXIS / len(pictures)
    return min(max(tile * plan.source_size[0] / plan.source_size[1], 0.3), 1.5) + _CONNECTOR


def _draw_strip(
    axis: object, plan: Drawable, lanes: TimelineEntries, pictures: dict[int, np.ndarray], height: float
) -> None:
    """Draw pictures side by side, each connected by a line to its time in the axes below."""
    start, end = plan.span
    unit = (end - start) / _TIME_AXIS  # seconds per inch
    tile = (end - start) / len(pictures)
    span = min(tile - 0.06 * unit, (height - _CONNECTOR) * plan.source_size[1] / plan.source_size[0] * unit)
    bottom = _CONNECTOR / height
    axis.set_axis_off()
    for place, (entry, picture) in enumerate(pictures.items()):
        centre = start + (place + 0.5) * tile
        step = max(1, picture.shape[0] // 240)
        box = (centre - span / 2, centre + span / 2, bottom, 1)
        axis.imshow(picture[::step, ::step], extent=box, aspect="auto", interpolation="antialiased")
        colour = SLOW_COLOUR if plan.frame_types[entry] == SLOW else FAST_COLOUR
        axis.plot(box[:2], [bottom, bottom], color=colour, linewidth=3, solid_capstyle="butt")
        middle = (lanes.starts[entry] + lanes.ends[entry]) / 2
        axis.plot([centre, middle], [bottom, 0], color=colour, linewidth=0.9, alpha=0.8)
    axis.set_xlim(start, end)
    axis.set_ylim(0, 1)


def _draw_tokens(axis: object, plan: Drawable, lanes: TimelineEntries) -> None:
    """Draw a block per frame, from its time to the next frame's, as high as its tokens."""
    for kind, colour in ((SLOW, SLOW_COLOUR), (FAST, FAST_COLOUR)):
        mask = plan.frame_types.numpy() == kind
        axis.bar(
            lanes.starts[mask],
            lanes.tokens[mask],
            (lanes.ends - lanes.starts)[mask],
            bottom=lanes.bottoms[mask],
            align="edge",
            color=colour,
            edgecolor="white",
            linewidth=0.6 if len(plan) <= _MANY else 0.0,
            zorder=2,
        )
    axis.set_ylim(0, lanes.top * 1.05)
    ticks: list[int] = []
    for tokens in sorted(plan.tokens_per_frame.unique().tolist(), reverse=True):
        if not ticks or ticks[-1] - tokens > 0.17 * lanes.top:  # of two labels that would overlap, the larger is shown
            ticks.append(tokens)
    axis.set_yticks(ticks)
    axis.set_ylabel("tokens\nper frame", fontsize=8, color=QUIET)
    axis.grid(axis="y", color="#f1f3f5", zorder=0)


def _draw_rate(axis: object, plan: Drawable, lanes: TimelineEntries) -> None:
    """Draw tokens per second over windows of a few frames, and their mean."""
    edges, rate = lanes.rate(lanes.bins())
    axis.stairs(rate, edges, fill=True, color=RATE_COLOUR, alpha=0.22, zorder=2)
    axis.stairs(rate, edges, baseline=None, color=RATE_COLOUR, linewidth=1.2, zorder=3)
    mean = plan.tokens_per_second
    axis.axhline(mean, color=RATE_COLOUR, linewidth=0.9, linestyle=(0, (1, 2)), zorder=3)
    top = max(float(rate.max()), mean) * 1.12
    axis.set_ylim(0, top)
    axis.set_yticks([mean], [f"∅ {mean:,.0f}"])
    axis.set_ylabel("tokens\nper second", fontsize=8, color=QUIET)


def _draw_similarity(axis: object, plan: Drawable) -> None:
    times, scores = plan.timestamps.numpy(), plan.similarity.numpy()
    slow = plan.frame_types.numpy() == SLOW
    threshold = shown_threshold(plan)
    axis.plot(times, scores, color="#adb5bd", linewidth=1 if len(plan) <= _MANY else 0.6, zorder=2)
    size = 26 if len(plan) <= _MANY else 8
    first = np.where(np.isnan(scores), 1.0, scores)
    for mask, values, colour, name in ((~slow, scores, FAST_COLOUR, "fast"), (slow, first, SLOW_COLOUR, "slow")):
        if mask.any():
            axis.scatter(times[mask], values[mask], s=size, color=colour, label=name, zorder=3, clip_on=False)
    if threshold is not None:
        label = f"threshold {threshold:.4g}"
        axis.axhline(threshold, color=INK, linewidth=0.9, linestyle=(0, (5, 3)), label=label, zorder=1)
    low = min([*scores[~np.isnan(scores)].tolist(), 1.0 if threshold is None else threshold, 0.95])
    axis.set_ylim(max(0.0, low - 0.06 * (1.0 - low) - 0.01), 1.0 + 0.02 * (1.0 - low))
    axis.set_ylabel(
        f"similarity with the\nlatest slow frame\n({plan.settings.get('measure', 'measure')})", fontsize=8, color=QUIET
    )
    axis.grid(color="#f1f3f5", zorder=0)
    axis.legend(
        loc="upper right",
        bbox_to_anchor=(1.0, -0.14),
        ncols=3,
        frameon=False,
        fontsize=8,
        labelcolor=INK,
        borderaxespad=0,
    )
