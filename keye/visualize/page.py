"""A plan as one HTML page: a timeline to step through frame by frame, and tables of all decisions.

The page loads nothing, and its Content-Security-Policy forbids loading. Pictures are embedded as small JPEGs. The page
works with mouse, touch and keyboard, in light and dark mode, down to the width of a phone.
"""

import base64
import io
import json
import math
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

import keye
from keye.slowfast.policies import FAST, SLOW
from keye.visualize.drawable import Drawable
from keye.visualize.figures import Pictures, TimelineEntries, pictures_of, shown_threshold, strip_frames, time_ticks
from keye.visualize.page_parts import SCRIPT, STYLE
from keye.visualize.tables import seconds

MOST_PICTURES = 240
MOST_BYTES = 1_500_000
"""Limit of the JPEGs in total; in base64 they take a third more."""

_LOOKS = (
    (320, 72),
    (240, 66),
    (176, 60),
    (128, 50),
)  # (pixels of the longer side, JPEG quality); the best that fits is used
_CHUNK = 16  # full-size frames in memory
_STRIP = 8  # pictures above the timeline
_MANY = 200  # with more frames, dots are small


def plan_page(plan: Drawable, frames: Pictures | None = None) -> str:
    """The HTML of the page; frames: T pictures uint8 [3, h, w], by default read again from the plan's source."""
    lanes = TimelineEntries.of(plan)
    pictures = _jpegs(plan, frames)
    name = escape(Path(plan.source).name or plan.source)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{name} – slow-fast plan</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<header><h1>{name}</h1><p class="quiet path">{escape(plan.source)}</p></header>
{_figures(plan)}
{_warnings(plan)}
<section aria-label="Timeline">
{_viewer(bool(pictures))}
{_timeline(plan, lanes, bool(pictures))}
</section>
{_frame_table(plan)}
{_settings(plan)}
<footer class="quiet">keye {escape(keye.__version__)}</footer>
</main>
<script type="application/json" id="data">{_data(plan, lanes, pictures)}</script>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _jpegs(plan: Drawable, frames: Pictures | None) -> dict[int, str]:
    """Data URIs of pictures by entry, at most `MOST_BYTES` of JPEG in total, each at another time."""
    small: dict[int, Image.Image] = {}
    chosen = strip_frames(plan, MOST_PICTURES)
    for first in range(0, len(chosen), _CHUNK):
        for entry, pixels in pictures_of(plan, chosen[first : first + _CHUNK], frames).items():
            small[entry] = Image.fromarray(np.ascontiguousarray(pixels))
            small[entry].thumbnail((_LOOKS[0][0], _LOOKS[0][0]))
    for side, quality in _LOOKS:
        coded = {entry: _jpeg(picture, side, quality) for entry, picture in small.items()}
        if sum(map(len, coded.values())) <= MOST_BYTES:
            break
    return {entry: "data:image/jpeg;base64," + base64.b64encode(data).decode() for entry, data in coded.items()}


def _jpeg(picture: Image.Image, side: int, quality: int) -> bytes:
    smaller, file = picture.copy(), io.BytesIO()
    smaller.thumbnail((side, side))
    smaller.save(file, "JPEG", quality=quality)
    return file.getvalue()


def _figures(plan: Drawable) -> str:
    slow, fast = plan.counts
    height, width = plan.source_size
    tiles = [
        (seconds(plan.duration), f"{width}×{height}"),
        (f"{slow + fast}", "frame" if slow + fast == 1 else "frames"),
        (f"{slow}", f"slow, {plan.tokens_each(SLOW)}", "slow"),
        (f"{fast}", f"fast, {plan.tokens_each(FAST)}", "fast"),
        (f"{plan.tokens:,}", f"of {plan.max_tokens:,} tokens"),
        (f"{plan.saved:.0%}", f"saved of {plan.all_slow_tokens:,} all slow"),
        (f"{plan.tokens_per_second:,.0f}", "tokens a second"),
    ]
    cells = "".join(
        f'<div class="{" ".join(kind)}"><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>'
        for value, label, *kind in tiles
    )
    return f'<dl class="figures">{cells}</dl>'


def _warnings(plan: Drawable) -> str:
    if not plan.warnings:
        return ""
    return '<ul class="warnings">' + "".join(f"<li>{escape(text)}</li>" for text in plan.warnings) + "</ul>"


def _viewer(pictures: bool) -> str:
    picture = '<img id="picture" alt="">' if pictures else ""
    return f"""<div class="viewer">{picture}
<dl id="facts" aria-hidden="true"></dl></div>"""


def _timeline(plan: Drawable, lanes: TimelineEntries, pictures: bool) -> str:
    """The entries in a box 1000 units wide, stretched to the page's width; texts are outside of the box."""
    start, end = plan.span
    width = 1000 / (end - start)
    edges, rate = lanes.rate(lanes.bins())
    threshold = shown_threshold(plan)
    scores = plan.similarity.numpy()
    low = min([*scores[~np.isnan(scores)].tolist(), 0.95, 1.0 if threshold is None else threshold])
    bottom = max(0.0, low - 0.05)
    x = (lanes.starts - start) * width
    strip = '<div class="strip" id="strip" aria-hidden="true"></div>' if pictures else ""
    about = f"similarity with the latest slow frame ({plan.settings.get('measure', 'measure')}), {bottom:.2g} to 1"
    about += "" if threshold is None else f", threshold {threshold:.4g}"
    return f"""{strip}<div class="line" id="line" tabindex="0" role="slider" aria-label="Frame" aria-valuemin="1"
 aria-valuemax="{len(plan)}" aria-valuenow="1" aria-valuetext="">
<p class="quiet">tokens per frame</p>
{_svg(90, _blocks(plan, lanes, x, width))}
<p class="quiet">tokens per second, {plan.tokens_per_second:,.0f} on average</p>
{_svg(50, _rate(rate, (edges - start) * width, plan.tokens_per_second))}
<p class="quiet">{escape(about)}</p>
{_svg(130, _similarity(plan, x, bottom, threshold))}
<div class="cursor" id="cursor"></div>
</div>
<div class="axis quiet" aria-hidden="true">{_ticks(start, end)}</div>
<p class="quiet help">Move over the timeline, or focus it and use ← → (Shift: ten frames), Home and End;
S and F go to the next slow and fast frame.</p>"""


def _svg(height: int, inside: str) -> str:
    box = f'viewBox="0 0 1000 {height}" preserveAspectRatio="none" style="height:{height}px"'
    return f'<svg {box} aria-hidden="true">{inside}</svg>'


def _blocks(plan: Drawable, lanes: TimelineEntries, x: np.ndarray, width: float) -> str:
    scale = 86 / lanes.top
    paths = []
    for kind, name in ((SLOW, "slow"), (FAST, "fast")):
        steps = []
        for entry in np.flatnonzero(plan.frame_types.numpy() == kind):
            across = (lanes.ends[entry] - lanes.starts[entry]) * width
            gap = min(1.0, across / 6) if len(plan) <= _MANY else 0
            foot, rise = 90 - lanes.bottoms[entry] * scale, lanes.tokens[entry] * scale
            steps.append(f"M{x[entry]:.2f} {foot:.1f}v{-rise:.1f}h{across - gap:.2f}v{rise:.1f}z")
        paths.append(f'<path class="{name}" d="{"".join(steps)}"/>')
    return "".join(paths)


def _rate(rate: np.ndarray, edges: np.ndarray, mean: float) -> str:
    scale = 44 / max(float(rate.max()), mean)
    steps = "".join(
        f"L{left:.2f} {50 - value * scale:.1f}H{right:.2f}"
        for left, right, value in zip(edges, edges[1:], rate, strict=False)
    )
    level = 50 - mean * scale
    return f'<path class="rate" d="M{edges[0]:.2f} 50{steps}V50z"/><path class="mean" d="M0 {level:.1f}H1000"/>'


def _similarity(plan: Drawable, x: np.ndarray, bottom: float, threshold: float | None) -> str:
    scores = plan.similarity.double().numpy()
    y = 124 - (np.nan_to_num(scores, nan=1.0) - bottom) / (1 - bottom) * 116
    curve = "".join(
        f"{'M' if entry == 0 or math.isnan(scores[entry]) else 'L'}{x[entry]:.2f} {y[entry]:.1f}"
        for entry in range(len(plan))
    )
    parts = [f'<path class="curve" d="{curve}"/>']
    if threshold is not None:
        level = 124 - (threshold - bottom) / (1 - bottom) * 116
        parts.append(f'<path class="threshold" d="M0 {level:.1f}H1000"/>')
    size = "dots" if len(plan) <= _MANY else "dots small"
    for kind, name in ((FAST, "fast"), (SLOW, "slow")):
        mask = plan.frame_types.numpy() == kind
        # A line of zero length with round ends is a dot that stays round when the box is stretched.
        dots = "".join(f"M{x[entry]:.2f} {y[entry]:.1f}h.01" for entry in np.flatnonzero(mask))
        parts.append(f'<path class="{size} {name}" d="{dots}"/>')
    return "".join(parts)


def _ticks(start: float, end: float) -> str:
    return "".join(
        f'<span style="left:{100 * (time - start) / (end - start):.3f}%">{text}</span>'
        for time, text in time_ticks(start, end)
    )


def _frame_table(plan: Drawable) -> str:
    rows = [
        f'<tr class="{cells[2]}">' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
        for cells in plan.frame_rows()
    ]
    heads = "".join(f'<th scope="col">{head}</th>' for head in ("s", "frame", "type", "similarity", "size", "tokens"))
    return f"""<details open><summary>{len(plan)} frames</summary>
<div class="scroll" tabindex="0" role="region" aria-label="Frames"><table id="frames"><thead><tr>{heads}</tr></thead>
<tbody>{"".join(rows)}</tbody></table></div></details>"""


def _settings(plan: Drawable) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(str(name))}</th><td>{escape(str(value))}</td></tr>'
        for name, value in plan.settings.items()
    )
    return f"""<details open><summary>Settings</summary>
<div class="scroll" tabindex="0" role="region" aria-label="Settings"><table>{rows}</table></div></details>"""


def _data(plan: Drawable, lanes: TimelineEntries, pictures: dict[int, str]) -> str:
    """The data of the page's script, as JSON without `<`, which could end its element."""
    start, end = plan.span
    places = sorted(pictures)
    values = {
        "start": start,
        "end": end,
        "starts": [round(time, 4) for time in lanes.starts.tolist()],
        "ends": [round(time, 4) for time in lanes.ends.tolist()],
        "at": places,
        "pictures": [pictures[place] for place in places],
        "strip": [places.index(entry) for entry in strip_frames(plan, _STRIP) if entry in pictures],
    }
    return json.dumps(values, separators=(",", ":")).replace("<", "\\u003c")
