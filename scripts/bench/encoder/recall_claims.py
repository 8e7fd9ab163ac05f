"""Claims and tables of the results of `recall.py`."""

from typing import Any

import numpy as np

from scripts.bench.common.intervals import paired_interval
from scripts.bench.common.record import Claim, Table
from scripts.bench.encoder.media.changes import CONTINUITY, FILM, GROUPS
from scripts.bench.encoder.media.pages import PAGE_KINDS
from scripts.bench.encoder.recall_tally import Results

DEFAULT, RELEASED = "change", "patch_cosine"
RIVALS = ("ssim", "mse", "lab", "patch_l1", "uniform", "random")
STATIC = "vtest.avi held-out"
SETTINGS = {
    "released": "as many slow frames as the release makes at 0.9",
    "10%": "10 % of the frames slow",
    "20%": "20 % of the frames slow",
    "as changes": "as many slow frames as changes",
    "as default": "as many slow frames as the default makes",
    "together 20%": "20 % of all frames slow at one threshold for all clips",
}
COMPARED = ("released", "10%", "as changes", "as default", "together 20%")


def claims(results: Results) -> list[Claim]:
    """The claims, without those about missing clips."""
    everything = results.get("all", {})  # which some clips do not count among
    found = [
        _against_all(everything[setting], setting, "held-out clips") for setting in COMPARED if setting in everything
    ]
    films = _without_together(results.get("films", {}))
    found += [_against_all(films[setting], setting, "held-out films") for setting in COMPARED if setting in films]
    for film, about, group in ((FILM, "", "cuts"), (CONTINUITY, " cut within scenes", "all")):
        if film in results:
            found += [_cuts(results[film][setting], about, group, setting) for setting in ("released", "10%")]
    small = [setting for setting in ("10%", "20%") if setting in everything]
    found += [_small(everything[setting], "drawn and real clips", setting) for setting in small]
    if STATIC in results:
        found.append(_small(results[STATIC]["10%"], "people in a static view (vtest.avi)", "10%"))
    found += [_page(results[kind]["default"], kind) for kind in PAGE_KINDS if kind in results]
    return [claim for claim in found if claim is not None]


def _without_together(settings: dict[str, dict[str, dict]]) -> dict[str, dict[str, dict]]:
    """Without the settings with one threshold for all clips: one of the films alone is short enough for them."""
    return {setting: measures for setting, measures in settings.items() if not setting.startswith("together")}


def _recall(result: dict, group: str) -> float:
    return result["changes"][group]["recall"]


def _against_all(measures: dict[str, dict], setting: str, clips: str) -> Claim | None:
    names = [name for name in (RELEASED, *RIVALS) if name in measures]
    if DEFAULT not in measures or not names or "all" not in measures[DEFAULT]["changes"]:
        return None
    own = _recall(measures[DEFAULT], "all")
    others = {name: _recall(measures[name], "all") for name in names}
    shown = ", ".join(f"{name} {value:.0%}" for name, value in others.items())
    best = max(others, key=others.__getitem__)
    low, high = recall_interval(measures[DEFAULT], measures[best])
    return Claim(
        f"recall of changes, {SETTINGS[setting]}, {clips}",
        f"above {', '.join(names)}",
        f"{DEFAULT} {own:.0%}; {shown}; to {best} {low:+.0f} to {high:+.0f} points",
        _times(own, others.get(RELEASED)),
        own > max(others.values()),
    )


def recall_interval(one: dict[str, Any], other: dict[str, Any]) -> tuple[float, float]:
    """95 % interval of the difference of two recalls, in points, paired; clips and half minutes of films are drawn."""
    low, high = paired_interval(np.subtract(one["hits"], other["hits"]), one["units"])
    return 100 * low, 100 * high


def wasted_interval(one: dict[str, Any], other: dict[str, Any]) -> tuple[float, float]:
    """95 % interval of the difference of two shares of wasted frames, in points, paired as `recall_interval`."""
    first, second = one["wasted_by_unit"], other["wasted_by_unit"]
    difference = np.array([first[unit][0] - second[unit][0] for unit in first])
    low, high = paired_interval(difference, list(first), np.array([of for _, of in first.values()]))
    return 100 * low, 100 * high


def _page(measures: dict[str, dict], kind: str) -> Claim | None:
    if DEFAULT not in measures:
        return None
    counts = {
        name: result["changes"]["pages"] for name, result in measures.items() if name not in ("uniform", "random")
    }
    own = counts.pop(DEFAULT)
    return Claim(
        f"text that replaces text is seen, {kind}, 1080p, every measure at its default threshold",
        "≥ 95 %",
        f"{DEFAULT} {own['seen']:g} of {own['of']}; "
        + ", ".join(f"{name} {count['seen']:g}" for name, count in counts.items()),
        "",
        own["recall"] >= 0.95,
    )


def _cuts(measures: dict[str, dict], about: str, group: str, setting: str) -> Claim | None:
    if not {DEFAULT, RELEASED} <= set(measures):
        return None
    own, theirs = (measures[name]["changes"][group] for name in (DEFAULT, RELEASED))
    spent = f"{measures[DEFAULT]['slow']} and {measures[RELEASED]['slow']} slow frames"
    return Claim(
        f"recall of cuts in ten minutes of animation{about}, {SETTINGS[setting]}",
        "≥ 2 × the release's",
        f"{own['seen']:g} of {own['of']} against {theirs['seen']:g} ({spent})",
        _times(own["recall"], theirs["recall"]),
        own["seen"] > 0 and own["seen"] >= 2 * theirs["seen"],
    )


def _small(measures: dict[str, dict], where: str, setting: str) -> Claim | None:
    group = "small"
    if not {DEFAULT, RELEASED} <= set(measures) or group not in measures[DEFAULT]["changes"]:
        return None
    own, theirs = (measures[name]["changes"][group] for name in (DEFAULT, RELEASED))
    spent = f"{measures[DEFAULT]['slow']} and {measures[RELEASED]['slow']} slow frames"
    return Claim(
        f"recall of small moving things, {where}, {SETTINGS[setting]}",
        "above 0 and above the release's",
        f"{own['seen']:g} of {own['of']} against {theirs['seen']:g} ({spent})",
        _times(own["recall"], theirs["recall"]),
        own["seen"] > theirs["seen"],
    )


def _times(own: float, theirs: float | None) -> str:
    return f"{own / theirs:.2f} ×" if theirs else ""


def tables(results: Results) -> list[Table]:
    """Recall by kind of change at every setting, by kind of clip at two, of films, of text and with continuity."""
    found = []
    if "all" in results:
        found.append(_by_change(results["all"], "Recall by kind of change"))
    if "films" in results:
        about = "the same, films without a generator or a source in common with the clips that measures were tuned on"
        found.append(_by_change(_without_together(results["films"]), about.capitalize()))
    found += [_by_clip(results, setting) for setting in ("released", "10%")]
    if CONTINUITY in results:
        found.append(_by_cut(results[CONTINUITY]))
    pages = {kind: results[kind] for kind in PAGE_KINDS if kind in results}
    if pages:
        found.append(_by_page(pages))
    return found


def _by_change(settings: dict[str, dict[str, dict]], title: str) -> Table:
    judged = [result for measures in settings.values() for result in measures.values()]
    shown = ["all", *(g for g in sorted({*GROUPS.values()}) if any(g in result["changes"] for result in judged))]
    nuisances = any(result["wasted"] is not None for result in judged)
    rows = []
    for setting, measures in settings.items():
        for name, result in measures.items():
            cells = [f"{_recall(result, g):.0%}" if g in result["changes"] else "–" for g in shown]
            cells.append("–" if result["wasted"] is None else f"{result['wasted']:.0%}")
            rows.append((setting, name, f"{result['share']:.1%}", *cells, *_intervals(result, measures, nuisances)))
    columns = ["setting", "measure", "slow", *shown, "wasted", *_interval_columns(nuisances)]
    return Table(title, columns, rows)


def _interval_columns(nuisances: bool) -> list[str]:
    return [f"all, points to {DEFAULT} (95 %)", *([f"wasted, points to {DEFAULT} (95 %)"] if nuisances else [])]


def _intervals(result: dict, measures: dict[str, dict], nuisances: bool) -> list[str]:
    reference = measures.get(DEFAULT)
    if reference is None or result is reference:
        return ["–"] * (1 + nuisances)
    points = [recall_interval(result, reference)] if result["hits"] else [None]
    if nuisances:
        points.append(wasted_interval(result, reference) if result["wasted"] is not None else None)
    return ["–" if one is None else f"{one[0]:+.0f} to {one[1]:+.0f}" for one in points]


def _by_clip(results: Results, setting: str) -> Table:
    names: list[str] = []
    rows = []
    for kind, settings in results.items():
        if kind == "films":
            continue
        of = settings[setting]
        names = names or list(of)
        changes = of[names[0]]["changes"].get("all", {"of": 0})["of"]
        cells = [f"{_recall(r, 'all'):.0%}" if changes else f"({r['share']:.0%} slow)" for r in of.values()]
        rows.append((kind, changes, *cells))
    return Table(f"Recall by kind of clip, {SETTINGS[setting]}", ("clips", "changes", *names), rows)


def _by_cut(settings: dict[str, dict[str, dict]]) -> Table:
    rows = []
    for setting, measures in settings.items():
        for name, result in measures.items():
            counts = [result["changes"][group] for group in ("all", "inner cuts", "cuts")]
            cells = [f"{count['seen']:g} of {count['of']}" for count in counts]
            points = _intervals(result, measures, False)
            rows.append((setting, name, result["slow"], f"{counts[0]['recall']:.0%}", *cells, *points))
    columns = ("setting", "measure", "slow frames", "recall", "cuts seen", "within a scene", "to another scene")
    return Table("Cuts of the film with continuity", (*columns, *_interval_columns(False)), rows)


def _by_page(kinds: Results) -> Table:
    rows = []
    for kind, settings in kinds.items():
        for setting, measures in settings.items():
            for name, result in measures.items():
                count = result["changes"]["pages"]
                wasted = "–" if result["wasted"] is None else f"{result['wasted']:.0%}"
                points = _intervals(result, measures, False)
                rows.append(
                    (kind, setting, name, result["slow"], f"{count['seen']:g} of {count['of']}", wasted, *points)
                )
    columns = ("clips", "setting", "measure", "slow frames", "replacements seen", "wasted", *_interval_columns(False))
    return Table("Text that other text replaces, 1080p", columns, rows)
