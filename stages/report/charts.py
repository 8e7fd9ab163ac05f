"""Small SVG charts and tables for reports, without scripts or external files; the page sets colours for light and dark.

Colours are the classes `c0` … `c5`, `slow`, `fast` and `muted` of `report.css`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

LEFT, RIGHT, TOP, BOTTOM = 66, 14, 12, 40
NOT_RUN = '<p class="absent">Not run yet.</p>'


@dataclass(frozen=True)
class Series:
    """One curve or one set of dots.

    Attributes:
        name: in the legend.
        x, y: equally many numbers; a NaN in `y` leaves a gap.
        colour: a CSS class of the page, `c0` … `c5` or `muted`.
        spread: half the length of the error bar at each point (dots) or of the band (curve), in units of `y`.
        style: "line", "faint" (thin, for the data under a smoothed curve), "dashed", "dots" (points joined by a line)
            or "marks" (points only).
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str = "c0"
    spread: Sequence[float] | None = None
    style: str = "line"


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """About `about` round numbers from `low` to `high`, in steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """A number as an axis label: 1,200 · 0.25 · 12k."""
    if abs(value) >= 10_000:
        return f"{value / 1000:,.0f}k"
    return f"{value:,.0f}" if value == int(value) else f"{value:g}"


def _text(x: float, y: float, text: str, kind: str = "tick", anchor: str = "middle") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str, title: str = "") -> str:
    inside = f"<title>{escape(title)}</title>" if title else ""
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}">{inside}</line>'


def _dot(x: float, y: float, radius: float, colour: str, title: str) -> str:
    return (
        f'<circle class="dot {colour}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"><title>{escape(title)}</title></circle>'
    )


def _range(values: list[float], given: tuple[float, float] | None) -> tuple[float, float]:
    if given:
        return given
    low, high = min(values), max(values)
    pad = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return low - pad, high + pad


def line_chart(
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    *,
    y_range: tuple[float, float] | None = None,
    width: int = 640,
    height: int = 240,
    percent: bool = False,
) -> str:
    """Curves over a common x axis as one `<svg>`; series without a finite point are left out.

    Args:
        y_range: lowest and highest y; by default from the data.
        percent: y values are shares and are labelled in per cent.
    """
    finite = {s.name: [(x, y) for x, y in zip(s.x, s.y, strict=True) if math.isfinite(y)] for s in series}
    shown = [s for s in series if finite[s.name]]
    if not shown:
        return '<p class="absent">no points yet</p>'
    xs = [float(x) for s in shown for x in s.x]
    ys = [y for s in shown for _, y in finite[s.name]]
    for s in shown:
        ys += [y + d * sign for y, d in zip(s.y, s.spread or [], strict=False) for sign in (-1, 1) if math.isfinite(y)]
    (x0, x1), (y0, y1) = (min(xs), max(xs)), _range(ys, y_range)
    x1 = x1 if x1 > x0 else x0 + 1

    def px(x: float) -> float:
        return LEFT + (x - x0) / (x1 - x0) * (width - LEFT - RIGHT)

    def py(y: float) -> float:
        return height - BOTTOM - (min(max(y, y0), y1) - y0) / (y1 - y0) * (height - TOP - BOTTOM)

    out = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(y_label)} over {escape(x_label)}">']
    for t in ticks(y0, y1):
        out.append(_line(LEFT, py(t), width - RIGHT, py(t), "grid"))
        out.append(_text(LEFT - 7, py(t) + 4, f"{t * 100:g} %" if percent else number(t), anchor="end"))
    for t in ticks(x0, x1, 6):
        out.append(_text(px(t), height - BOTTOM + 17, number(t)))
    out.append(_text((LEFT + width - RIGHT) / 2, height - 5, x_label))
    turn = f'transform="translate(12 {(height - BOTTOM + TOP) / 2}) rotate(-90)"'
    out.append(f"<g {turn}>{_text(0, 0, y_label)}</g>")
    for s in shown:
        out += _draw(s, px, py)
    return "".join(out) + "</svg>"


def _draw(s: Series, px, py) -> list[str]:
    """The marks of one series: band or error bars, then the curve in unbroken runs, then the points."""
    out: list[str] = []
    spread = list(s.spread) if s.spread is not None else [0.0] * len(s.y)
    points = [(x, y, d) for x, y, d in zip(s.x, s.y, spread, strict=True) if math.isfinite(y)]
    if s.style == "line" and s.spread is not None:
        edge = [f"{px(x):.1f},{py(y + d):.1f}" for x, y, d in points]
        edge += [f"{px(x):.1f},{py(y - d):.1f}" for x, y, d in reversed(points)]
        out.append(f'<polygon class="band {s.colour}" points="{" ".join(edge)}"/>')
    if s.style != "marks":
        run: list[str] = []
        for x, y in [*zip(s.x, s.y, strict=True), (0, math.nan)]:
            if math.isfinite(y):
                run.append(f"{px(x):.1f},{py(y):.1f}")
            elif run:
                out.append(f'<polyline class="curve {s.style} {s.colour}" points="{" ".join(run)}"/>')
                run = []
    if s.style in ("dots", "marks"):
        for x, y, d in points:
            if d:
                out.append(_line(px(x), py(y - d), px(x), py(y + d), f"bar {s.colour}"))
            title = f"{s.name}: {x:g}, {y:.4g}" + (f" ± {d:.2g}" if d else "")
            out.append(_dot(px(x), py(y), 3.6, s.colour, title))
    return out


def row_chart(rows: Sequence[str], series: Sequence[Series], *, width: int = 760, row_height: int = 44) -> str:
    """Shares by row, dots with error bars; `x` of a series is the row's number, `y` a share in [0, 1].

    "marks" are round dots with error bars; any other style is a short upright stroke (a reference such as chance).
    """
    left, right, top, bottom = 128, 18, 8, 30
    height = top + bottom + row_height * len(rows)

    def px(share: float) -> float:
        return left + min(max(share, 0.0), 1.0) * (width - left - right)

    out = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="accuracy by family">']
    for t in (0, 0.25, 0.5, 0.75, 1):
        out.append(_line(px(t), top, px(t), height - bottom, "grid"))
        out.append(_text(px(t), height - bottom + 18, f"{t * 100:g} %"))
    out += [_text(left - 12, top + row_height * (i + 0.5) + 5, row, "row", "end") for i, row in enumerate(rows)]
    dotted = [s.name for s in series if s.style == "marks"]
    for s in series:
        lane = (dotted.index(s.name) - (len(dotted) - 1) / 2) * 9 if s.style == "marks" else 0
        for row, share, spread in zip(s.x, s.y, s.spread or [0.0] * len(s.y), strict=True):
            if not math.isfinite(share):
                continue
            y, half = top + row_height * (row + 0.5) + lane, row_height * 0.36
            title = f"{rows[int(row)]}, {s.name}: {share * 100:.1f} %" + (f" ± {spread * 100:.1f}" if spread else "")
            if s.style == "marks":
                out.append(_line(px(share - spread), y, px(share + spread), y, f"bar {s.colour}"))
                out.append(_dot(px(share), y, 4.6, s.colour, title))
            else:
                out.append(_line(px(share), y - half, px(share), y + half, f"stroke {s.style} {s.colour}", title))
    return "".join(out) + "</svg>"


def legend(series: Sequence[Series]) -> str:
    """The names of the series with a swatch each, as a line of HTML."""
    swatches = (f'<span><i class="swatch {s.style} {s.colour}"></i>{escape(s.name)}</span>' for s in series)
    return f'<p class="legend">{"".join(swatches)}</p>'


def smooth(values: Sequence[float]) -> list[float]:
    """Centred mean over a fifteenth of the values around each, over fewer of them near an end."""
    half = max(1, len(values) // 30)
    out = []
    for i in range(len(values)):
        reach = min(half, i, len(values) - 1 - i)
        around = values[i - reach : i + reach + 1]
        out.append(sum(around) / len(around))
    return out


def table(head: list[str], rows: list[list[str]], kind: str = "figures") -> str:
    """An HTML table of HTML cells. The first column is left-aligned; with `kind` "facts" all columns are."""
    cells = "".join(f"<th>{h}</th>" for h in head)
    body = "".join("<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>" for row in rows)
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def percent(share: float, spread: float | None = None) -> str:
    """`62.5 % ± 3.1`, or a dash for NaN."""
    if math.isnan(share):
        return "–"
    return f"{share * 100:.1f} %" + (f" <small>± {spread * 100:.1f}</small>" if spread else "")
