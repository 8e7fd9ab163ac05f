"""A row of a data set → the chat form: messages with their media, and further fields for the transforms.

The chat form is a dictionary with `messages` and, if the data set has them, `caption` (of the media), `objects`
(a list of {"label": name, "box": [left, top, right, bottom]}, the box in fractions of the picture or, with `size =
[width, height]` in the row, in pixels) and `family`. A row has one of these forms; the first that matches is used:

    messages                    the chat itself; a part without a source takes the next of `image` / `images` / `video`
    conversations               [{"from": "human", "value": "<image>\\n..."}, ...] with markers in place of the media
    texts and images            two lists of one length with gaps (None): a document with pictures in its text
    question and answer         with image, images or video: one question about them
    caption                     with image, images or video
    text                        text without media

A recipe's `columns` maps these fields to the columns of the data set.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from keye.errors import ManifestError

Row = dict[str, Any]

FIELDS = (
    "messages", "conversations", "texts", "text", "question", "answer", "caption", "image", "images", "video",
    "objects", "size", "family",
)  # fmt: skip
SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
MARKERS = {"<image>": "image", "<video>": "video"}
DESCRIBE = {"image": "Describe the image.", "images": "Describe the images.", "video": "Describe the video."}


class EmptyRow(ManifestError):
    """An empty line: no sample, and no error."""


def as_chat(raw: Row, columns: dict[str, str] | None = None) -> Row:
    """A row as it is in its file → the chat form.

    Args:
        raw: column → value; media as paths, bytes, {"bytes", "path"} or pictures.
        columns: field of the chat form → column; a field that is not listed has a column of its own name.

    Raises:
        ManifestError: a column is missing, or the row is in no known form.
    """
    row = raw if not columns else _renamed(raw, columns)
    try:
        chat = _chat(row)
        kind_of(chat)
        found = {"caption": _first(row["caption"])} if row.get("caption") is not None else {}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ManifestError(f"no 'messages' list in the chat format ({type(error).__name__}: {error})") from None
    more = {name: row[name] for name in ("objects", "size", "family") if row.get(name) is not None}
    return {"messages": chat, **found, **more}


def _chat(row: Row) -> Any:
    """The messages of a row, from the first form that matches."""
    if "messages" in row:
        return _filled(row["messages"], _media(row)) if _has_media(row) else row["messages"]
    if "conversations" in row:
        return _from_conversations(row["conversations"], _media(row))
    if row.get("texts") is not None:
        return [{"role": "assistant", "content": _interleaved(row["texts"], row.get("images"))}]
    if row.get("question") is not None and row.get("answer") is not None:
        question = [*_parts(row), {"type": "text", "text": row["question"]}]
        return [{"role": "user", "content": question}, {"role": "assistant", "content": _common(row["answer"])}]
    if row.get("caption") is not None and _has_media(row):
        request = [*_parts(row), {"type": "text", "text": describe(_parts(row))}]
        return [{"role": "user", "content": request}, {"role": "assistant", "content": _first(row["caption"])}]
    if row.get("text") is not None:
        return [{"role": "assistant", "content": row["text"]}]
    has = ", ".join(sorted(map(str, row))) or "nothing"
    example = "columns = {question = 'NAME', answer = 'NAME'}"
    raise ManifestError(f"no 'messages' list; the columns are {has}; map them in data.sources.columns, as {example}")


def _renamed(raw: Row, columns: dict[str, str]) -> Row:
    missing = [column for column in columns.values() if column not in raw]
    if missing:
        has = ", ".join(sorted(map(str, raw)))
        raise ManifestError(f"no column {missing[0]}; the columns are {has}; correct data.sources.columns")
    taken = set(columns.values())
    return {k: v for k, v in raw.items() if k in FIELDS and k not in taken} | {k: raw[c] for k, c in columns.items()}


def _has_media(row: Row) -> bool:
    return any(row.get(name) is not None for name in ("image", "images", "video"))


def _media(row: Row) -> dict[str, list[Any]]:
    """Kind → the row's media of that kind, in order."""
    stills = row["images"] if row.get("images") is not None else row.get("image")
    found = {"image": stills, "video": row.get("video")}
    return {kind: _listed(value) for kind, value in found.items()}


def _listed(value: Any) -> list[Any]:
    return [] if value is None else [v for v in value if v is not None] if isinstance(value, list) else [value]


def _parts(row: Row) -> list[Row]:
    return [{"type": kind, kind: source} for kind, sources in _media(row).items() for source in sources]


def describe(parts: list[Row]) -> str:
    """The request for a caption of these media."""
    kinds = [part["type"] for part in parts if part["type"] != "text"]
    return DESCRIBE["video" if "video" in kinds else "images" if len(kinds) > 1 else "image"]


def _filled(messages: Any, media: dict[str, list[Any]]) -> list[Row]:
    """The messages; parts without a source get the row's own media in order."""
    waiting = {kind: iter(sources) for kind, sources in media.items()}

    def fill(part: Any) -> Any:
        if not isinstance(part, dict) or part.get("type") not in waiting:
            return part
        given = {key: value for key, value in part.items() if value is not None}
        if set(given) & {part["type"], "url", "path", "base64"}:
            return part
        source = next(waiting[part["type"]], None)
        return part if source is None else {**given, part["type"]: source}

    return each_part(messages, fill)


def each_part(messages: Any, change: Callable[[Any], Any]) -> list[Row]:
    """The messages with `change` applied to every part of their contents; ManifestError if they are no messages."""
    try:
        return [
            m if isinstance(m["content"], str) else {**m, "content": [change(part) for part in m["content"]]}
            for m in messages
        ]
    except (KeyError, TypeError) as error:
        raise ManifestError(f"no 'messages' list in the chat format ({type(error).__name__}: {error})") from None


def _from_conversations(turns: Any, media: dict[str, list[Any]]) -> list[Row]:
    """The form of ShareGPT and LLaVA: {"from", "value"} with <image> and <video> in place of the media."""
    try:
        chat = [{"role": SPEAKERS[turn["from"]], "content": _marked(turn["value"])} for turn in turns]
    except (KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ManifestError(f"'conversations' is not a list of from and value ({reason})") from None
    marked = Counter(part["type"] for turn in chat if isinstance(turn["content"], list) for part in turn["content"])
    for kind, sources in media.items():
        if marked[kind] != len(sources):
            raise ManifestError(f"'conversations' has {marked[kind]} markers <{kind}> and the row {len(sources)} media")
    return _filled(chat, media)


def _marked(text: str) -> str | list[Row]:
    """A text with markers → parts; white space around a marker is removed."""
    parts: list[Row] = []
    rest = text
    while True:
        at, marker = min(((rest.find(m), m) for m in MARKERS if m in rest), default=(-1, ""))
        before = (rest if at < 0 else rest[:at]).strip() if parts or at >= 0 else rest
        parts += [{"type": "text", "text": before}] if before else []
        if at < 0:
            return text if all(part["type"] == "text" for part in parts) else parts
        parts.append({"type": MARKERS[marker]})
        rest = rest[at + len(marker) :]


def _interleaved(texts: Iterable[Any], images: Iterable[Any] | None) -> list[Row]:
    texts, images = list(texts), list(images or [None] * len(list(texts)))
    if len(texts) != len(images):
        raise ManifestError(f"'texts' has {len(texts)} entries and 'images' {len(images)}; give the same number")
    parts: list[Row] = []
    for text, image in zip(texts, images, strict=True):
        parts += [{"type": "image", "image": image}] if image is not None else []
        parts += [{"type": "text", "text": text}] if text else []
    return parts


def _common(answer: Any) -> Any:
    """The most frequent answer of a list, the first of equals; other values are returned unchanged."""
    if not isinstance(answer, list):
        return answer
    answers = [one.get("answer", one) if isinstance(one, dict) else one for one in answer]
    return Counter(answers).most_common(1)[0][0] if answers and all(isinstance(a, str) for a in answers) else answer


def _first(caption: Any) -> Any:
    return caption[0] if isinstance(caption, list) and caption else caption


def kind_of(messages: list[Row]) -> str:
    """The kind of a chat: "video" if it has one, else "image", else "text"."""
    parts = [part for message in messages if not isinstance(message["content"], str) for part in message["content"]]
    types = {str(part["type"]).removesuffix("_url") for part in parts}
    return "video" if "video" in types else "image" if "image" in types else "text"


def caption_of(messages: list[Row]) -> str:
    """All text of the assistant."""
    words = []
    for message in messages:
        if message["role"] == "assistant":
            content = message["content"]
            words += [content] if isinstance(content, str) else [p["text"] for p in content if p["type"] == "text"]
    return " ".join(words)
