"""Rewards on the structure of an answer: JSON with the keys and types of a schema, Markdown with its elements."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any

from keye.errors import KeyeError, missing_package
from rl.rewards.base import Judgement, register
from rl.rewards.rules import LONGEST

_FENCED = re.compile(r"\s*```(?:json)?[ \t]*\r?\n(.*)\n[ \t]*```\s*", re.DOTALL | re.IGNORECASE)
DEPTH = 64
"""Deepest nesting of JSON that is read."""

_TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict, "array": list, "string": str, "boolean": bool, "null": type(None),
    "integer": int, "number": (int, float),
}  # fmt: skip
_KEYWORDS = frozenset(
    ("type", "properties", "required", "additionalProperties", "items", "enum", "minItems", "maxItems", "minLength")
    + ("maxLength", "minimum", "maximum", "title", "description", "$schema")
)


class _NotJson(ValueError):
    """A text that is not strict JSON."""


def parse_json(text: str) -> Any:
    """The value of a text that is strict JSON, alone or in one ``` fence.

    Raises:
        ValueError: it is not, has a key twice, NaN or Infinity, more than `DEPTH` levels or `LONGEST` characters.
    """
    if len(text) > LONGEST:
        raise _NotJson("too long")
    fenced = _FENCED.fullmatch(text)
    text = fenced[1] if fenced else text
    if _depth(text) > DEPTH:
        raise _NotJson("nested too deeply")
    return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)


def _depth(text: str) -> int:
    """Deepest nesting of brackets outside strings."""
    deepest = level = 0
    for sign in re.findall(r'"(?:[^"\\]|\\.)*"|[\[{\]}]', text, re.DOTALL):
        level += (sign in "[{") - (sign in "]}")
        deepest = max(deepest, level)
    return deepest


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise _NotJson("a key twice")
    return dict(pairs)


def _no_constant(name: str) -> Any:
    raise _NotJson(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _NotJson(f"{text:.40} is larger than any number")
    return value


def same(one: Any, other: Any) -> bool:
    """Whether two values of JSON are equal: numbers by value, and neither true nor false is a number."""
    if isinstance(one, bool) or isinstance(other, bool) or type(one) is type(other) is str:
        return one is other or type(one) is type(other) and one == other
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    return one == other


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """Whether a JSON value fits a schema with the keywords type, properties, required, additionalProperties, items,
    enum, minItems, maxItems, minLength, maxLength, minimum and maximum. A key without a value in `properties` is free.

    Raises:
        ValueError: the schema has another keyword or an unknown type, or is not a table.
    """
    unknown = sorted(set(schema) - _KEYWORDS) if isinstance(schema, dict) else ["no table"]
    if unknown:
        raise ValueError(f"the manifest's schema has {unknown[0]!r}, which the reward json does not know")
    return _has_type(value, schema) and _has_size(value, schema) and _has_parts(value, schema)


def _has_type(value: Any, schema: dict[str, Any]) -> bool:
    wanted = schema.get("type", [])
    names = [wanted] if isinstance(wanted, str) else wanted
    if any(name not in _TYPES for name in names):
        raise ValueError(f"the manifest's schema has the type {wanted!r:.80}, which is none of JSON")
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # 3.0 is an integer
    matches = [isinstance(value, _TYPES[name]) and (name == "boolean" or not isinstance(value, bool)) for name in names]
    return (not names or any(matches)) and ("enum" not in schema or any(same(value, one) for one in schema["enum"]))


def _has_size(value: Any, schema: dict[str, Any]) -> bool:
    size = len(value) if isinstance(value, str | list) else None
    least, most = ("minLength", "maxLength") if isinstance(value, str) else ("minItems", "maxItems")
    if size is not None:
        return schema.get(least, 0) <= size <= schema.get(most, LONGEST)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return schema.get("minimum", value) <= value <= schema.get("maximum", value)
    return True


def _has_parts(value: Any, schema: dict[str, Any]) -> bool:
    if isinstance(value, list):
        return "items" not in schema or all(fits(part, schema["items"]) for part in value)
    if not isinstance(value, dict):
        return True
    known = schema.get("properties", {})
    if not set(schema.get("required", ())) <= value.keys():
        return False
    if schema.get("additionalProperties", True) is False and not value.keys() <= known.keys():
        return False
    return all(fits(part, known[key]) for key, part in value.items() if key in known)


@register("json")
@dataclass(frozen=True)
class Json:
    """1 when the answer is strict JSON that fits the `schema` of its manifest line, alone or in one ``` fence.

    Without a schema, a list or an object that is not empty. It says nothing about the values: use it beside a reward
    that does, or with `values`.

    Raises:
        ValueError: when called, a schema with an unknown keyword; with `values`, a manifest's answer that is no JSON.
    """

    values: bool = False
    """Whether the value must also equal the manifest's answer, read as JSON."""

    in_process = True

    def __call__(self, judgement: Judgement) -> float:
        schema = judgement.prompt.extra.get("schema")
        if schema is not None:
            fits(None, schema)  # an unknown keyword is a fault of the manifest, whatever the answer is
        truth = parse_json(judgement.prompt.answer) if self.values else None
        try:
            found = parse_json(judgement.raw_answer)
        except (ValueError, RecursionError):
            return 0.0
        if self.values and not same(found, truth):
            return 0.0
        if schema is not None:
            return float(fits(found, schema))
        return float(self.values or isinstance(found, dict | list) and len(found) > 0)


ELEMENTS = {
    "heading": "heading_open", "bullets": "bullet_list_open", "numbers": "ordered_list_open", "table": "table_open",
    "code": "fence", "quote": "blockquote_open", "bold": "strong_open", "italic": "em_open", "link": "link_open",
}  # fmt: skip
"""Element of Markdown → the token of its start."""


@register("markdown")
@dataclass(frozen=True)
class Markdown:
    """1 when the answer is well-formed Markdown that has each of the required elements, none of them empty.

    Required are the list `markdown` of the manifest line, or `elements`: of heading, bullets, numbers, table, code,
    quote, bold, italic and link. Well-formed: every ``` fence is closed, no heading skips a level after the first one,
    there is no HTML.

    Raises:
        ValueError: when called, a line whose list names another element, or no list at all.
    """

    elements: tuple[str, ...] = ()
    """Elements that an answer needs when its manifest line has no list."""

    in_process = True

    def __post_init__(self) -> None:
        try:
            import markdown_it  # noqa: F401
        except ModuleNotFoundError as error:
            raise missing_package(error) or KeyeError(str(error)) from None

    def __call__(self, judgement: Judgement) -> float:
        wanted = judgement.prompt.extra.get("markdown", self.elements)
        if not isinstance(wanted, list | tuple) or not wanted or not set(wanted) <= ELEMENTS.keys():
            raise ValueError(f"the required elements are {wanted!r:.80}; give one or more of {', '.join(ELEMENTS)}")
        answer = judgement.raw_answer
        if not answer or len(answer) > LONGEST // 5:
            return 0.0
        found = markdown_elements(answer)
        return float(found is not None and set(wanted) <= found)


def markdown_elements(text: str) -> set[str] | None:
    """The elements of a Markdown text that are not empty; None if it is not well-formed (see `Markdown`)."""
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"maxNesting": 20}).enable("table")
    tokens, level, found = parser.parse(text), 0, set()
    lines = text.split("\n")
    for place, token in enumerate(tokens):
        if token.type in ("html_block",) or any(child.type == "html_inline" for child in token.children or ()):
            return None
        if token.type == "heading_open":
            now = int(token.tag[1])
            if level and now > level + 1:
                return None
            level = now
        if token.type == "fence" and not _closed(token, lines):
            return None
        name = next((name for name, kind in ELEMENTS.items() if kind == token.type), None)
        if name is not None and _content(tokens, place).strip():
            found.add(name)
        if token.type == "inline":
            found |= _inline_elements(token.children or [])
    return found


def _closed(token: Any, lines: list[str]) -> bool:
    last = lines[token.map[1] - 1].strip(" >")
    return token.map[1] - token.map[0] > 1 and last.startswith(token.markup) and not last.strip(token.markup[0])


def _content(tokens: list[Any], place: int) -> str:
    """The text of the element that starts at a place."""
    if not tokens[place].type.endswith("_open"):
        return tokens[place].content
    end = tokens[place].type.replace("_open", "_close")
    depth, text = 0, []
    for token in tokens[place:]:
        depth += (token.type == tokens[place].type) - (token.type == end)
        text.append(token.content)
        if depth == 0:
            break
    return "".join(text)


def _inline_elements(children: list[Any]) -> set[str]:
    inline = {kind: name for name, kind in ELEMENTS.items() if name in ("bold", "italic", "link")}
    return {
        inline[child.type]
        for place, child in enumerate(children)
        if child.type in inline and _content(children, place).strip()
    }
