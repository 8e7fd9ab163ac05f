"""TOML ↔ frozen dataclasses: tables that are typed and whose every key is checked, and their way back.

A key that is not known is an error that names the nearest known one. Recipes of the stages and of RL are read by it.
"""

import dataclasses
import difflib
import json
import re
import tomllib
import types
from dataclasses import MISSING
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from keye.errors import RecipeError


def read(path: Path, overrides: list[str] | tuple[str, ...], ready_made: str) -> dict[str, Any]:
    """The overridden table of a TOML file, unchecked; `ready_made` is where an error says that recipes can be found.

    Raises:
        RecipeError: no such file, not TOML, or an override that is not KEY=VALUE.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe; the ready-made ones are in {ready_made}") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}); name a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not TOML ({error}); mend that line") from None
    for text in overrides:
        override(table, text)
    return table


def build(cls: type, table: Any, file: str, prefix: str = "") -> Any:
    """A table → the frozen dataclass `cls`, typed; `file` and `prefix` name the place in errors."""
    if not isinstance(table, dict):
        raise RecipeError(f"{file}: {prefix.rstrip('.')} is not a table; write [{prefix.rstrip('.')}]")
    hints, known = get_type_hints(cls), {f.name: f for f in dataclasses.fields(cls)}
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise RecipeError(f"{file}: unknown key {prefix}{key}; did you mean {prefix}{near}?")
    for name, spec in known.items():
        if name not in table and spec.default is MISSING and spec.default_factory is MISSING:
            raise RecipeError(f"{file}: {prefix}{name} is missing; write it into the recipe")
    return cls(**{key: _typed(hints[key], value, file, prefix + key) for key, value in table.items()})


def _typed(hint: Any, value: Any, file: str, key: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        hint = next(arg for arg in args if arg is not type(None))
        return _typed(hint, value, file, key)
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
    if not isinstance(hint, type) or not isinstance(value, hint) or isinstance(value, bool) != (hint is bool):
        names = {tuple: "a list", dict: "a table"}
        wanted = names.get(origin) or f"of type {getattr(hint, '__name__', hint)}"
        raise RecipeError(f"{file}: {key} is {value!r}, but must be {wanted}")
    return value


def override(table: dict[str, Any], text: str) -> None:
    """Write "table.key=value" into a recipe's table, in place; what is not a TOML value is taken for a string.

    Raises:
        RecipeError: no "=", or a way through something that is no table.
    """
    key, equals, value = text.partition("=")
    if not equals:
        raise RecipeError(f"--set {text}: write --set table.key=value")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value
    *path, last = key.strip().split(".")
    for part in path:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise RecipeError(f"--set {text}: {part} is not a table")
    table[last] = parsed


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
        # A JSON string is a TOML string but for DEL, which TOML wants escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    return repr(value)
