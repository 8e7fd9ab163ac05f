"""Docstrings, comments, strings, names and documents contain no uncommon words; WORDS has alternatives."""

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("keye", "stages", "rl", "scripts", "docs")
SUFFIXES = {".py", ".md", ".toml", ".css", ""}  # scripts/demo and its neighbours have no suffix

WORDS = {
    "aforesaid": "this",
    "alas": "",
    "albeit": "although",
    "alike": "similar, the same, equally",
    "anew": "again",
    "aright": "correctly",
    "aught": "anything",
    "behold": "see",
    "betwixt": "between",
    "bidden": "asked",
    "dealt": "assigned, divided",
    "dear": "expensive",
    "dearer": "more expensive",
    "dearest": "most expensive",
    "economise": "save",
    "erstwhile": "former",
    "forthwith": "immediately",
    "hereby": "",
    "herein": "here",
    "hitherto": "so far",
    "lest": "so that … not",
    "mended": "fixed, corrected",
    "naught": "zero",
    "nought": "zero",
    "oft": "often",
    "reckon": "estimate, compute",
    "reckoned": "estimated, computed",
    "shalt": "",
    "sundry": "several",
    "thence": "from there",
    "thereof": "of it",
    "thither": "there",
    "told": "given, named, reported, set",
    "unto": "to",
    "whence": "from where, source",
    "whereby": "by which",
    "wherefore": "why",
    "wherein": "in which",
    "whereof": "of which",
    "whilst": "while",
    "whither": "where",
    "withal": "",
    "wont": "",
    "wrought": "made",
}
"""Uncommon word → what to write instead."""

PATTERN = re.compile(rf"(?<![A-Za-z]){'(?:' + '|'.join(WORDS) + ')'}(?![A-Za-z])", re.IGNORECASE)

FORMER_KEYS = re.compile(r"[\"'`]alike[\"'`]|alike(?= ?=)|\.alike\b")
"""Former names in recipes, which are still read."""


def files() -> list[Path]:
    found = [ROOT / "README.md", *(path for name in FOLDERS for path in (ROOT / name).rglob("*") if path.is_file())]
    return [p for p in found if p.suffix in SUFFIXES and "__pycache__" not in p.parts]


def words_of(text: str) -> Iterator[tuple[int, str]]:
    """(line number, word) of every uncommon word, in code and in prose."""
    for number, line in enumerate(text.splitlines(), 1):
        for found in PATTERN.finditer(FORMER_KEYS.sub("", line)):
            yield number, found[0]


def test_no_uncommon_words():
    found = []
    for path in files():
        name = str(path.relative_to(ROOT))
        for number, word in words_of(path.read_text(encoding="utf-8")):
            found.append(f"{name}:{number}: {word!r}; write: {WORDS[word.lower()] or 'nothing'}")
    assert not found, "\n".join(found)


def test_an_uncommon_word_is_found_in_code_and_prose():
    text = "told = 1\nUntold.\n# Whence it came\nrecipe.alike\n"
    assert list(words_of(text)) == [(1, "told"), (3, "Whence")]
