"""HTML of a plan or an encoded video for notebooks: filmstrip, summary and warnings."""

import base64
import io
from collections.abc import Mapping
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from keye.errors import VideoError
from keye.slowfast.policies import SLOW
from keye.visualize.drawable import Drawable
from keye.visualize.figures import FAST_COLOUR, QUIET, SLOW_COLOUR, pictures_of, strip_frames

PLACES = 10  # pictures of the filmstrip
_SIDE, _QUALITY = 160, 70  # pixels along the longer side of a picture, JPEG quality


def plan_html(plan: Drawable, pictures: Mapping[int, np.ndarray] | None = None) -> str:
    """A filmstrip of at most `PLACES` pictures, each with a border in the colour of its type, above the plan's summary.

    pictures: uint8 [h, w, 3] by entry of the plan. By default they are read again from the plan's source; there is no
    filmstrip where the source does not exist.
    """
    if pictures is None:
        try:
            pictures = pictures_of(plan, strip_frames(plan, PLACES), None)
        except VideoError:  # the file may have changed since; its plan is still shown
            pictures = {}
    cells = "".join(_cell(plan, entry, picture) for entry, picture in pictures.items())
    strip = f'<div style="display:flex;gap:4px;overflow-x:auto">{cells}</div>' if cells else ""
    return f"<div>{strip}{table_html(plan.facts())}</div>"


def table_html(rows: list[tuple[str, str]]) -> str:
    """(label, value) rows as a table."""
    lines = "".join(
        f'<tr><th style="text-align:left">{escape(name)}</th><td style="text-align:left">{escape(value)}</td></tr>'
        for name, value in rows
    )
    return f"<table>{lines}</table>"


def one_line(plan: Drawable) -> str:
    """A short description of the plan."""
    slow, fast = plan.counts
    name = Path(plan.source).name or plan.source
    name = name if len(name) <= 40 else f"{name[:24]}…{name[-15:]}"
    warnings = f", {len(plan.warnings)} warning{'s' * (len(plan.warnings) > 1)}" if plan.warnings else ""
    return f"{name!r}, {plan.duration:.2f} s, {slow} slow + {fast} fast frames, {plan.tokens} tokens{warnings}"


def _cell(plan: Drawable, entry: int, picture: np.ndarray) -> str:
    slow = int(plan.frame_types[entry]) == SLOW
    time = f"{float(plan.timestamps[entry]):.2f} s {'slow' if slow else 'fast'}"
    return thumbnail(picture, time, SLOW_COLOUR if slow else FAST_COLOUR)


def thumbnail(picture: np.ndarray, text: str, colour: str = QUIET) -> str:
    """A picture uint8 [h, w, 3] as a small JPEG with a border in `colour` and a caption."""
    small, file = Image.fromarray(np.ascontiguousarray(picture)), io.BytesIO()
    small.thumbnail((_SIDE, _SIDE))
    small.save(file, "JPEG", quality=_QUALITY)
    data = base64.b64encode(file.getvalue()).decode()
    return (
        f'<figure style="margin:0"><img alt="{text}" style="border-bottom:3px solid {colour};max-width:none" '
        f'src="data:image/jpeg;base64,{data}"><figcaption style="color:{QUIET};font-size:smaller">{text}</figcaption>'
        "</figure>"
    )
