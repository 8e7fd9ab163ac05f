"""Style, cells and tables of a trace's page."""

import base64
import io
from collections.abc import Sequence
from html import escape

import numpy as np
from PIL import Image

_SIDE, _QUALITY = 160, 70  # pixels along the longer side of a picture, JPEG quality
_STRONGEST = 0.6  # opacity of the largest effect, so that text stays readable on it

TRACE_STYLE = """
:root{--for:95,61,196;--against:9,146,104}
@media(prefers-color-scheme:dark){:root{--for:151,117,250;--against:56,217,169}}
h2{font-size:1.15rem;margin:28px 0 4px}
h3{font-size:1rem;margin:14px 0 0}
.answer{font-size:1.25rem;font-weight:600}
.film{display:grid;grid-template-columns:repeat(auto-fill,minmax(96px,1fr));gap:8px;margin-top:8px}
.film figure{margin:0;border-top:3px solid var(--slow)}
.film figure.fast{border-color:var(--fast)}
.film img,.film .blank{width:100%;aspect-ratio:1;object-fit:cover;display:block;background:var(--tile)}
.film .effect,td.heat{text-align:right;font-variant-numeric:tabular-nums}
.film .effect{padding:2px 6px;font-weight:600}
.film figcaption{font-size:.75rem;color:var(--quiet)}
.scroll{max-height:none}
.scroll table{width:auto;min-width:100%}
tbody tr:last-child>*{border-bottom:0}
.words{display:flex;flex-wrap:wrap;gap:4px 10px;padding:0;list-style:none;margin:8px 0 0}
.words li{background:var(--tile);border-radius:6px;padding:1px 8px}
.words span{color:var(--quiet);font-size:.8rem}
th~td,th~th,td~td{text-align:right}
tbody th{font-weight:500}
"""


def number(value: float | None) -> str:
    """A signed effect with two digits, zero without a sign; a dash if there is none."""
    if value is None:
        return "–"
    return "0.00" if round(value, 2) == 0 else f"{value:+.2f}".replace("-", "−")


def cell(value: float | None, top: float) -> str:
    """The attributes of a cell whose colour is an effect's sign, and its opacity the share of the largest one."""
    share = 0.0 if value is None else min(1.0, abs(value) / top) * _STRONGEST
    colour = "for" if (value or 0) >= 0 else "against"
    return f'style="background:rgba(var(--{colour}),{share:.2f})"'


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are HTML already, in a box that scrolls."""
    top = "".join(f'<th scope="col">{head}</th>' for head in heads)
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def heat_map(
    head: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[float | None]]], top: float | None = None
) -> str:
    """Rows of effects, coloured relative to `top` (default: the largest of all)."""
    every = [abs(value) for _, values in rows for value in values if value is not None]
    top = top or max(every, default=1.0) or 1.0
    cells = [
        [f'<th scope="row">{escape(name)}</th>', *(f"<td {cell(v, top)}>{number(v)}</td>" for v in values)]
        for name, values in rows
    ]
    return table((head, *columns), cells)


def data_uri(picture: np.ndarray) -> str:
    """A picture uint8 [h, w, 3] as a small JPEG."""
    small, file = Image.fromarray(np.ascontiguousarray(picture)), io.BytesIO()
    small.thumbnail((_SIDE, _SIDE))
    small.save(file, "JPEG", quality=_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
