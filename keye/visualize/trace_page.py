"""The page of a trace: the filmstrip coloured by effect, the groups, the layers, the lens and the counterfactual.

It is drawn from the JSON values of `keye.evaluation.trace.trace`. The page loads nothing and has no script; pictures
are small JPEGs, read again from the clips where they still exist.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import keye
from keye.errors import VideoError, writing
from keye.video.clip import read_frames_at
from keye.visualize.page_parts import STYLE
from keye.visualize.trace_parts import TRACE_STYLE, cell, data_uri, heat_map, number, table

Trace = Mapping[str, Any]

MOST_PICTURES = 120
MOST_ROWS = 24
PARTS = ("slow", "fast", "visual", "image", "timestamps", "question", "template")
HEADS = (
    *("group", "tokens", "effect, nats", "direct effect", "KL, nats", "answer changes", "attention"),
)  # fmt: skip


def write_trace(path: str | Path, trace: Trace, model: str = "") -> None:
    """Write the page of a trace.

    Args:
        path: the HTML file.
        trace: what `trace_video` or `trace_text` returns.
        model: its name, for the footer.

    Raises:
        KeyeError: the file cannot be written.
    """
    with writing(path, "the page"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(trace_page(trace, model), encoding="utf-8")


def trace_page(trace: Trace, model: str = "") -> str:
    """The HTML of the page."""
    sections = [
        _figures(trace), _frames(trace), _groups(trace), _layers(trace), _lens(trace), _counterfactual(trace),
        _coherence(trace), _map(trace),
    ]  # fmt: skip
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>Trace – {escape(trace["question"][:80])}</title>
<style>{STYLE}{TRACE_STYLE}</style>
</head>
<body>
<main>
<header><p class="quiet">{escape(", ".join(clip["source"] for clip in trace["clips"]))}</p>
<h1>{escape(trace["question"])}</h1>
<p class="answer">{escape(trace["answer"]) or "(an answer without text)"}</p></header>
{"".join(sections)}
<footer class="quiet">keye {escape(keye.__version__)} · {escape(model)}</footer>
</main>
</body>
</html>
"""


def _figures(trace: Trace) -> str:
    """The main numbers."""
    depth, commitment = trace["depth"], trace["commitment"]
    tiles = [
        (f"{math.exp(trace['answer_log_prob']):.1%}", "probability of the answer", ""),
        (f"{trace['tokens']:,}", "tokens of the prompt", ""),
        (_block(commitment["by_cut"], depth), "blocks: the answer no longer depends on the prompt", ""),
        (_block(commitment["by_lens"], depth), "blocks: the lens shows the final answer", ""),
    ]
    for kind, share in trace["shares"].items():
        effect = "none" if share["effect"] is None else f"{share['effect']:.0%}"
        tiles.append((effect, f"of the visual effect is {kind}, with {share['tokens']:.0%} of the tokens", kind))
    return '<dl class="figures">' + "".join(
        f'<div class="{kind}"><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>' for value, label, kind in tiles
    ) + "</dl>"  # fmt: skip


def _block(done: int | None, depth: int) -> str:
    if done is None:
        return "not the model's"
    return "before the first" if not done else f"after {done} of {depth}"


def _of(trace: Trace, *kinds: str) -> list[Trace]:
    return [group for group in trace["groups"] if group["kind"] in kinds]


def _frames(trace: Trace) -> str:
    """Every frame with its effect as the colour below it."""
    frames = _of(trace, "frame")
    if not frames:
        return ""
    top = max(abs(frame["nats"]) for frame in frames) or 1.0
    shown = sorted(sorted(frames, key=lambda frame: -abs(frame["nats"]))[:MOST_PICTURES], key=lambda f: f["frame"])
    pictures = _pictures(trace, [frame["frame"] for frame in shown])
    cells = []
    for frame in shown:
        source = pictures.get(frame["frame"])
        picture = f'<img alt="" src="{source}">' if source else '<div class="blank"></div>'
        kind = "fast" if frame["fast"] else "slow"
        cells.append(
            f'<figure class="{kind}">{picture}<div class="effect" {cell(frame["nats"], top)}>'
            f"{number(frame['nats'])}</div><figcaption>{frame['seconds']:.1f} s, {kind}<br>"
            f"attention {frame['attention']:.1%}</figcaption></figure>"
        )
    rest = f" The {len(shown)} strongest of {len(frames)} frames." if len(shown) < len(frames) else ""
    about = f"Effect in nats: by how much the answer's log-probability falls without the frame's tokens.{rest}"
    return f'<h2>Frames</h2><p class="quiet">{about}</p><div class="film">{"".join(cells)}</div>'


def _pictures(trace: Trace, frames: Sequence[int]) -> dict[int, str]:
    """Data URIs of frames, numbered over all clips; without those whose clip cannot be read any more."""
    found: dict[int, str] = {}
    first = 0
    for clip in trace["clips"]:
        wanted = [frame for frame in frames if first <= frame < first + clip["frames"]]
        if wanted and Path(clip["source"]).is_file():
            try:
                read = read_frames_at(clip["source"], [clip["seconds"][frame - first] for frame in wanted])
                found |= {
                    frame: data_uri(one.pixels.permute(1, 2, 0).numpy())
                    for frame, one in zip(wanted, read, strict=False)
                }
            except VideoError:  # the file may have changed since; the numbers are still shown
                pass
        first += clip["frames"]
    return found


def _groups(trace: Trace) -> str:
    """What each part of the prompt and each word does for the answer."""
    parts, words = _of(trace, *PARTS), _of(trace, "word")
    words = sorted(words, key=lambda group: -abs(group["nats"]))[:MOST_ROWS]
    top = max((abs(group["nats"]) for group in (*parts, *words)), default=1.0) or 1.0
    who = "any later token" if trace["readers"] == "later" else "the answer's own tokens (the prompt is long)"
    text = (
        f"Effect: {who} cannot read the group. Direct: only the answer's own tokens cannot, so what other tokens have "
        "read from it still counts. Attention is an observation, not an intervention."
    )
    found = f'<h2>Parts of the prompt</h2><p class="quiet">{text}</p>'
    for title, rows in (("", parts), ("Words", words)):
        if rows:
            found += (f"<h3>{title}</h3>" if title else "") + table(HEADS, [_row(row, top) for row in rows])
    return found


def _row(group: Trace, top: float) -> list[str]:
    return [
        f'<th scope="row">{escape(group["name"])}</th>', f"<td>{group['tokens']}</td>",
        f"<td {cell(group['nats'], top)}>{number(group['nats'])}</td>",
        f"<td {cell(group['answer_nats'], top)}>{number(group['answer_nats'])}</td>",
        f"<td>{group['kl']:.2f}</td>", f"<td>{'yes' if group['flips'] else ''}</td>",
        f"<td>{group['attention']:.1%}</td>",
    ]  # fmt: skip


def _layers(trace: Trace) -> str:
    """In which blocks the strongest groups are read."""
    if not trace["windows"]:
        return ""
    strongest = sorted(_of(trace, "frame", "image", *PARTS, "word"), key=lambda group: -abs(group["nats"]))[:MOST_ROWS]
    columns = [
        f"{window[0] + 1}" if len(window) == 1 else f"{window[0] + 1}–{window[-1] + 1}" for window in trace["windows"]
    ]
    rows = [(group["name"], group["windows"]) for group in strongest]
    text = "The effect in nats where a group is hidden in these blocks only."
    return f'<h2>Blocks</h2><p class="quiet">{text}</p>' + heat_map("group", columns, rows)


def _lens(trace: Trace) -> str:
    """What the state that predicts the answer says after each block."""
    found = trace["lens"]
    rows = [
        [
            f'<th scope="row">{"embeddings" if not at else f"block {at}"}</th>', f"<td>{escape(repr(word)[1:-1])}</td>",
            f"<td>{found['top_probability'][at]:.1%}</td>", f"<td>{math.exp(found['answer_log_prob'][at]):.1%}</td>",
            f"<td>{found['kl'][at]:.2f}</td>",
        ]
        for at, word in enumerate(found["top"])
    ]  # fmt: skip
    heads = ("after", "first token", "probability", "of the answer's first token", "KL to the output, nats")
    return f"<h2>Lens</h2>{table(heads, rows)}"


def _counterfactual(trace: Trace) -> str:
    """What states of this run restore in the run of the counterfactual."""
    found = trace.get("counterfactual")
    if not found:
        return ""
    text = f"Its answer is “{found['answer']}”."
    if "handed_over" in found:
        at = found["handed_over"]
        text += " The state of the last token alone "
        restores = f"restores “{trace['answer']}” in its run"
        text += "never " * (at == trace["depth"]) + restores
        text += "." if at == trace["depth"] else f" from block {at + 1} on."
    if "committed" in found:
        text += f" The states of all other tokens no longer do from block {found['committed'] + 1} on. Cells: share of "
        text += "the contrast that a group's states after a block restore."
    text += f" {found['note'][0].upper()}{found['note'][1:]}." if "note" in found else ""
    body = ""
    if "restored" in found:
        rows = list(zip(found["groups"], found["restored"], strict=True))
        rows.sort(key=lambda row: -max(abs(value or 0) for value in row[1]))
        columns = [str(block + 1) for block in range(trace["depth"])]
        body = heat_map("group", columns, rows[:MOST_ROWS], top=1.0)
    return f'<h2>Counterfactual</h2><p class="quiet">{escape(text)}</p>{body}'


def _coherence(trace: Trace) -> str:
    """CAS under each choice; the markers are those of the paper."""
    found = trace.get("coherence")
    if not found:
        return ""
    rows = []
    for one in found["cas"]:
        name = ("leading space" if one["space"] else "no space") + (", normed" if one["normed"] else ", raw")
        markers = [f"<td>{'' if one[m] is None else one[m] + 1}</td>" for m in ("onset", "inversion", "commitment")]
        scores = "".join(f"<td>{value:.2f}</td>" for value in one["scores"])
        rows.append([f'<th scope="row">{name}</th>', *markers, scores])
    heads = ("words and states", "onset", "inversion", "commitment", *(str(at + 1) for at in range(trace["depth"])))
    words = f"{', '.join(found['intended'])} against {', '.join(found['competing'])}"
    text = f"CAS of {words} after each block. A similarity, which depends on the choices in the rows."
    return f'<h2>Coherence</h2><p class="quiet">{escape(text)}</p>{table(heads, rows)}'


def _map(trace: Trace) -> str:
    """The words of a layer and the strongest edges."""
    found = trace.get("map")
    if not found:
        return ""
    words = "".join(f"<li>{escape(node['word'])} <span>{node['alignment']:.2f}</span></li>" for node in found["nodes"])
    top = max((abs(edge["weight"]) for edge in found["edges"]), default=1.0) or 1.0
    rows = [
        [
            f"<td>{escape(edge['source'])}</td>", f"<td>{escape(repr(edge['at'])[1:-1])}</td>",
            f"<td>{escape(edge['target'])}</td>", f"<td {cell(edge['weight'], top)}>{edge['weight']:+.3f}</td>",
        ]
        for edge in found["edges"][:MOST_ROWS]
    ]  # fmt: skip
    heads = ("concept", "its place in the prompt", "concept", "fall of its probability without that place")
    text = f"After block {found['layer'] + 1}: words with the largest scores, and the cosine of their embeddings."
    return f'<h2>Semantic map</h2><p class="quiet">{text}</p><ul class="words">{words}</ul>{table(heads, rows)}'
