"""Transforms: a row in the chat form → another, at random by the sample's own generator; the report's augmentations.

`[[data.sources]] transforms = ["objects", "caption_first"]` applies them in this order. One that finds nothing to work
on leaves the row as it is. Where other samples are wanted (`which_image`, `nth_image`, `trap`) the source must be
map-style. Report, section on pre-training data: captions before and behind their questions, queries about one of many
images, trap questions, coordinates as integers in [0, 1000).
"""

import random
from collections.abc import Callable

from keye.errors import ManifestError
from stages.data.sources.chat import Row, caption_of, describe

Pick = Callable[[], Row]
Transform = Callable[[Row, random.Random, Pick], Row]

MANY = (6, 24)  # images of a query about one of them: "dozens", and no more than a context of 8,192 tokens takes
TRIES = 20  # other samples looked at for each that is wanted
WHERE = ("Where is the {}? Give its box.", "Give the box of the {}.", "Box of the {}?")
WHERE_ALL = ("Where are the {}? Give their boxes.", "Give the boxes of all {}.")
COUNT = ("How many {} are there?", "Count the {}.")
ABSENT = ("There is no {} in it.", "It shows no {}.")


def caption_first(row: Row, chance: random.Random, pick: Pick) -> Row:
    """Media, caption, [eos], question, answer: the caption becomes the chat's first turn."""
    if not _captioned(row):
        return row
    media, rest = _apart(row["messages"])
    asked = [*media, {"type": "text", "text": describe(media)}]
    return {**row, "messages": [_user(asked), _assistant(row["caption"]), *rest]}


def caption_last(row: Row, chance: random.Random, pick: Pick) -> Row:
    """Media, question, answer, [eos], caption: the caption becomes the chat's last turn."""
    if not _captioned(row):
        return row
    media, _ = _apart(row["messages"])
    return {**row, "messages": [*row["messages"], _user(describe(media)), _assistant(row["caption"])]}


def caption_either(row: Row, chance: random.Random, pick: Pick) -> Row:
    """`caption_first` or `caption_last`, one sample in two each."""
    return (caption_first if chance.random() < 0.5 else caption_last)(row, chance, pick)


def objects(row: Row, chance: random.Random, pick: Pick) -> Row:
    """Grounding and counting: one question about the place of each kind of the row's `objects`, and one on how many.

    They follow the chat's own turns; a chat that only asked for the caption keeps that.
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
    """A question about something that another sample's `objects` have and this one's have not; the answer says so."""
    mine = _boxes(row)
    if not mine:
        return row
    for _ in range(TRIES):
        absent = sorted(set(_boxes(pick())) - set(mine))
        if absent:
            label = chance.choice(absent)
            asked, answer = chance.choice((*WHERE, *COUNT)).format(label), chance.choice(ABSENT).format(label)
            return {**row, "messages": [*row["messages"], _user(asked), _assistant(answer)]}
    return row


def which_image(row: Row, chance: random.Random, pick: Pick) -> Row:
    """Many captioned images, and which of them a caption tells of; the answer is its number, from 1."""
    shown = _gallery(row, chance, pick)
    if shown is None:
        return row
    captions, asked, mine = shown
    question = f"Which of these {len(captions)} images shows this: {captions[mine]} Answer with its number."
    return _asked(row, asked, question, str(mine + 1), captions[mine])


def nth_image(row: Row, chance: random.Random, pick: Pick) -> Row:
    """Many captioned images, and the wish for a description of one; one time in eight of one that is not there."""
    shown = _gallery(row, chance, pick)
    if shown is None:
        return row
    captions, asked, mine = shown
    if chance.random() < 1 / 8:
        number = len(captions) + chance.randint(1, 10)
        answer = f"There are only {len(captions)} images."
        return _asked(row, asked, f"Describe image {number}.", answer, captions[mine])
    return _asked(row, asked, f"Describe image {mine + 1}.", captions[mine], captions[mine])


TRANSFORMS: dict[str, Transform] = {
    f.__name__: f for f in (caption_first, caption_last, caption_either, objects, trap, which_image, nth_image)
}
WANT_OTHERS = ("trap", "which_image", "nth_image")


def apply(names: tuple[str, ...], row: Row, chance: random.Random, pick: Pick) -> Row:
    """The row after all transforms of these names."""
    for name in names:
        row = TRANSFORMS[name](row, chance, pick)
    return row


def _user(content: str | list[Row]) -> Row:
    return {"role": "user", "content": content}


def _assistant(text: str) -> Row:
    return {"role": "assistant", "content": text}


def _asked(row: Row, parts: list[Row], question: str, answer: str, caption: str) -> Row:
    chat = [_user([*parts, {"type": "text", "text": question}]), _assistant(answer)]
    rest = {name: value for name, value in row.items() if name not in ("objects", "size")}
    return {**rest, "messages": chat, "caption": caption}


def _captioned(row: Row) -> bool:
    """Whether the row has a caption, media, and a chat that is more than that caption."""
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
    """Captions, numbered images as parts, and the place of the row's own; None where there are no two to tell apart."""
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
            shown.setdefault(*other)  # two of one caption could not be told apart
    if len(shown) == 1:
        return None
    captions = list(shown)
    chance.shuffle(captions)
    parts: list[Row] = []
    for number, text in enumerate(captions, start=1):
        parts += [{"type": "text", "text": f"Image {number}: "}, shown[text], {"type": "text", "text": "\n"}]
    return captions, parts, captions.index(caption)


def _picture(row: Row) -> tuple[str, Row] | None:
    """Caption and part of a row that shows one image; a chat of one answer is its own caption."""
    media, _ = _apart(row["messages"])
    if len(media) != 1 or media[0]["type"] != "image":
        return None
    answers = [message for message in row["messages"] if message["role"] == "assistant"]
    caption = row.get("caption") or (caption_of(answers) if len(answers) == 1 else "")
    return (caption, media[0]) if caption else None


def _boxes(row: Row) -> dict[str, list[list[int]]]:
    """Label → boxes [left, top, right, bottom] in [0, 1000), from the top left on; ManifestError when malformed."""
    found: dict[str, list[list[int]]] = {}
    width, height = row.get("size") or (1, 1)
    for thing in row.get("objects") or []:
        try:
            left, top, right, bottom = thing["box"]
            sides = ((left, width), (top, height), (right, width), (bottom, height))
            box = [thousandth(value, size) for value, size in sides]
            found.setdefault(str(thing["label"]), []).append(box)
        except (KeyError, TypeError, ValueError) as error:
            raise ManifestError(f"'objects' is no list of label and box ({type(error).__name__}: {error})") from None
    return {label: sorted(boxes, key=lambda box: (box[1], box[0])) for label, boxes in sorted(found.items())}


def thousandth(value: float, size: float) -> int:
    """A place along a side → an integer in [0, 1000), as SlowFastWorld writes them too."""
    if not 0 <= value <= size:
        raise ValueError(f"{value} is not within {size}")
    return min(999, round(value / size * 1000))


def checked(names: tuple[str, ...], streaming: bool) -> str | None:
    """What is wrong with a source's transforms, as a sentence, or None."""
    for name in names:
        if name not in TRANSFORMS:
            return f"{name!r} is not a transform; there are {', '.join(TRANSFORMS)}"
        if streaming and name in WANT_OTHERS:
            return f"{name} needs other samples at hand, which a stream has not; leave streaming out"
    return None
