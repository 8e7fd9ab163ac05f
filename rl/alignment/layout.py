"""Layout: JSON, Markdown, titles, placeholders, postscripts, several answers, one of several choices."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from rl.alignment.base import Constraint, Counted, constraint, filled, require
from rl.alignment.text import words

SEPARATOR = "******"


@constraint("json")
@dataclass(frozen=True)
class Json(Constraint):
    """A JSON object, alone or in a code block, with these keys and a value that is not empty for each."""

    keys: tuple[str, ...] = ()

    def describe(self) -> str:
        wanted = f" with the keys {', '.join(map(json.dumps, self.keys))}" if self.keys else ""
        return f"Answer with one valid JSON object{wanted} and nothing else."

    def holds(self, text: str) -> bool:
        fenced = re.fullmatch(r"```(?:json)?[ \t]*\n(.*)\n```", text, re.DOTALL)
        try:
            found = json.loads(fenced[1] if fenced else text, parse_constant=_refuse, object_pairs_hook=_once)
        except (ValueError, RecursionError):
            return False
        values = [found.get(key) for key in self.keys] if isinstance(found, dict) else []
        return isinstance(found, dict) and bool(found) and all(map(_filled, values))


def _filled(value: Any) -> bool:
    """Whether a value of JSON is not empty: null, a blank text, and lists and objects of such values are."""
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, list | dict):
        return any(map(_filled, value.values() if isinstance(value, dict) else value))
    return value is not None and value not in (float("inf"), float("-inf"))


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    require(len({key for key, _ in pairs}) == len(pairs), "a key occurs twice")
    return dict(pairs)


@constraint("heading")
@dataclass(frozen=True)
class Heading(Counted):
    """The number of Markdown headings of a level (`##` is level 2)."""

    level: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        require(1 <= self.level <= 6, "level must be from 1 to 6")

    def describe(self) -> str:
        return f"Include {self.amount('Markdown heading')} of level {self.level} ('{'#' * self.level} …')."

    def number(self, text: str) -> int:
        return len(re.findall(rf"^#{{{self.level}}} +[^\s#].*$", text, re.MULTILINE))


@constraint("table")
@dataclass(frozen=True)
class Table(Constraint):
    """One Markdown table with this number of columns and at least this number of rows below its head."""

    columns: int
    rows: int = 1

    def __post_init__(self) -> None:
        require(self.columns >= 1 and self.rows >= 1, "columns and rows must be at least 1")

    def describe(self) -> str:
        rows = "row" if self.rows == 1 else "rows"
        return f"Include a Markdown table with {self.columns} columns and at least {self.rows} {rows} below the header."

    def holds(self, text: str) -> bool:
        blocks = re.findall(r"(?:^[ \t]*\|.*\|[ \t]*$\n?)+", text, re.MULTILINE)
        tables = [[_cells(line) for line in block.strip().split("\n")] for block in blocks]
        found = [rows for rows in tables if len(rows) > 2 and all(re.fullmatch(r":?-+:?", c) for c in rows[1])]
        if len(found) != 1 or any(len(row) != self.columns for row in found[0]):
            return False
        full = [row for row in found[0][2:] if all(row)]
        return len(full) >= self.rows


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip()[1:-1])]


@constraint("code_block")
@dataclass(frozen=True)
class CodeBlock(Constraint):
    """A fenced code block with this language tag and content."""

    language: str = "python"

    def __post_init__(self) -> None:
        require(re.fullmatch(r"[\w+#-]+", self.language) is not None, "language must be a tag such as python")

    def describe(self) -> str:
        return f"Include a fenced code block that begins with ```{self.language}."

    def holds(self, text: str) -> bool:
        fence = rf"^```{re.escape(self.language)}[ \t]*\n([^`]*)\n```[ \t]*$"
        found = re.search(fence, text, re.MULTILINE)
        return found is not None and any(c.isalnum() for c in found[1])


@constraint("highlights")
@dataclass(frozen=True)
class Highlights(Counted):
    """The number of passages in bold, `**like this**`."""

    def describe(self) -> str:
        return f"Highlight {self.amount('passage')} in bold with Markdown (**like this**)."

    def number(self, text: str) -> int:
        return len(re.findall(r"(?<!\*)\*\*[^\s*](?:[^*\n]{0,200}[^\s*])?\*\*(?!\*)", text))


@constraint("title")
@dataclass(frozen=True)
class Title(Constraint):
    """One title in double angle brackets, alone on the first line, with text below."""

    def describe(self) -> str:
        return "Begin with a title in double angle brackets on its own line, such as <<a title>>."

    def holds(self, text: str) -> bool:
        first, _, rest = text.partition("\n")
        inside = re.fullmatch(r"<<([^<>]+)>>", first.strip())
        return inside is not None and bool(words(inside[1])) and bool(words(rest)) and "<<" not in rest


@constraint("placeholders")
@dataclass(frozen=True)
class Placeholders(Counted):
    """The number of different placeholders in square brackets, such as [name]."""

    def describe(self) -> str:
        return f"Include {self.amount('different placeholder')} in square brackets, such as [name]."

    def number(self, text: str) -> int:
        return len({found.casefold() for found in re.findall(r"\[([^\W\d_][^\[\]\n]{0,60})\](?!\()", text)})


@constraint("postscript")
@dataclass(frozen=True)
class Postscript(Constraint):
    """The last paragraph is a postscript: it begins with the marker and has text, after other text."""

    marker: str = "P.S."

    def __post_init__(self) -> None:
        filled("marker", [self.marker])

    def describe(self) -> str:
        return f"End with a postscript that begins with '{self.marker}'."

    def holds(self, text: str) -> bool:
        found = list(re.finditer(rf"^[ \t]*{re.escape(self.marker)}", text, re.MULTILINE | re.IGNORECASE))
        if len(found) != 1:
            return False
        before, after = text[: found[0].start()], text[found[0].end() :]
        return bool(words(before)) and bool(words(after)) and "\n\n" not in after


@constraint("repeat_prompt")
@dataclass(frozen=True)
class RepeatPrompt(Constraint):
    """The answer repeats this request, word for word, and then answers it."""

    request: str

    def __post_init__(self) -> None:
        filled("request", [self.request])

    def describe(self) -> str:
        return f'First repeat this request word for word, then answer it: "{self.request}"'

    def holds(self, text: str) -> bool:
        repeated, rest = text[: len(self.request)], text[len(self.request) :]
        return repeated == self.request and bool(words(rest)) and self.request not in rest


@constraint("two_answers")
@dataclass(frozen=True)
class TwoAnswers(Constraint):
    """Two different answers with a line of six asterisks between them, and no other such line."""

    def describe(self) -> str:
        return f"Give two different answers, separated by a line with six asterisks: {SEPARATOR}"

    def holds(self, text: str) -> bool:
        parts = re.split(r"^[ \t]*\*{6}[ \t]*$", text, flags=re.MULTILINE)
        said = [[word.casefold() for word in words(part)] for part in parts]
        return len(said) == 2 and all(said) and said[0] != said[1]


@constraint("choice")
@dataclass(frozen=True)
class Choice(Constraint):
    """The answer is one of these texts, and nothing else."""

    options: tuple[str, ...]

    def __post_init__(self) -> None:
        filled("options", self.options)
        require(len(self.options) > 1, "options must have two texts or more")

    def describe(self) -> str:
        return f"Answer with one of these options and nothing else: {'; '.join(self.options)}"

    def holds(self, text: str) -> bool:
        return text.removesuffix(".").casefold() in {option.removesuffix(".").casefold() for option in self.options}
