"""A data set for alignment RL: the prompts of a manifest, each with a set of drawn constraints in words."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from keye.errors import ManifestError
from keye.world.manifest import iter_manifest, write_manifest
from rl.alignment.base import Constraint
from rl.alignment.draw import draw_constraints
from rl.preference.selecting import moved


def write_constraint_set(
    manifest: str | Path,
    out: str | Path,
    *,
    seed: int = 0,
    each: int = 1,
    least: int = 1,
    most: int = 3,
    kinds: tuple[str, ...] = (),
    keep_answers: bool = False,
    progress: bool = True,
) -> int:
    """Write `out`: the prompts of `manifest` with drawn constraints, and return the number of lines.

    The sentences of the constraints follow the last user turn; the line has them as `constraints` as well. The same
    arguments write the same bytes.

    Args:
        each: sets for each prompt. least, most: constraints of a set.
        kinds: kinds to draw from; empty = all but `language`.
        keep_answers: keep `answer`, `options` and `tolerance`, for rewards of the content.

    Raises:
        ManifestError: the manifest is missing or malformed, or a line has no text of a user.
    """
    if not 1 <= least <= most or each < 1:
        raise ManifestError(f"{each} sets of {least} to {most} constraints are not possible; give 1 or more, in order")
    source, target = Path(manifest), Path(out)
    total = count_lines(source) * each
    columns = (TextColumn("constraints"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())

    def drawn() -> Iterator[dict[str, Any]]:
        with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), disable=not progress) as bar:
            task = bar.add_task("", total=total)
            for number, line in enumerate(iter_manifest(source), 1):
                for copy_number in range(each):
                    rng = random.Random(f"{seed}/{number}/{copy_number}")
                    request = _request(line, f"{source}:{number}")
                    chosen = draw_constraints(rng, request, rng.randint(least, most), kinds)
                    made = with_constraints(line, chosen, keep_answers)
                    made["id"] = f"{line.get('id', f'{source.stem}-{number}')}-constraints{copy_number}"
                    made["messages"] = moved(made["messages"], source.parent, target.parent)
                    yield made
                    bar.advance(task)

    write_manifest(target, drawn())
    return total


def count_lines(manifest: Path) -> int:
    """Lines of a manifest that are not blank, without keeping them.

    Raises:
        ManifestError: there is none.
    """
    number = sum(1 for _ in iter_manifest(manifest))
    if not number:
        raise ManifestError(f"{manifest} is empty; write samples into it with python -m keye.world")
    return number


def with_constraints(line: dict[str, Any], chosen: tuple[Constraint, ...], keep_answers: bool) -> dict[str, Any]:
    """A manifest's line that asks for `chosen` constraints after its request, without the assistant's turns."""
    made = copy.deepcopy(line)
    made["messages"] = [message for message in made["messages"] if message["role"] != "assistant"]
    user = next(message for message in reversed(made["messages"]) if message["role"] == "user")
    sentences = " ".join(one.describe() for one in chosen)
    if isinstance(user["content"], str):
        user["content"] += f"\n{sentences}"
    else:
        user["content"].append({"type": "text", "text": f"\n{sentences}"})
    if not keep_answers:
        made = {key: value for key, value in made.items() if key not in ("answer", "options", "tolerance")}
    return made | {"constraints": [one.to_json() for one in chosen]}


def _request(line: dict[str, Any], where: str) -> str:
    """The text of the last user turn."""
    users = [message["content"] for message in line["messages"] if message["role"] == "user"]
    content = users[-1] if users else ""
    parts = [content] if isinstance(content, str) else [p.get("text") or "" for p in content if isinstance(p, dict)]
    text = " ".join(part.strip() for part in parts if part.strip())
    if not text:
        raise ManifestError(f"{where} has no text of a user; add a turn with the role user and a text")
    return text
