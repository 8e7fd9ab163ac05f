"""Predictions on disk: JSON Lines that grow while a study runs, and what identifies the study.

`study.json` has the benchmark with its version and checksums, the questions, and all settings of the encoder by label;
`predictions.jsonl` a line for each question, setting and answerer. A study that does not match is refused.
"""

import fcntl
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from keye.errors import KeyeError, writing
from keye.evaluation.study.settings import Setting
from keye.files import atomic_file, write_atomically
from keye.world.slowfastbench import VERSION, check_frozen
from keye.world.slowfastbench.questions import EACH, checksum, frozen

STUDY, LINES, TABLE = "study.json", "predictions.jsonl", "predictions.parquet"
GROWS = ("settings", "models")
"""Keys of `study.json` to which a later run may add entries."""
Key = tuple[str, str, str]


def identity(
    split: str, families: Sequence[str], where: Mapping[str, Sequence[str]], limit: int | None, number: int
) -> dict:
    """What identifies the `number` questions of a study; checks that they are drawn as they were frozen.

    Raises:
        ManifestError: the questions of a frozen split are drawn otherwise.
    """
    sums = {}
    for family in families:
        if split in frozen()["checksums"]:
            check_frozen(family, split)
            sums[family] = frozen()["checksums"][split][family]
        else:
            sums[family] = checksum(family, split)
    benchmark = {"name": "SlowFastBench", "version": VERSION, "split": split, "questions": EACH}
    return {
        "benchmark": {**benchmark, "checksums": sums},
        "questions": {
            "slices": {name: sorted(values) for name, values in sorted(where.items())},
            "limit": limit,
            "number": number,
        },
    }


def check_benchmark(path: Path, study: Mapping[str, Any]) -> None:
    """Check that the benchmark of a study is the present one.

    Raises:
        KeyeError: version or checksums differ; the message names file, key and remedy.
    """
    known = frozen()
    expected = {"name": known["benchmark"], "version": known["version"]}
    benchmark = study.get("benchmark", {})
    sums = known["checksums"].get(benchmark.get("split"), {})
    expected["checksums"] = {name: sums.get(name, value) for name, value in benchmark.get("checksums", {}).items()}
    _compare(path, "benchmark", {key: benchmark.get(key) for key in expected}, expected)


class Store:
    """The folder of a study while it runs.

    Args:
        found: what `identity` gives.
        settings: settings to be measured; others of an earlier run stay.
        models: name → what identifies a model.

    Raises:
        KeyeError: the folder has another benchmark, other questions, or a setting or model of the same name that
            differs; or it is not writable.
    """

    def __init__(self, out: str | Path, found: dict, settings: Sequence[Setting], models: Mapping[str, Any]) -> None:
        self.out = Path(out)
        self.path = self.out / LINES
        wanted = {**found, "settings": {one.label: one.resolved() for one in settings}, "models": dict(models)}
        wanted = json.loads(json.dumps(wanted))
        with writing(self.out, "the study"):
            self.out.mkdir(parents=True, exist_ok=True)
            place = self.out / STUDY
            before = read_study(self.out) if place.exists() else None
            if before:
                for key, value in list(wanted.items()):
                    grown = {**value, **before[key]} if key in GROWS else before[key]
                    _compare(place, key, before[key], value, only=value if key in GROWS else None)
                    wanted[key] = grown
                wanted["runs"] = before["runs"]
            elif self.path.exists():
                raise KeyeError(f"{self.path} has no {STUDY} beside it; give an empty folder with --out")
            write_atomically(place, json.dumps(wanted, indent=1, ensure_ascii=False) + "\n")
            self._done: dict[str, list[Key]] = {}
            for line in self._recovered():
                self._done.setdefault(line["id"], []).append(key_of(line))

    def add_run(self, facts: Mapping[str, Any]) -> None:
        """Note in `study.json` how results were made: command, date, cores and seconds."""
        study = json.loads((self.out / STUDY).read_text(encoding="utf-8"))
        study["runs"] = [*study.get("runs", []), dict(facts)]
        with writing(self.out, "the study"):
            write_atomically(self.out / STUDY, json.dumps(study, indent=1, ensure_ascii=False) + "\n")

    def done_of(self, question: str) -> list[Key]:
        """The lines that exist of a question."""
        return self._done.get(question, [])

    def _recovered(self) -> list[dict]:
        """The complete lines; an incomplete one, which a killed process leaves, is removed from the file."""
        if not self.path.exists():
            return []
        lines, broken = [], False
        for text in self.path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
            try:
                lines.append(json.loads(text) if text.endswith("\n") else None)
            except ValueError:
                lines.append(None)
            broken |= lines[-1] is None
        lines = [line for line in lines if line is not None]
        if broken:
            with atomic_file(self.path) as part:
                part.write_text("".join(map(_text, lines)), encoding="utf-8")
        return lines


def append(path: Path, lines: Iterable[dict]) -> None:
    """Append lines for one clip and setting in one write; processes may append to one file at a time."""
    data = "".join(map(_text, lines)).encode()
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def key_of(line: Mapping[str, Any]) -> Key:
    """(question, setting, answerer) of a line."""
    return line["id"], line["setting"], line["by"]


def read_study(folder: Path) -> dict[str, Any]:
    """`study.json` of a folder.

    Raises:
        KeyeError: it is missing or damaged.
    """
    path = folder / STUDY
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {**{key: found[key] for key in ("benchmark", "questions", "settings", "models")},
                "runs": found.get("runs", [])}  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise KeyeError(f"{path} is no study ({type(error).__name__}); give the folder of keye ablate --out") from error


def read_predictions(folder: str | Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(study, lines) of a folder with `predictions.jsonl` or `predictions.parquet`, checked against the benchmark.

    Raises:
        KeyeError: files are missing or damaged, or version, checksum or settings do not match.
    """
    folder = Path(folder)
    study = read_study(folder)
    check_benchmark(folder / STUDY, study)
    path = folder / LINES if (folder / LINES).exists() else folder / TABLE
    try:
        if path.name == LINES:
            texts = path.read_text(encoding="utf-8").splitlines()
            lines = [json.loads(text) for text in texts if text.endswith("}")]
        else:
            from pyarrow import parquet

            lines = parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        raise KeyeError(f"{path} cannot be read ({error}); run keye ablate --benchmark with this --out") from error
    unique = {key_of(line): line for line in lines}
    for line in unique.values():
        expected = study["benchmark"]["checksums"].get(line["family"], "")[:12]
        version = study["benchmark"]["version"]
        if line["checksum"] != expected or line["version"] != version:
            raise KeyeError(
                f"{path}, key checksum: the answer to {line['id']} is to version {line['version']}, checksum"
                f" {line['checksum']}, and {STUDY} has version {version}, {expected};"
                " delete the folder and run the study again"
            )
        if line["setting"] not in study["settings"]:
            raise KeyeError(
                f"{path}, key setting: {line['setting']!r} is not in {STUDY}; delete the folder and run the study again"
            )
    return study, list(unique.values())


def write_table(path: str | Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as Parquet; KeyeError if the file cannot be written."""
    import pyarrow
    from pyarrow import parquet

    with writing(path, "the table"), atomic_file(path) as part:
        table = pyarrow.Table.from_pylist([dict(line) for line in lines])
        parquet.write_table(table, part, compression="zstd", compression_level=12)


def _text(line: Mapping[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False) + "\n"


def _compare(path: Path, key: str, before: Any, now: Any, only: Iterable[str] | None = None) -> None:
    """Raise a KeyeError at the first key that differs; `only`: keys that must be equal where both have them."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in before.keys() | now.keys() if only is None else before.keys() & now.keys():
            _compare(path, f"{key}.{name}", before.get(name), now.get(name))
    elif before != now:
        raise KeyeError(
            f"{path}, key {key}: the study has {before!r:.80}, and it is now {now!r:.80}; results of both cannot be"
            " compared, so give another folder with --out, or the version and options that made this one"
        )
