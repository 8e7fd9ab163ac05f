"""Claims and tables of the results of `recall.py`."""

from collections.abc import Iterable

from scripts.bench.common.record import Claim, Table

DEFAULT, RELEASED = "change", "patch_cosine"
RIVALS = ("ssim", "mse", "uniform")
FILM = "film of the trailer"
CONTINUITY = "film with continuity"  # its changes are cuts, and nothing but cuts
STATIC = "vtest.avi held-out"
SETTINGS = {
    "released": "as many slow frames as the release makes at 0.9",
    "10%": "10 % of the frames slow",
    "20%": "20 % of the frames slow",
    "as changes": "as many slow frames as changes",
    "together 20%": "20 % of all frames slow at one threshold for all clips",
}
Results = dict[str, dict[str, dict[str, dict]]]
"""{"all" or a kind of clip: {setting: {measure: {"slow", "frames", "share", "wasted", "changes": {group: …}}}}}"""


def claims(results: Results) -> list[Claim]:
    """The claims, without those about missing clips."""
    everything = results.get("all", {})  # which some clips do not count among
    compared = [name for name in ("released", "10%", "as changes", "together 20%") if name in everything]
    found = [_against_all(everything[setting], setting) for setting in compared]
    for film, about, group in ((FILM, "", "cuts"), (CONTINUITY, " cut within scenes", "all")):
        if film in results:
            found += [_cuts(results[film][setting], about, group, setting) for setting in ("released", "10%")]
    small = [setting for setting in ("10%", "20%") if setting in everything]
    found += [_small(everything[setting], "drawn and real clips", setting) for setting in small]
    if STATIC in results:
        found.append(_small(results[STATIC]["10%"], "people in a static view (vtest.avi)", "10%"))
    return [claim for claim in found if claim is not None]


def _recall(result: dict, group: str) -> float:
    return result["changes"][group]["recall"]


def _against_all(measures: dict[str, dict], setting: str) -> Claim | None:
    names = [name for name in (RELEASED, *RIVALS) if name in measures]
    if DEFAULT not in measures or not names or "all" not in measures[DEFAULT]["changes"]:
        return None
    own = _recall(measures[DEFAULT], "all")
    others = {name: _recall(measures[name], "all") for name in names}
    shown = ", ".join(f"{name} {value:.0%}" for name, value in others.items())
    return Claim(
        f"recall of changes, {SETTINGS[setting]}, held-out clips",
        f"above {', '.join(names)}",
        f"{DEFAULT} {own:.0%}; {shown}",
        _times(own, others.get(RELEASED)),
        own > max(others.values()),
    )


def _cuts(measures: dict[str, dict], about: str, group: str, setting: str) -> Claim | None:
    if not {DEFAULT, RELEASED} <= set(measures):
        return None
    own, theirs = (measures[name]["changes"][group] for name in (DEFAULT, RELEASED))
    spent = f"{measures[DEFAULT]['slow']} and {measures[RELEASED]['slow']} slow frames"
    return Claim(
        f"recall of cuts in ten minutes of animation{about}, {SETTINGS[setting]}",
        "≥ 2 × the release's",
        f"{own['seen']} of {own['of']} against {theirs['seen']} ({spent})",
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
        f"{own['seen']} of {own['of']} against {theirs['seen']} ({spent})",
        _times(own["recall"], theirs["recall"]),
        own["seen"] > theirs["seen"],
    )


def _times(own: float, theirs: float | None) -> str:
    return f"{own / theirs:.2f} ×" if theirs else ""


def tables(results: Results, groups: Iterable[str]) -> list[Table]:
    """Recall by kind of change at every setting, by kind of clip at two, and of the film with continuity."""
    found = []
    if "all" in results:
        found.append(_by_change(results["all"], groups))
    found += [_by_clip(results, setting) for setting in ("released", "10%")]
    if CONTINUITY in results:
        found.append(_by_cut(results[CONTINUITY]))
    return found


def _by_change(settings: dict[str, dict[str, dict]], groups: Iterable[str]) -> Table:
    judged = [result for measures in settings.values() for result in measures.values()]
    shown = ["all", *(group for group in groups if any(group in result["changes"] for result in judged))]
    rows = []
    for setting, measures in settings.items():
        for name, result in measures.items():
            cells = [f"{_recall(result, g):.0%}" if g in result["changes"] else "–" for g in shown]
            wasted = "–" if result["wasted"] is None else f"{result['wasted']:.0%}"
            rows.append((setting, name, f"{result['share']:.1%}", *cells, wasted))
    return Table("Recall by kind of change", ("setting", "measure", "slow", *shown, "wasted"), rows)


def _by_clip(results: Results, setting: str) -> Table:
    names: list[str] = []
    rows = []
    for kind, settings in results.items():
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
            cells = [f"{count['seen']} of {count['of']}" for count in counts]
            rows.append((setting, name, result["slow"], f"{counts[0]['recall']:.0%}", *cells))
    columns = ("setting", "measure", "slow frames", "recall", "cuts seen", "within a scene", "to another scene")
    return Table("Cuts of the film with continuity", columns, rows)
