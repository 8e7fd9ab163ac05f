"""Properties of a chat template: the variables it reads, and whether it marks the assistant's words."""

import re
from collections.abc import Iterable

from transformers.utils.chat_template_utils import render_jinja_template

__all__ = ["Spans", "has_generation", "render_jinja_template", "variables_of"]

Spans = list[tuple[int, int]]
"""First and last-plus-one characters of a rendered text."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def has_generation(template: str) -> bool:
    """Whether a template marks the assistant's words with `{% generation %}`."""
    return bool(_GENERATION.search(template))


def variables_of(template: str, names: Iterable[str]) -> list[str]:
    """Those of `names` that the template's code reads."""
    code = " ".join(re.findall(r"\{[{%].*?[%}]\}", template, re.DOTALL))
    return [name for name in names if re.search(rf"\b{re.escape(name)}\b", code)]
