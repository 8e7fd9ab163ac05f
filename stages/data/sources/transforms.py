"""Transforms: augmentations of a row in the chat form, with a random generator for each sample.

`[[data.sources]] transforms = ["objects", "caption_first"]` applies them in this order. A transform that does not apply
returns the row unchanged. Those that need other samples (`which_image`, `nth_image`, `trap`) need a map-style source.
Report, section on pre-training data: captions before and after their questions, queries about one of many images, trap
questions, coordinates as integers in [0, 1000).
"""

import random
from collections.abc import Callable

from keye.errors import ManifestError
from stages.data.sources.chat import Row, caption_of, describe

Pick = Callable[[], Row]
Transform = Callable[[Row, random.Random, Pick], Row]

MANY = (6, 24)  # images of a query about one of them: "dozens", within a context of 8,192 tokens
TRIES = 20  # other samples tried for each one needed
WHERE = ("Where is the {}? Give its box.", "Give the box of the {}.", "Box of the {}?")
WHERE_ALL = ("Where are the {}? Give their boxes.", "Give the boxes of all {}.")
COUNT = ("How many {} are there?", "Count the {}.")
ABSENT = ("There is no {} in it.", "It shows no {}.")


def caption_first(row: Row, chance: random.Random, pick: Pick) -> Row:
    """Media, caption, [eos], question, answer: the caption becomes the chat's first turn."""
    if not _captioned(row):
        return row
    media, rest = _apart(row["messages"])
    request = [*media, {"type": "text", "text": describe(media)}]
    return {**row, "messages": [_user(request), _assistant(row["caption"]), *rest]}


def caption_last(row: Row, chance: random.Random, pick: Pick) -> Row:
    """Media, question, answer, [eos], caption: the caption becomes the chat's last turn."""
    if not _captioned(row):
        return row
    media, _ = _apart(row["messages"])
    return {**row, "messages": [*row["messages"], _user(describe(media)), _assistant(row["caption"])]}


def caption_either(row: Row, chance: random.Random, pick: Pick) -> Row:
    """`caption_first` or `caption_last`, each for half of the samples."""
    return (caption_first if chance.random() < 0.5 else caption_last)(row, chance, pick)


def objects(row: Row, chance: random.Random, pick: Pick) -> Row:
    """Grounding and counting: a question about the place of each label of the row's `objects`, and one about a count.

    They follow the chat's own turns.
    """
    boxes = _boxes(row)
    if not boxes:
        return row
    turns: list[Row] = []
    for label, found in boxes.items():
        forms = WHERE if len(found) == 1 else WHERE_ALL
        answer = str(found[0]) if len(found) == 1 else str(found)
        turns += [_user(chance.choice(forms).format(label)), _assistant(answer)]
    label = chance.choice(sorted(boxes))
    turns += [_user(chance.choice(COUNT).format(label)), _assistant(str(len(boxes[label])))]
    return {**row, "messages": [*row["messages"], *turns]}


def trap(row: Row, chance: random.Random, pick: Pick) -> Row:
    """A question about an object of another sample that this one does not have; the answer says so."""
    mine = _boxes(row)
    if not mine:
        return row
    for _ in range(TRIES):
        absent = sorted(set(_boxes(pick())) - set(mine))
        if absent:
            label = chance.choice(absent)
            question, answer = chance.choice((*WHERE, *COUNT)).format(label), chance.choice(ABSENT).format(label)
            return {**row, "messages": [*row["messages"], _user(question), _assistant(answer)]}
    return row


def which_image(row: Row, chance: random.Random, pick: Pick) -> Row:
    """Many captioned images and the caption of one of them; the answer is its number, from 1."""
    shown = _gallery(row, chance, pick)
    if shown is None:
        return row
    captions, parts, mine = shown
    question = f"Which of these {len(captions)} images shows this: {captions[mine]} Answer with its number."
    return _with_question(row, parts, question, str(mine + 1), captions[mine])


def nth_image(row: Row, chance: random.Random, pick: Pick) -> Row:
    """Many captioned images and a request to describe one; in one of eight samples the image does not exist."""
    shown = _gallery(row, chance, pick)
    if shown is None:
        return row
    captions, parts, mine = shown
    if chance.random() < 1 / 8:
        number = len(captions) + chance.randint(1, 10)
        answer = f"There are only {len(captions)} images."
        return _with_question(row, parts, f"Describe image {number}.", answer, captions[mine])
    return _with_question(row, parts, f"Describe image {mine + 1}.", captions[mine], captions[mine])


TRANSFORMS: dict[str, Transform] = {
    f.__name__: f for f in (caption_first, caption_last, caption_either, objects, trap, which_image, nth_image)
}
NEED_OTHERS = ("trap", "which_image", "nth_image")


def apply(names: tuple[str, ...], row: Row, chance: random.Random, pick: Pick) -> Row:
    """The row after these transforms."""
    for name in names:
        row = TRANSFORMS[name](row, chance, pick)
    return row


def _user(content: str | list[Row]) -> Row:
    return {"role": "user", "content": content}


def _assistant(text: str) -> Row:
    return {"role": "assistant", "content": text}


def _with_question(row: Row, parts: list[Row], question: str, answer: str, caption: str) -> Row:
    chat = [_user([*parts, {"type": "text", "text": question}]), _assistant(answer)]
    rest = {name: value for name, value in row.items() if name not in ("objects", "size")}
    return {**rest, "messages": chat, "caption": caption}


def _captioned(row: Row) -> bool:
    """Whether the row has a caption, media, and a chat that is not just that caption."""
    caption = row.get("caption")
    return bool(caption) and caption_of(row["messages"]) != caption and bool(_apart(row["messages"])[0])


def _apart(messages: list[Row]) -> tuple[list[Row], list[Row]]:
    """The media of a chat, and the chat without them."""
    media: list[Row] = []
    rest = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            media += [part for part in content if part["type"] != "text"]
            content = "".join(part["text"] for part in content if part["type"] == "text")
        rest.append({**message, "content": content})
    return media, rest


def _gallery(row: Row, chance: random.Random, pick: Pick) -> tuple[list[str], list[Row], int] | None:
    """Captions, numbered images as parts, and the place of the row's own; None without a second caption."""
    own = _picture(row)
    if own is None:
        return None
    caption, part = own
    shown, wanted = {caption: part}, chance.randint(*MANY)
    for _ in range(TRIES * wanted):
        if len(shown) == wanted:
            break
        other = _picture(pick())
        if other is not None:
            shown.setdefault(*other)  # two images of one caption would be ambiguous
    if len(shown) == 1:
        return None
    captions = list(shown)
    chance.shuffle(captions)
    parts: list[Row] = []
    for number, text in enumerate(captions, start=1):
        parts += [{"type": "text", "text": f"Image {number}: "}, shown[text], {"type": "text", "text": "\n"}]
    return captions, parts, captions.index(caption)


def _picture(row: Row) -> tuple[str, Row] | None:
    """Caption and part of a row with one image; without a caption a single answer serves as one."""
    media, _ = _apart(row["messages"])
    if len(media) != 1 or media[0]["type"] != "image":
        return None
    answers = [message for message in row["messages"] if message["role"] == "assistant"]
    caption = row.get("caption") or (caption_of(answers) if len(answers) == 1 else "")
    return (caption, media[0]) if caption else None


def _boxes(row: Row) -> dict[str, list[list[int]]]:
    """Label → boxes [left, top, right, bottom] in [0, 1000), sorted from the top left; ManifestError if malformed."""
    found: dict[str, list[list[int]]] = {}
    width, height = row.get("size") or (1, 1)
    for thing in row.get("objects") or []:
        try:
            left, top, right, bottom = thing["box"]
            sides = ((left, width), (top, height), (right, width), (bottom, height))
            box = [thousandth(value, size) for value, size in sides]
            found.setdefault(str(thing["label"]), []).append(box)
        except (KeyError, TypeError, ValueError) as error:
            raise ManifestError(f"'objects' is not a list of label and box ({type(error).__name__}: {error})") from None
    return {label: sorted(boxes, key=lambda box: (box[1], box[0])) for label, boxes in sorted(found.items())}


def thousandth(value: float, size: float) -> int:
    """A place along a side → an integer in [0, 1000), as in SlowFastWorld."""
    if not 0 <= value <= size:
        raise ValueError(f"{value} is not within {size}")
    return min(999, round(value / size * 1000))


def checked(names: tuple[str, ...], streaming: bool) -> str | None:
    """A sentence on what is wrong with a source's transforms, or None."""
    for name in names:
        if name not in TRANSFORMS:
            return f"{name!r} is not a transform; use {', '.join(TRANSFORMS)}"
        if streaming and name in NEED_OTHERS:
            return f"{name} needs access to other samples, which a stream does not have; remove streaming"
    return None
