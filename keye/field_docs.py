"""The docstrings below the fields of a dataclass, for help texts and documents."""

import ast
import dataclasses
import functools
import inspect
import textwrap
import types
from typing import Any, Union, get_args, get_origin, get_type_hints


@functools.cache
def field_docs(cls: type) -> dict[str, str]:
    """Field → docstring in one line, of a dataclass and its bases; fields without a docstring are left out."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        for field, below in zip(body.body, body.body[1:], strict=False):
            text = below.value.value if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) else None
            if isinstance(field, ast.AnnAssign) and isinstance(text, str):
                docs[field.target.id] = " ".join(text.split())
    return docs


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """Field → type; for `T | None` it is T."""
    hints = get_type_hints(cls)
    return {field.name: _without_none(hints[field.name]) for field in dataclasses.fields(cls)}


def _without_none(hint: Any) -> Any:
    if get_origin(hint) not in (Union, types.UnionType):
        return hint
    return next(option for option in get_args(hint) if option is not type(None))
