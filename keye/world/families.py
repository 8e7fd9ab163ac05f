"""The task families: each draws a clip or a still and asks a question with a known answer.

A family is a function `(rng, setting, target, index) -> Draft`. `target` is the answer class of the sample; `deal`
assigns classes round-robin, so that all classes are equally frequent. The phrasing does not depend on the target: a
model that sees only the question stays at chance.
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
FLASH = 260
"""Increase of red + green + blue by the strongest flash. It is less than this sum of the darkest colour of `count`."""


def code_text(rng: np.random.Generator, difficulty: float) -> str:
    """A code of 1 (easy) to 4 digits."""
    length = 1 + sum(difficulty >= step for step in (0.25, 0.5, 0.75))
    return "".join(str(digit) for digit in rng.integers(0, 10, length))


def _object_size(setting: Setting, rng: np.random.Generator) -> int:
    """Side of an object in pixels: about half of the frame when easy, a fifth when hard."""
    return int(min(setting.size) * (0.52 - 0.3 * setting.difficulty) * rng.uniform(0.9, 1.1))


def _any_size(setting: Setting, rng: np.random.Generator, scale: float) -> int:
    """Side in pixels of an object whose colour is the answer: random, so that the change does not give it away."""
    return min(int(_object_size(setting, rng) * scale * rng.uniform(0.7, 1.3)), min(setting.size) * 9 // 10)


def _somewhere(rng: np.random.Generator, setting: Setting, side: int) -> tuple[int, int]:
    """Random (top, left) of a box of `side` pixels inside the frame."""
    height, width = setting.size
    return int(rng.integers(0, height - side + 1)), int(rng.integers(0, width - side + 1))


def _film(setting: Setting, draw: Callable[[int], np.ndarray], backdrop: Backdrop, **fields: Any) -> Draft:
    fields["meta"] = {"backdrop": backdrop.name, "pan": backdrop.travel > 0, **fields["meta"]}
    return Draft(draw=draw, frames=setting.frames, fps=setting.fps, **fields)


def read(rng: np.random.Generator, setting: Setting, target: str | None, index: int) -> Draft:
    """A card with a code is shown for 1 to 2 seconds between two scenes."""
    code = code_text(rng, setting.difficulty)
    before, after = Backdrop(rng, setting), Backdrop(rng, setting)
    length = int(rng.integers(2, 5))
    first = int(rng.integers(0, setting.cells - length + 1))
    # With one size of cards, the area without ink reveals the digit.
    picture, box = _card_picture(rng, setting, code, after, scale=rng.uniform(0.8, 1))

    def draw(frame: int) -> np.ndarray:
        cell = setting.cell(frame)
        if first <= cell < first + length:
            return picture
        return (before if cell < first else after).frame(frame)

    meta = {"events": [event("card", first, first + length)], "box": box}
    return _film(setting, draw, before, question=ask(rng, "read"), answer=code, meta=meta)


def _card_picture(
    rng: np.random.Generator, setting: Setting, code: str, backdrop: Backdrop, scale: float = 1.0
) -> tuple[np.ndarray, list[int]]:
    """A frame with a card on it, and the card's pixel box [left, top, right, bottom]; easy cards fill the frame.

    scale: shrinks the card about its centre.
    """
    height, width = setting.size
    share = 1 - 0.45 * setting.difficulty
    room = (int(height * share), int(width * share))
    size = (int(room[0] * scale), int(room[1] * scale))
    top = int(rng.integers(0, height - room[0] + 1)) + (room[0] - size[0]) // 2
    left = int(rng.integers(0, width - room[1] + 1)) + (room[1] - size[1]) // 2
    ink = int(20 + 70 * setting.difficulty * rng.random())
    picture = backdrop.frame(0)
    picture[top : top + size[0], left : left + size[1]] = card(size, code, (ink,) * 3, (245, 245, 240))
    return picture, [left, top, left + size[1], top + size[0]]


def count_classes(setting: Setting) -> list[str]:
    """1 … 6, or fewer if a short clip has no room for one more flash with a pause between any two."""
    return [str(n + 1) for n in range(min(MAX_COUNT, setting.cells // 2 - 1))]


def count(rng: np.random.Generator, setting: Setting, target: str | None, index: int) -> Draft:
    """Two dim objects flash for half a second each, never both at a time; the question names one colour.

    There is a pause after every flash. The total number of flashes is one more than the largest answer, and the
    strength of every flash has the same distribution for both objects. So the number and size of the changes do not
    depend on the answer; only the colours do.
    """
    wanted, total = int(target or 1), len(count_classes(setting)) + 1
    backdrop = Backdrop(rng, setting)
    # White cannot flash as weakly as the darker colours.
    names = [str(name) for name in rng.permutation([name for name in COLOURS if name != "white"])[:2]]
    shape = pick(rng, SHAPES)
    # k of (free - k + 1) places, each moved by one more than the last: every non-adjacent choice is equally likely.
    places = rng.choice(setting.cells - 1 - (total - 1), total, replace=False)
    cells = rng.permutation([int(place) + 1 + step for step, place in enumerate(sorted(places))]).tolist()
    flashes = dict.fromkeys(cells[:wanted], 0) | dict.fromkeys(cells[wanted:], 1)
    strength = dict(zip(cells, rng.uniform(0.75, 1, total) * FLASH, strict=True))
    side, spots = _two_spots(rng, setting)

    def draw(frame: int) -> np.ndarray:
        cell = setting.cell(frame)
        picture, lit = backdrop.frame(frame), flashes.get(cell)
        for which, (name, spot) in enumerate(zip(names, spots, strict=True)):
            less = FLASH - (strength[cell] if lit == which else 0)
            paint(picture, shape, _darker(COLOURS[name], less), *spot, side)
        return picture

    boxes = [[left, top, left + side, top + side] for top, left in spots]
    events = [event("flash", c, c + 1, colour=names[flashes[c]]) for c in sorted(flashes)]
    meta = {"events": events, "colour": names[0], "box": boxes[0], "other_box": boxes[1], "shape": shape}
    question, options = ask(rng, "count", names[0]), count_classes(setting)
    return _film(setting, draw, backdrop, question=question, answer=str(wanted), options=options, meta=meta)


def _darker(colour: tuple[int, int, int], less: float) -> tuple[int, int, int]:
    """A colour of the same hue whose sum of red, green and blue is smaller by `less`."""
    share = 1 - less / sum(colour)
    return tuple(round(value * share) for value in colour)


def _two_spots(rng: np.random.Generator, setting: Setting) -> tuple[int, list[tuple[int, int]]]:
    """A side in pixels and the (top, left) of two boxes of that side, half a frame apart, in random order.

    They have the same position relative to any grid of patches that divides half a frame, so that equal changes of
    either give the same similarity.
    """
    height, width = setting.size
    side = min(_object_size(setting, rng), width // 2)
    top, left = int(rng.integers(0, height - side + 1)), int(rng.integers(0, width // 2 - side + 1))
    return side, [(top, left + half * (width // 2)) for half in rng.permutation(2).tolist()]


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
    shape = pick(rng, SHAPES)
    sides = [_any_size(setting, rng, 1.2) for _ in shown]
    spots = [_somewhere(rng, setting, side) for side in sides]

    def draw(frame: int) -> np.ndarray:
        picture = backdrop.frame(frame)
        for name, start, spot, side in zip(shown, starts, spots, sides, strict=True):
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
    """The frame (hard: one object) has another colour every half second; when is it white? Tolerance half a second.

    Every cell has a change, so every frame is slow; only the colours give the answer.
    """
    cell = round(float(target or CELL) / CELL)
    backdrop = Backdrop(rng, setting, pan=True)
    full_frame = setting.difficulty < 0.5
    side, shape = _object_size(setting, rng), pick(rng, SHAPES)
    top, left = _somewhere(rng, setting, side)
    names = _changing_colours(rng, setting.cells)
    names[cell] = "white"

    def draw(frame: int) -> np.ndarray:
        picture, colour = backdrop.frame(frame), COLOURS[names[setting.cell(frame)]]
        if full_frame:
            return backdrop.grained(np.maximum(picture, np.array(colour, np.uint8)), frame)
        paint(picture, shape, colour, top, left, side)
        return picture

    meta = {"events": [event("flash", cell, cell + 1, colour="white")], "colours": names}
    meta["box"] = [0, 0, *setting.size[::-1]] if full_frame else [left, top, left + side, top + side]
    return _film(setting, draw, backdrop, question=ask(rng, "when"), answer=seconds(cell), tolerance=CELL, meta=meta)


def _changing_colours(rng: np.random.Generator, count: int) -> list[str]:
    """`count` colour names without white; any three in a row differ, so that white can replace any of them."""
    names: list[str] = []
    for _ in range(count):
        names.append(pick(rng, [name for name in COLOURS if name != "white" and name not in names[-2:]]))
    return names


def motion(rng: np.random.Generator, setting: Setting, target: str | None, index: int) -> Draft:
    """One object moves steadily left, right, up or down while others (hard) stand still.

    Easy paths cross the frame, so that their ends give the answer; hard paths cover a third of it from anywhere.
    """
    backdrop = Backdrop(rng, setting)
    # A triangle changes fewer pixels when it moves along its base than when it moves across it.
    even = [shape for shape in SHAPES if shape != "triangle"]
    side, shape, name = _object_size(setting, rng), pick(rng, even), pick(rng, list(COLOURS))
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
    side, shape = _any_size(setting, rng, 1.5), pick(rng, SHAPES)
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
    """The box of a coloured shape in integers of [0, 1000); easy boxes are on a grid of eighths of the frame."""
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
    # The shape is square even if the frame is not; the box is the area that it covers.
    side = round(cells / steps * min(height, width))
    top, left = round(row / steps * height), round(column / steps * width)
    paint(picture, shape, COLOURS[name], top, left, side)
    box = [left / width, top / height, (left + side) / width, (top + side) / height]
    thousandths = [min(999, round(value * 1000)) for value in box]
    question = ask(rng, "image_ground", f"{name} {shape}")
    meta = {"box": [left, top, left + side, top + side], "colour": name, "shape": shape}
    return _still(picture, question=question, answer=str(thousandths), meta=meta)


def image_place(rng: np.random.Generator, setting: Setting, target: str | None, index: int) -> Draft:
    """The corner of one shape among 1 (easy) to 4 (hard) shapes in different corners."""
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
    """Stills (even samples) and clips (odd samples) with a sentence that describes them."""
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
    """The answer class of sample `index`, in shuffled rounds: counts of classes differ by at most one."""
    if family not in _CLASSES:
        return None
    classes = _CLASSES[family](setting)
    turn, place = divmod(index, len(classes))
    # The checksum gives every family its own rounds.
    rounds = np.random.default_rng([seed, turn, zlib.crc32(family.encode())])
    return classes[int(rounds.permutation(len(classes))[place])]
