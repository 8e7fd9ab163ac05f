"""TOML ↔ frozen dataclasses: every key and type is checked, former names of keys are accepted, and the way back.

A field's metadata may give its `former` name: a file or an override that uses it is read with a FutureWarning. A field
of type `Annotated[dict[str, Any], Config]` holds some fields of the dataclass `Config`, one of a TypedDict some of its
keys; both are checked like dataclasses.
"""

import dataclasses
import json
import os
import re
import tomllib
import types
import warnings
from collections.abc import Callable, Mapping
from dataclasses import MISSING
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints, is_typeddict

from keye.checks import suggestion
from keye.errors import FormerNameWarning, RecipeError

Config = TypeVar("Config")
Need = Callable[[bool, str], None]


def load(
    cls: type[Config],
    path: Path,
    overrides: list[str] | tuple[str, ...],
    ready_made: str,
    foreign: Mapping[str, str] = types.MappingProxyType({}),
) -> Config:
    """Read a TOML file, apply the overrides and build the frozen dataclass `cls`.

    Args:
        overrides: "table.key=value" each. ready_made: folder of the shipped recipes, for the error message.
        foreign: top-level key of another kind of recipe → what a file with it is, and its command.

    Raises:
        RecipeError: no such file, not TOML, an unknown key, a wrong type, or an override that is not KEY=VALUE.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe; the ready-made ones are in {ready_made}") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}); name a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not TOML ({error}); correct that line") from None
    for key in table:
        if key in foreign:
            raise RecipeError(f"{path}: this is {foreign[key]}")
    table = current_names(cls, table, str(path))
    written = [(_override(cls, table, text), text) for text in overrides]
    try:
        return build(cls, table, str(path))
    except RecipeError as error:
        at, what = getattr(error, "at", ""), getattr(error, "what", "")
        for key, text in reversed(written):
            if at == key or at.startswith((f"{key}.", f"{key}[")):
                raise RecipeError(f"--set {text}: {what}") from None
        raise


def _fault(file: str, key: str, what: str) -> RecipeError:
    """The error about a key, which it keeps as `at`, so that `load` can name the override that wrote the key."""
    error = RecipeError(f"{file}: {what}")
    error.at, error.what = key, what
    return error


def requirement(file: str) -> Need:
    """A function that raises a RecipeError with its message, after the file's name, unless its condition holds."""

    def need(ok: bool, message: str) -> None:
        if not ok:
            raise RecipeError(f"{file}: {message}")

    return need


def former_names(cls: type) -> dict[str, str]:
    """Former name → present name of the fields of a dataclass that were renamed."""
    return {f.metadata["former"]: f.name for f in dataclasses.fields(cls) if "former" in f.metadata}


def current_names(cls: type, table: Mapping[str, Any], file: str = "", prefix: str = "") -> dict[str, Any]:
    """A table with former names of keys replaced by the present ones, in nested tables as well.

    Args:
        file: what a FutureWarning names; without it there is no warning.

    Raises:
        RecipeError: a key is given by both names.
    """
    hints = get_type_hints(cls)
    former = former_names(cls)
    renamed: dict[str, Any] = {}
    for key, value in table.items():
        name = former.get(key, key)
        if name != key:
            if name in table:
                raise RecipeError(f"{file}: {prefix}{key} is the former name of {prefix}{name}; give only the latter")
            if file and os.environ.get("RANK", "0") == "0":
                text = f"{file}: the key {prefix}{key} is now called {prefix}{name}; rename it"
                warnings.warn_explicit(text, FormerNameWarning, file, 0)
        inner = next((c for c in (hints.get(name), *get_args(hints.get(name))) if dataclasses.is_dataclass(c)), None)
        if inner is not None and isinstance(value, dict):
            value = current_names(inner, value, file, f"{prefix}{name}.")
        elif inner is not None and isinstance(value, list):
            value = [
                current_names(inner, item, file, f"{prefix}{name}[{i}].") if isinstance(item, dict) else item
                for i, item in enumerate(value)
            ]
        renamed[name] = value
    return renamed


def build(cls: type[Config], table: Any, file: str, prefix: str = "") -> Config:
    """A table → the frozen dataclass `cls`, typed; `file` and `prefix` name the place in errors."""
    typed = _typed_fields(cls, table, file, prefix)
    for spec in dataclasses.fields(cls):
        if spec.name not in typed and spec.default is MISSING and spec.default_factory is MISSING:
            name = prefix + spec.name
            raise _fault(file, name, f"{name} is missing; write it into the recipe")
    return cls(**typed)


def _typed_fields(cls: type, table: Any, file: str, prefix: str) -> dict[str, Any]:
    """The values of a table that holds some fields of `cls` (a dataclass or TypedDict), each of its field's type."""
    if not isinstance(table, dict):
        name = prefix.rstrip(".")
        raise _fault(file, name, f"{name} is not a table; write [{name}]")
    hints = get_type_hints(cls, include_extras=True)
    for key in table:
        if key not in hints:
            raise _fault(file, prefix + key, f"unknown key {prefix}{key}; {suggestion(key, hints, prefix)}")
    return {key: _typed(hints[key], value, file, prefix + key) for key, value in table.items()}


def _typed(hint: Any, value: Any, file: str, key: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated or is_typeddict(hint):
        return _typed_fields(args[1] if args else hint, value, file, key + ".")
    if origin in (Union, types.UnionType):
        options = [option for option in args if option is not type(None)]
        fitting = (option for option in options if (get_origin(option) is dict) == isinstance(value, dict))
        return _typed(next(fitting, options[0]), value, file, key)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return build(hint, value, file, key + ".")
    if origin is tuple and isinstance(value, list):
        return tuple(_typed(args[0], item, file, f"{key}[{i}]") for i, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {k: _typed(args[1], item, file, f"{key}.{k}") for k, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)  # 1e6 is a float in TOML
    if not isinstance(hint, type) or not isinstance(value, hint) or isinstance(value, bool) != (hint is bool):
        names = {tuple: "a list", dict: "a table"}
        wanted = names.get(origin) or f"of type {getattr(hint, '__name__', hint)}"
        raise _fault(file, key, f"{key} is {value!r}, but must be {wanted}")
    return value


def _override(cls: type, table: dict[str, Any], text: str) -> str:
    """Write "table.key=value" into a recipe's table, in place, and return the key by its present name.

    A value that is not TOML is taken as a string.

    Raises:
        RecipeError: no "=", or a path through a key that is not a table.
    """
    key, equals, value = text.partition("=")
    if not equals:
        raise RecipeError(f"--set {text}: write --set table.key=value")
    try:
        given = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        given = value
    path = key.strip().split(".")
    for part in reversed(path):
        given = {part: given}
    given = current_names(cls, given, f"--set {text}")
    names = []
    for _ in path[:-1]:
        [(part, given)] = given.items()
        names.append(part)
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise RecipeError(f"--set {text}: {part} is not a table")
    table |= given
    return ".".join([*names, *given])


def to_toml(recipe: Any) -> str:
    """A dataclass as TOML, defaults included; `build` makes an equal one of it."""
    return "\n".join(_lines(dataclasses.asdict(recipe), "")) + "\n"


def _lines(table: dict[str, Any], prefix: str) -> list[str]:
    plain = {k: v for k, v in table.items() if v is not None and not _is_table(v)}
    lines = [f"{_key(k)} = {_value(v)}" for k, v in plain.items()]
    for key, value in table.items():
        name = prefix + _key(key)
        if isinstance(value, dict):
            lines += ["", f"[{name}]", *_lines(value, name + ".")]
        elif value is not None and _is_table(value):
            for item in value:
                lines += ["", f"[[{name}]]", *_lines(item, name + ".")]
    return lines


def _is_table(value: Any) -> bool:
    many = isinstance(value, list | tuple) and len(value) > 0 and all(isinstance(item, dict) for item in value)
    return isinstance(value, dict) or many


def _key(key: str) -> str:
    return key if re.fullmatch("[A-Za-z0-9_-]+", key) else _value(key)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        # A JSON string is a TOML string, except that TOML also escapes DEL.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    return repr(value)
