"""An HTML page of questions: for each clip its questions, the pictures of its events, and its plan."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from keye.errors import ManifestError, writing
from keye.slowfast.policies import SLOW
from keye.video.clip import read_frames_at
from keye.visualize.drawable import Drawable
from keye.visualize.notebook import PLACES, plan_html, table_html, thumbnail

Row = Mapping[str, Any]


def first_clips(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows of a manifest about the shortest clip of each family, together for each clip.

    Raises:
        ManifestError: no row is about a clip.
    """
    clips: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if path := clip_of(row):
            clips.setdefault((str(row.get("family", "all")), path), []).append(row)
    if not clips:
        raise ManifestError("no question is about a clip; give a folder that keye bench wrote")
    shortest: dict[str, list[Row]] = {}
    for (family, _), about in clips.items():
        if family not in shortest or _duration(about) < _duration(shortest[family]):
            shortest[family] = about
    return list(shortest.values())


def clip_of(row: Row) -> str | None:
    """The path of a row's clip, relative to its manifest; None if it has none."""
    contents = (message["content"] for message in row["messages"] if not isinstance(message["content"], str))
    return next((part["video"] for parts in contents for part in parts if part.get("type") == "video"), None)


def write_questions(path: str | Path, clips: Iterable[tuple[Sequence[Row], Drawable]]) -> None:
    """Write the page.

    Args:
        path: the HTML file.
        clips: the rows about one clip, and the plan of that clip.

    Raises:
        ManifestError: the file cannot be written.
    """
    parts = "".join(_section(rows, plan) for rows, plan in clips)
    head = '<!doctype html><html lang="en"><meta charset="utf-8"><title>Questions and plans</title>'
    with writing(path, "the page", ManifestError):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(f'{head}<body style="font-family:sans-serif;margin:2em">{parts}</body></html>\n', "utf-8")


def shown(plan: Drawable, start: float, end: float) -> str:
    """ "slow", "fast" or "not shown": how the plan shows what lasts from `start` to `end` seconds."""
    times = plan.timestamps.double().numpy()
    kinds = plan.frame_types.numpy()[(times >= start - 1e-3) & (times < end - 1e-3)]
    return "not shown" if not len(kinds) else "slow" if (kinds == SLOW).any() else "fast"


def _section(rows: Sequence[Row], plan: Drawable) -> str:
    asked = [(_question(row), f"answer: {row['answer']}") for row in rows]
    title = f"<h2>{escape(str(rows[0].get('family', 'all')))}: {escape(Path(plan.source).name)}</h2>"
    return f"{title}{table_html(asked)}{_events(rows[0], plan)}<h3>Plan</h3>{plan_html(plan)}"


def _events(row: Row, plan: Drawable) -> str:
    """The pictures at the first changes of the clip, and whether the plan shows them; empty without any."""
    meta = row.get("meta") or {}
    events, duration = meta.get("events") or [], _duration([row])
    begun = sorted((event for event in events if event.get("state")), key=lambda event: event["second"])[:PLACES]
    if not begun:
        return ""
    ends = [
        min((e["second"] for e in events if e["place"] == event["place"] and e["second"] > event["second"]),
            default=duration)
        for event in begun
    ]  # fmt: skip
    pictures = read_frames_at(plan.source, [event["second"] for event in begun])
    cells = "".join(
        thumbnail(
            np.asarray(frame.pixels.permute(1, 2, 0)), f"{event['second']:g} s: {shown(plan, event['second'], end)}"
        )
        for event, end, frame in zip(begun, ends, pictures, strict=False)
    )
    return f'<h3>Events, and how the plan shows them</h3><div style="display:flex;flex-wrap:wrap;gap:4px">{cells}</div>'


def _question(row: Row) -> str:
    content = row["messages"][0]["content"]
    return content if isinstance(content, str) else " ".join(part["text"] for part in content if "text" in part)


def _duration(rows: Sequence[Row]) -> float:
    return float((rows[0].get("meta") or {}).get("duration") or 0)
