"""The Python of a Markdown guide: what stands under one heading is one script, run in a folder with clips.

python -m tests.docs.examples docs/encoder.md ["heading" ...]      # in the folder; all headings by default
"""

import re
import sys
import traceback
from pathlib import Path

from tests.clips import fetch_clips


def sections(guide: Path) -> dict[str, str]:
    """The blocks marked python under each second-level heading, joined; lines keep their numbers."""
    found: dict[str, str] = {}
    title, inside = "", False
    lines = guide.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        if heading := re.fullmatch(r"## (.+)", line):
            title = heading[1]
        if line.startswith("```"):
            inside = line == "```python"
            if inside:  # as many empty lines as stand before it, so that errors name the guide's line
                text = found.setdefault(title, "")
                found[title] += "\n" * (number + 1 - text.count("\n"))
        elif inside:
            found[title] += line + "\n"
    return found


def lay_out(folder: Path) -> None:
    """The files that the examples name: clip.mp4 and a folder of videos."""
    bikes, _, phone = fetch_clips()
    (folder / "videos").mkdir()
    for name, clip in (("clip.mp4", bikes), ("videos/a.mp4", phone), ("videos/b.mp4", bikes)):
        (folder / name).symlink_to(clip)


def run(guide: Path, titles: list[str]) -> list[str]:
    """Run the sections; the titles of those that fail, their errors printed."""
    failed = []
    for title, code in sections(guide).items():
        if titles and title not in titles:
            continue
        print(f"== {title}", flush=True)
        try:
            exec(compile(code, str(guide), "exec"), {"__name__": "__main__"})
        except Exception:
            traceback.print_exc(file=sys.stdout)
            failed.append(title)
    return failed


if __name__ == "__main__":
    failures = run(Path(sys.argv[1]), sys.argv[2:])
    heavy = sorted({"transformers", "datasets", "deepspeed"} & set(sys.modules))
    print(f"== loaded: {' '.join(heavy)}")
    sys.exit(bool(failures))
