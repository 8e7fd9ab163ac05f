"""Files and tests that the documents name exist.

A file is `folder/name.py` from the root or the end of such a path; NAME is a placeholder. A test is
`folder/test_name.py::test_function`, or `::test_function` after the file in the same line, or a function alone, which
may be in any test file.
"""

import re
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "scripts/bench/README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FOLDERS = ("keye", "stages", "rl", "scripts", "tests", "docs")
PATH = re.compile(rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w./-]*\w|(?<![\w./*-])[\w/]+\.py\b")
NAME = re.compile(r"::(\w+)|(?<![\w/.])(test_\w+)\b(?!\.py|[\w/])")
DEFINED = re.compile(r"^ *(?:async )?(?:def|class) (\w+)", re.MULTILINE)


def python_files() -> dict[str, set[str]]:
    """Path from the root → names that the file defines, of every Python file of the project."""
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    return {str(p.relative_to(ROOT)): set(DEFINED.findall(p.read_text(encoding="utf-8"))) for p in paths}


def missing(text: str, files: dict[str, set[str]], folder: Path = ROOT) -> list[str]:
    """Every file and test that the text names and the project does not have, as `line: name`.

    Args:
        text: a document. files: see `python_files`. folder: of the document, from which its links start.
    """
    ends, tests = defaultdict(set), defaultdict(list)
    for path, names in files.items():
        parts = path.split("/")
        for start in range(len(parts)):
            ends["/".join(parts[start:])] |= names
        for name in names if parts[0] == "tests" else ():
            tests[name].append(path)
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        tokens = sorted([*PATH.finditer(line), *NAME.finditer(line)], key=lambda match: match.start())
        latest = ""
        for token in tokens:
            name = token[0]
            if token.re is PATH:
                latest = name
                exists = name in ends or (ROOT / name).exists() or (folder / name).exists() or "NAME" in name
            else:
                name = token[1] or token[2]
                known = ends[latest] if token[1] and latest in ends else tests
                exists = name in known or f"{name}.py" in ends
                elsewhere = f", which is in {', '.join(sorted(tests[name]))}" if name in tests else ""
                name = f"{latest if token[1] else ''}::{name}{elsewhere}"
            if not exists:
                found.append(f"{number}: {name}")
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_tests_of_the_documents_exist(document):
    assert missing(document.read_text(encoding="utf-8"), python_files(), document.parent) == []


def test_a_wrong_reference_is_found():
    files = {"keye/cli.py": {"main"}, "tests/keye/test_cli.py": {"test_help"}, "tests/test_a.py": {"test_other"}}
    right = "`cli.py`, `keye/cli.py::main`, tests/keye/test_cli.py::test_help, ::test_help, `test_other`, docs/results"
    assert missing(right, files) == []
    wrong = "keye/nothing.py\ncli.py::no\ntest_cli.py::test_other\n`test_third`\n`tests/nowhere`"
    assert missing(wrong, files) == [
        "1: keye/nothing.py", "2: cli.py::no", "3: test_cli.py::test_other, which is in tests/test_a.py",
        "4: ::test_third", "5: tests/nowhere",
    ]  # fmt: skip
