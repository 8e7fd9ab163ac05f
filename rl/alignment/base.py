"""A constraint on the form of an answer: a sentence for the prompt and a rule that checks it.

A constraint is a frozen dataclass with a `kind`; its fields are its parameters. A manifest's line lists constraints as
`{"kind": "words", "relation": "at least", "count": 50}`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, TypeVar

from keye.checks import suggestion
from keye.errors import ManifestError, RecipeError
from rl.alignment.text import has_content, visible
from stages.typed_toml import build

RELATIONS = ("at least", "at most", "exactly")


@dataclass(frozen=True)
class Constraint:
    """A rule about an answer; subclasses state it in `describe` and decide it in `holds`."""

    kind: ClassVar[str] = ""

    def describe(self) -> str:
        """The sentence that asks for it in a prompt."""
        raise NotImplementedError

    def holds(self, text: str) -> bool:
        """Whether a visible text (see `rl.alignment.text.visible`) with content satisfies the rule."""
        raise NotImplementedError

    def check(self, text: str) -> bool:
        """Whether an answer satisfies the rule. An answer without content, such as an empty one, satisfies none."""
        seen = visible(text)
        return has_content(seen) and self.holds(seen)

    def to_json(self) -> dict[str, Any]:
        """The entry in a manifest."""
        return {"kind": self.kind, **json.loads(json.dumps(asdict(self)))}


@dataclass(frozen=True)
class Counted(Constraint):
    """At least, at most or exactly `count` of something.

    Raises:
        ValueError: another relation, or a negative count.
    """

    relation: str
    count: int

    def __post_init__(self) -> None:
        require(self.relation in RELATIONS, f"relation must be one of {', '.join(RELATIONS)}")
        require(self.count >= 0, "count must be 0 or more")

    def number(self, text: str) -> int:
        """How many a visible text has."""
        raise NotImplementedError

    def holds(self, text: str) -> bool:
        number = self.number(text)
        if self.relation == "exactly":
            return number == self.count
        return number >= self.count if self.relation == "at least" else number <= self.count

    def amount(self, one: str, many: str | None = None) -> str:
        """`at least 3 words`."""
        return f"{self.relation} {self.count} {one if self.count == 1 else many or one + 's'}"


def require(ok: bool, message: str) -> None:
    """Raise a ValueError with `message` unless `ok`."""
    if not ok:
        raise ValueError(message)


def filled(name: str, texts: Sequence[str]) -> None:
    """Require at least one text, and no blank one."""
    require(bool(texts) and all(text.strip() for text in texts), f"{name} must have at least one text, none blank")


KINDS: dict[str, type[Constraint]] = {}
"""Kind → class of every registered constraint."""

Kind = TypeVar("Kind", bound=type[Constraint])


def constraint(kind: str) -> Callable[[Kind], Kind]:
    """Class decorator that registers a constraint under `kind`, for manifests."""

    def add(cls: Kind) -> Kind:
        cls.kind = kind
        KINDS[kind] = cls
        return cls

    return add


def read_constraints(entries: Any, where: str) -> tuple[Constraint, ...]:
    """The constraints of a manifest's line.

    Args:
        where: `file:line`, for the error.

    Raises:
        ManifestError: not a list of tables, an unknown kind, or a parameter of the wrong type or value; names it.
    """
    if not isinstance(entries, list):
        raise ManifestError(f'{where}: constraints must be a list such as [{{"kind": "no_commas"}}]')
    found = []
    for number, entry in enumerate(entries):
        at = f"constraints[{number}]"
        kind = entry.get("kind") if isinstance(entry, dict) else None
        if not isinstance(kind, str) or kind not in KINDS:
            raise ManifestError(f"{where}: {at} has the kind {kind!r:.40}; {suggestion(str(kind), KINDS)}")
        parameters = {key: value for key, value in entry.items() if key != "kind"}
        try:
            found.append(build(KINDS[kind], parameters, where, f"{at}."))
        except RecipeError as error:
            raise ManifestError(str(error)) from None
        except ValueError as error:
            raise ManifestError(f"{where}: {at} ({kind}): {error}; correct it") from None
    return tuple(found)
