"""The task families: each draws a clip or a still and asks something whose answer it knows.

A family is a function `(rng, setting, target, index) -> Draft`. `target` is the answer class the sample must have; it
is dealt round-robin (`deal`), so that every class is as frequent as the others. The phrasing is chosen without looking
at the target: a model that sees only the question is left at chance.
"""

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from keye.world.draft import Draft, ask, event, pick, seconds
from keye.world.scene import CELL, COLOURS, SHAPES, Backdrop, Setting, card, paint
from keye.world.words import DIRECTIONS, text

PLACES = ("top left", "top right", "bottom left", "bottom right")
MAX_COUNT = 6


def code_text(rng: np.random.Generator, difficulty: float) -> str:
    """A code of 1 (easy) to 4 digits."""
    length = 1 + sum(difficulty >= step for step in (0.25, 0.5, 0.75))
    return "".join(str(digit) for digit in rng.integers(0, 10, length))


def _object_size(setting: Setting, rng: np.random.Generator) -> int:
    """Side of an object in pixels: about half of the frame when easy, a fifth when hard."""
    return int(min(setting.size) * (0.52 - 0.3 * setting.difficulty) * rng.uniform(0.9, 1.1))


def _somewhere(rng: np.random.Generator, setting: Setting, side: int) -> tuple[int, int]:
    """(top, left) of a box of `side` pixels that lies inside the frame."""
    height, width = setting.size
    return int(rng.integers(0, height - side + 1)), int(rng.integers(0, width - side + 1))


def _film(setting: Setting, draw: Callable[[int], np.ndarray], backdrop: Backdrop, **fields: Any) -> Draft:
    fields["meta"] = {"backdrop": backdrop.name, "pan": backdrop.travel > 0, **fields["meta"]}
    return Draft(draw=draw, frames=setting.frames, fps=setting.fps, **fields)


def read(rng: np.random.Generator, setting: Setting, target: str | None, index: int) -> Draft:
    """A card with a code is cut in for 1 to 2 seconds between two scenes."""
    code = code_text(rng, setting.difficulty)
    before, after = Backdrop(rng, setting), Backdrop(rng, setting)
    length = int(rng.integers(2, 5))
    first = int(rng.integers(0, setting.cells - length + 1))
    picture, box = _card_picture(rng, setting, code, after)

    def draw(frame: int) -> np.ndarray:
        cell = setting.cell(frame)
        if first <= cell < first + length:
            return picture
        return (before if cell < first else after).frame(frame)

    meta = {"events": [event("card", first, first + length)], "box": box}
    return _film(setting, draw, before, question=ask(rng, "read"), answer=code, meta=meta)


def _card_picture(
    rng: np.random.Generator, setting: Setting, code: str, backdrop: Backdrop
) -> tuple[np.ndarray, list[int]]:
    """A frame with a card on it, and the card's pixel box [left, top, right, bottom]; easy cards fill the frame."""
    height, width = setting.size
    share = 1 - 0.45 * setting.difficulty
    size = (int(height * share), int(width * share))
    top, left = int(rng.integers(0, height - size[0] + 1)), int(rng.integers(0, width - size[1] + 1))
    ink = int(20 + 70 * setting.difficulty * rng.random())
    picture = backdrop.frame(0)
    picture[top : top + size[0], left : left + size[1]] = card(size, code, (ink,) * 3, (245, 245, 240))
    return picture, [left, top, left + size[1], top + size[0]]


def count_classes(setting: Setting) -> list[str]:
    """1 … 6, or fewer where a short clip has no room for one flash more with a pause between any two."""
    return [str(n + 1) for n in range(min(MAX_COUNT, setting.cells // 2 - 1))]


def count(rng: np.random.Generator, setting: Setting, target: str | None, index: int) -> Draft:
    """Two dim objects flash, half a second each, never both and never in two cells running; one colour is asked for.

    All flashes together are always one more than the largest answer. How often the picture changes, and so which frames
    are slow, is the same for every answer: only the colours tell.
    """
    wanted, total = int(target or 1), len(count_classes(setting)) + 1
    backdrop = Backdrop(rng, setting)
    names, shape = [str(name) for name in rng.permutation(list(COLOURS))[:2]], pick(rng, SHAPES)
    # Choosing k of (free - k + 1) places and spreading them by one each gives every non-adjacent choice alike.
    places = rng.choice(setting.cells - 1 - (total - 1), total, replace=False)
    cells = rng.permutation([int(place) + 1 + step for step, place in enumerate(sorted(places))]).tolist()
    flashes = dict.fromkeys(cells[:wanted], 0) | dict.fromkeys(cells[wanted:], 1)
    side, spots = _two_spots(rng, setting)

    def draw(frame: int) -> np.ndarray:
        picture, lit = backdrop.frame(frame), flashes.get(setting.cell(frame))
        for which, (name, spot) in enumerate(zip(names, spots, strict=True)):
            dim = tuple(int(value * 0.25) for value in COLOURS[name])
            paint(picture, shape, COLOURS[name] if lit == which else dim, *spot, side)
        return picture

    boxes = [[left, top, left + side, top + side] for top, left in spots]
    events = [event("flash", c, c + 1, colour=names[flashes[c]]) for c in sorted(flashes)]
    meta = {"events": events, "colour": names[0], "box": boxes[0], "other_box": boxes[1], "shape": shape}
    question, options = ask(rng, "count", names[0]), count_classes(setting)
    return _film(setting, draw, backdrop, question=question, answer=str(wanted), options=options, meta=meta)


def _two_spots(rng: np.random.Generator, setting: Setting) -> tuple[int, list[tuple[int, int]]]:
    """A side in pixels and the (top, left) of two boxes of that side that do not overlap, in random order."""
    height, width = setting.size
    side = min(_object_size(setting, rng), width // 2)
    lefts = [int(rng.integers(0, width // 2 - side + 1)) + half * (width // 2) for half in rng.permutation(2).tolist()]
    return side, [(int(rng.integers(0, height - side + 1)), left) for left in lefts]


def order(rng: np.random.Generator, setting: Setting, target: str | None, index: int) -> Draft:
    """Two (hard: three) coloured shapes appear one after the other; which came first (hard: or last)?"""
    hard = setting.difficulty >= 0.5
    names = [str(name) for name in rng.permutation([name for name in COLOURS if name != target])[: 2 if hard else 1]]
    last = hard and rng.random() < 0.5
    shown = [*names, target] if last else [target, *names]
    backdrop = Backdrop(rng, setting, pan=True)
    number = len(shown)
    length = max(1, min(3, (setting.cells - 1) // number - 1))
    slack = setting.cells - 1 - number * (length + 1) + 1
    starts = 1 + np.sort(rng.integers(0, slack + 1, number)) + np.arange(number) * (length + 1)
    side, shape = int(_object_size(setting, rng) * 1.2), pick(rng, SHAPES)
    spots = [_somewhere(rng, setting, side) for _ in shown]

    def draw(frame: int) -> np.ndarray:
        picture = backdrop.frame(frame)
        for name, start, spot in zip(shown, starts, spots, strict=True):
            if start <= setting.cell(frame) < start + length:
                paint(picture, shape, COLOURS[name], *spot, side)
        return picture

    options = [str(name) for name in rng.permutation(shown)]
    events = [event("appear", int(s), int(s) + length, colour=n) for n, s in zip(shown, starts, strict=True)]
    words = ", ".join(options[:-1]) + " or " + options[-1]
    question = ask(rng, "order_last" if last else "order", words)
    meta = {"events": events, "shape": shape}
    return _film(setting, draw, backdrop, question=question, answer=str(target), options=options, meta=meta)


def when_classes(setting: Setting) -> list[str]:
    """Every cell but the first, in seconds."""
    return [seconds(cell) for cell in range(1, setting.cells)]


def when(rng: np.random.Generator, setting: Setting, target: str | None, index: int) -> Draft:
    """The frame (hard: one object) has another colour every half second; when is it white? Right to half a second.

    Something changes in every cell, so every frame is slow: only the colours tell which one is asked for.
    """
    cell = round(float(target or CELL) / CELL)
    backdrop = Backdrop(rng, setting, pan=True)
    whole = setting.difficulty < 0.5
    side, shape = _object_size(setting, rng), pick(rng, SHAPES)
    top, left = _somewhere(rng, setting, side)
    names = _changing_colours(rng, setting.cells)
    names[cell] = "white"

    def draw(frame: int) -> np.ndarray:
        picture, colour = backdrop.frame(frame), COLOURS[names[setting.cell(frame)]]
        if whole:
            return np.maximum(picture, np.array(colour, np.uint8))
        paint(picture, shape, colour, top, left, side)
        return picture

    meta = {"events": [event("flash", cell, cell + 1, colour="white")], "colours": names}
    meta["box"] = [0, 0, *setting.size[::-1]] if whole else [left, top, left + side, top + side]
    return _film(setting, draw, backdrop, question=ask(rng, "when"), answer=seconds(cell), tolerance=CELL, meta=meta)


def _changing_colours(rng: np.random.Generator, count: int) -> list[str]:
    """`count` names of colours other than white; any three in a row differ, so that any one of them may be replaced."""
    names: list[str] = []
    for _ in range(count):
        names.append(pick(rng, [name for name in COLOURS if name != "white" and name not in names[-2:]]))
    return names


def motion(rng: np.random.Generator, setting: Setting, target: str | None, index: int) -> Draft:
    """One object moves steadily left, right, up or down while others (hard) stand still.

    Easy paths cross the frame, so that where it begins and ends already tells; hard ones cover a third from anywhere.
    """
    backdrop = Backdrop(rng, setting)
    side, shape, name = _object_size(setting, rng), pick(rng, SHAPES), pick(rng, list(COLOURS))
    others = [name_ for name_ in COLOURS if name_ != name]
    still = [(pick(rng, SHAPES), pick(rng, others), *_somewhere(rng, setting, side // 2))
             for _ in range(int(3 * setting.difficulty))]  # fmt: skip
    axis = 1 if target in ("left", "right") else 0
    room = setting.size[axis] - side
    path = room * (0.95 - 0.55 * setting.difficulty)
    begin = rng.uniform(0, room - path)
    cross = int(rng.integers(0, setting.size[1 - axis] - side + 1))

    def spot(frame: int) -> tuple[int, int]:
        share = frame / (setting.frames - 1)
        along = round(begin + path * (share if target in ("right", "down") else 1 - share))
        return (cross, along) if axis else (along, cross)

    def draw(frame: int) -> np.ndarray:
        picture = backdrop.frame(frame)
        for shape_, name_, top, left in still:
            paint(picture, shape_, COLOURS[name_], top, left, side // 2)
        paint(picture, shape, COLOURS[name], *spot(frame), side)
        return picture

    meta = {"colour": name, "shape": shape, "side": side, "from": spot(0), "to": spot(setting.frames - 1)}
    question = ask(rng, "motion")
    return _film(setting, draw, backdrop, question=question, answer=str(target), options=list(DIRECTIONS), meta=meta)


def find(rng: np.random.Generator, setting: Setting, target: str | None, index: int) -> Draft:
    """One half-second flash of colour somewhere in a clip twice as long, with cuts between scenes when hard."""
    setting = Setting(setting.size, setting.duration * 2, setting.fps, setting.difficulty)
    scenes = [Backdrop(rng, setting, pan=True) for _ in range(1 + int(3 * setting.difficulty))]
    cell = int(rng.integers(1, setting.cells))
    side, shape = int(_object_size(setting, rng) * 1.5), pick(rng, SHAPES)
    top, left = _somewhere(rng, setting, side)

    def draw(frame: int) -> np.ndarray:
        picture = scenes[frame * len(scenes) // setting.frames].frame(frame)
        if setting.cell(frame) == cell:
            paint(picture, shape, COLOURS[str(target)], top, left, side)
        return picture

    box = [left, top, left + side, top + side]
    meta = {"events": [event("flash", cell, cell + 1, colour=target)], "box": box, "shape": shape}
    return _film(
        setting, draw, scenes[0], question=ask(rng, "find"), answer=str(target), options=list(COLOURS), meta=meta
    )


def _still(picture: np.ndarray, **fields: Any) -> Draft:
    return Draft(draw=lambda _: picture, still=True, **fields)


def image_read(rng: np.random.Generator, setting: Setting, target: str | None, index: int) -> Draft:
    """A still of a card with a code."""
    code = code_text(rng, setting.difficulty)
    picture, box = _card_picture(rng, setting, code, Backdrop(rng, setting))
    return _still(picture, question=ask(rng, "image_read"), answer=code, meta={"box": box})


def image_ground(rng: np.random.Generator, setting: Setting, target: str | None, index: int) -> Draft:
    """The box of a coloured shape in [0, 1000) integers; easy boxes lie on a grid of eighths of the frame."""
    height, width = setting.size
    backdrop = Backdrop(rng, setting)
    steps = 8 if setting.difficulty < 0.5 else 100
    cells = round(steps * (0.5 - 0.25 * setting.difficulty) * rng.uniform(0.8, 1.2))
    picture = backdrop.frame(0)
    names = [str(name) for name in rng.permutation(list(COLOURS))]
    shape, name = pick(rng, SHAPES), names[0]
    for other in names[1 : 1 + int(3 * setting.difficulty)]:
        small = max(6, cells * min(height, width) // steps // 3)
        paint(picture, pick(rng, SHAPES), COLOURS[other], *_somewhere(rng, setting, small), small)
    row, column = (int(value) for value in rng.integers(0, steps - cells + 1, 2))
    # The frame may not be square: the shape is drawn square, its box is what is really covered.
    side = round(cells / steps * min(height, width))
    top, left = round(row / steps * height), round(column / steps * width)
    paint(picture, shape, COLOURS[name], top, left, side)
    box = [left / width, top / height, (left + side) / width, (top + side) / height]
    thousandths = [min(999, round(value * 1000)) for value in box]
    question = ask(rng, "image_ground", f"{name} {shape}")
    meta = {"box": [left, top, left + side, top + side], "colour": name, "shape": shape}
    return _still(picture, question=question, answer=str(thousandths), meta=meta)


def image_place(rng: np.random.Generator, setting: Setting, target: str | None, index: int) -> Draft:
    """Which corner holds the shape asked for, among 1 (easy) to 4 (hard) shapes in different corners."""
    picture, things = _corners(rng, setting, 1 + int(3 * setting.difficulty + 0.5), str(target))
    name, shape, _ = things[0]
    question = ask(rng, "image_place", f"{name} {shape}")
    meta = {"things": [" ".join(thing) for thing in things]}
    return _still(picture, question=question, answer=str(target), options=list(PLACES), meta=meta)


def _corners(
    rng: np.random.Generator, setting: Setting, number: int, first: str
) -> tuple[np.ndarray, list[tuple[str, str, str]]]:
    """A still with shapes of different colours in different corners, the first at `first`: (colour, shape, place)."""
    height, width = setting.size
    picture = Backdrop(rng, setting).frame(0)
    places = [first, *(str(place) for place in rng.permutation([p for p in PLACES if p != first]))][:number]
    things = []
    for name, place in zip(rng.permutation(list(COLOURS)), places, strict=False):
        side = int(min(height, width) * rng.uniform(0.3, 0.46))
        top = int(rng.uniform(0, height / 2 - side)) + (height // 2 if "bottom" in place else 0)
        left = int(rng.uniform(0, width / 2 - side)) + (width // 2 if "right" in place else 0)
        things.append((str(name), pick(rng, SHAPES), place))
        paint(picture, things[-1][1], COLOURS[str(name)], top, left, side)
    return picture, things


def caption(rng: np.random.Generator, setting: Setting, target: str | None, index: int) -> Draft:
    """Stills (even samples) and clips (odd ones) with a sentence that says what they show."""
    question = ask(rng, "caption_video" if index % 2 else "caption_image")
    draft = _caption_video(rng, setting) if index % 2 else _caption_image(rng, setting)
    draft.question, draft.options, draft.tolerance = question, None, None
    return draft


def _caption_image(rng: np.random.Generator, setting: Setting) -> Draft:
    if rng.random() < 0.25:
        draft = image_read(rng, setting, None, 0)
        draft.answer = f"A card says {draft.answer}."
        return draft
    picture, things = _corners(rng, setting, int(rng.integers(1, 3)), pick(rng, PLACES))
    words = [f"a {name} {shape} at the {place}" for name, shape, place in things]
    text = " and ".join(words)
    return _still(picture, question="", answer=f"{text[0].upper()}{text[1:]}.", meta={"things": words})


def _caption_video(rng: np.random.Generator, setting: Setting) -> Draft:
    kind = pick(rng, ("read", "count", "order", "when", "motion"))
    target = deal(kind, setting, int(rng.integers(1 << 31)), 0)
    draft = FAMILIES[kind](rng, setting, target, 0)
    happened = [item.get("colour") for item in draft.meta.get("events", [])]
    if kind == "read":
        draft.answer = f"A card says {draft.answer}."
    elif kind == "count":
        colour = draft.meta["colour"]
        draft.answer = f"A {colour} {draft.meta['shape']} flashes {_times(happened.count(colour))}."
    elif kind == "order":
        draft.answer = "A " + ", then a ".join(f"{name} {draft.meta['shape']}" for name in happened) + "."
    elif kind == "when":
        draft.answer = f"It is white at {draft.answer} seconds."
    else:
        draft.answer = f"A {draft.meta['colour']} {draft.meta['shape']} moves {draft.answer}."
    draft.meta["kind"] = kind
    return draft


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number} times"


FAMILIES: dict[str, Callable[..., Draft]] = {
    "read": read, "count": count, "order": order, "when": when, "motion": motion, "find": find,
    "image_read": image_read, "image_ground": image_ground, "image_place": image_place,
    "caption": caption, "text": text,
}  # fmt: skip
_CLASSES: dict[str, Callable[[Setting], list[str]]] = {
    "count": count_classes,
    "order": lambda _: list(COLOURS),
    "when": when_classes,
    "motion": lambda _: list(DIRECTIONS),
    "find": lambda _: list(COLOURS),
    "image_place": lambda _: list(PLACES),
}


def deal(family: str, setting: Setting, seed: int, index: int) -> str | None:
    """The answer class of sample `index`: classes are dealt in shuffled rounds, so counts differ by at most one."""
    if family not in _CLASSES:
        return None
    classes = _CLASSES[family](setting)
    turn, place = divmod(index, len(classes))
    # The family's checksum keeps the rounds of different families apart.
    rounds = np.random.default_rng([seed, turn, zlib.crc32(family.encode())])
    return classes[int(rounds.permutation(len(classes))[place])]
