"""The examples of a Markdown guide: the blocks under one heading form one script, run in a folder with clips.

Blocks marked python, and the lines of blocks marked bash that call `keye` or a script of this project. Blocks with
"elsewhere" after their language need a network or a GPU; `elsewhere` lists them.

python -m tests.docs.examples docs/encoder.md ["heading" ...]      # in the folder; all headings by default
"""

import os
import re
import runpy
import shlex
import subprocess
import sys
import traceback
from pathlib import Path

from scripts.clips import fetch_clips

ROOT = Path(__file__).resolve().parents[2]


def sections(guide: Path) -> dict[str, str]:
    """The examples under each second-level heading as Python; line numbers are those of the guide."""
    found: dict[str, str] = {}
    title, language = "", None
    for number, line in enumerate(guide.read_text(encoding="utf-8").splitlines()):
        if heading := re.fullmatch(r"## (.+)", line):
            title = heading[1]
        if line.startswith("```"):
            language = line[3:] if language is None else None
        elif language == "bash" and line.startswith("keye "):
            command = shlex.split(line, comments=True)[1:]
            _add(found, title, number, f"from tests.docs import examples; examples.keye({command!r})")
        elif language == "bash" and line.startswith("python scripts/"):
            script, *command = shlex.split(line, comments=True)[1:]
            _add(found, title, number, f"from tests.docs import examples; examples.script({script!r}, {command!r})")
        elif language == "python":
            _add(found, title, number, line)
    return found


def elsewhere(guide: Path) -> list[tuple[str, str]]:
    """(language, text) of the blocks that are not run."""
    return re.findall(r"^```(\w+) elsewhere\n(.*?)^```", guide.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def keye(arguments: list[str]) -> None:
    """Run a `keye` command in this process."""
    import keye.cli

    before = sys.argv
    try:
        code = keye.cli.main(arguments)
    except SystemExit as ended:  # commands of entry points
        code = ended.code
    finally:
        sys.argv = before
    assert not code, f"keye {arguments} ended with {code}"


def script(path: str, arguments: list[str]) -> None:
    """Run a script of this project in this process, because importing its dependencies again takes longer."""
    before, sys.argv = sys.argv, [path, *arguments]
    sys.path.insert(0, str(ROOT / "scripts"))  # as `python scripts/NAME.py` does
    try:
        runpy.run_path(str(ROOT / path), run_name="__main__")
    except SystemExit as ended:
        assert not ended.code, f"{path} {arguments} ended with {ended.code}"
    finally:
        sys.argv = before
        sys.path.remove(str(ROOT / "scripts"))


def _add(found: dict[str, str], title: str, number: int, line: str) -> None:
    """Append the line at its line number in the guide, after empty lines."""
    text = found.get(title, "")
    found[title] = text + "\n" * (number - text.count("\n")) + line + "\n"


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


def run_in(folder: Path, guide: Path, titles: list[str] | None = None, **environment: str) -> str:
    """Run the sections with these titles (default: all) in another process, in the folder; what they print.

    Raises:
        AssertionError: an example fails; the message ends with its output.
    """
    command = [sys.executable, "-m", "tests.docs.examples", str(guide), *(titles or [])]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu", **environment}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
    return done.stdout


def check_contents(guide: Path) -> None:
    """Check that the links at the top of a guide lead to its second-level headings, in their order.

    Raises:
        AssertionError: a link or a heading has no counterpart.
    """
    text = guide.read_text(encoding="utf-8")
    links = re.findall(r"\[([^\]]+)\]\(#([^)]+)\)", text)
    assert [title for title, _ in links] == re.findall(r"^## (.+)$", text, re.MULTILINE)
    for title, anchor in links:
        assert anchor == re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


if __name__ == "__main__":
    failures = run(Path(sys.argv[1]), sys.argv[2:])
    heavy = sorted({"transformers", "datasets", "deepspeed"} & set(sys.modules))
    print(f"== loaded: {' '.join(heavy)}")
    sys.exit(bool(failures))
