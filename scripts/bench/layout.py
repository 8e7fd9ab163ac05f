"""Measures the repository's structure at one or more commits, and writes docs/results/layout.md.

    python -m scripts.bench.layout c5f0c08 HEAD          # before and after
    python -m scripts.bench.layout HEAD --circles        # only the import circles

Imports inside functions and under TYPE_CHECKING count, too.
"""

import argparse
import ast
import re
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from io import BytesIO
from pathlib import Path

from keye.errors import KeyeError, run
from scripts.bench.common.record import RESULTS, ROOT

PACKAGES = ("keye", "stages", "rl", "scripts")


def modules(root: Path) -> dict[str, Path]:
    """Module → its file, of the product's packages."""
    files = [file for package in PACKAGES for file in sorted((root / package).rglob("*.py"))]
    return {".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def imports(root: Path) -> dict[str, set[str]]:
    """Module → the product's modules that it imports, wherever in the file."""
    known = modules(root)

    def nearest(name: str) -> str:
        while name and name not in known:
            name = name.rpartition(".")[0]
        return name

    graph: dict[str, set[str]] = {}
    for module, file in known.items():
        found = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= {name if name in known else node.module for name in names}
        mine = {nearest(name) for name in found if name.split(".")[0] in PACKAGES}
        graph[module] = mine - {module, ""}
    return graph


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one import circle in order; empty where there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Groups of modules that import each other, directly or by others: strongly connected ones of two or more."""

    def reached(start: str) -> set[str]:
        seen, todo = set(), [start]
        while todo:
            for module in graph.get(todo.pop(), ()):
                if module not in seen:
                    seen.add(module)
                    todo.append(module)
        return seen

    behind = {module: reached(module) for module in graph}
    groups = {frozenset({module, *(other for other in behind[module] if module in behind[other])}) for module in graph}
    return sorted((set(group) for group in groups if len(group) > 1), key=sorted)


def _lines(files: list[Path]) -> int:
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)


def import_seconds(roots: dict[str, Path], rounds: int = 7) -> dict[str, float]:
    """Median seconds of `from keye import SlowFastEncoder` in a process of its own, the checkouts in turn."""
    taken: dict[str, list[float]] = {name: [] for name in roots}
    for number in range(rounds + 1):
        for name in roots if number % 2 else reversed(roots):
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", "from keye import SlowFastEncoder"], cwd=roots[name], check=True)
            if number:  # the first round fills the caches
                taken[name].append(time.perf_counter() - began)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def measure(root: Path) -> dict[str, str]:
    """What is counted → its value in words."""
    files = list(modules(root).values())
    product = [file for file in files if file.relative_to(root).parts[0] != "scripts"]
    bench = [file for file in files if file.relative_to(root).parts[:2] == ("scripts", "bench")]
    tests = sorted((root / "tests").rglob("*.py"))
    folders = Counter(str(file.parent.relative_to(root)) for file in files if file.name != "__init__.py")
    long = [file for file in product if len(file.read_text(encoding="utf-8").splitlines()) > 400]
    edits = sum(bool(re.search(r"^\s*sys\.path\.insert", file.read_text(encoding="utf-8"), re.M)) for file in files)
    groups = circles(imports(root))
    return {
        "files in the largest folders": ", ".join(f"{name} {count}" for name, count in folders.most_common(5)),
        "folders with more than ten files": str(sum(count > 10 for count in folders.values())),
        "import circles (groups of files)": str(len(groups)),
        "files in a circle": str(sum(map(len, groups))),
        "files above 400 lines": str(len(long)),
        "lines of keye, stages and rl": f"{_lines(product):,}",
        "lines of scripts/bench": f"{_lines(bench):,} in {len(bench)} files",
        "lines of tests": f"{_lines(tests):,}",
        "scripts that edit sys.path": str(edits),
    }


def _checkout(commit: str, folder: Path) -> Path:
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True)
    if archive.returncode:
        raise KeyeError(f"{commit} is no commit here: {archive.stderr.decode().strip()}; name one that git log shows")
    tarfile.open(fileobj=BytesIO(archive.stdout)).extractall(folder, filter="data")
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commits", nargs="+", metavar="COMMIT")
    parser.add_argument("--circles", action="store_true", help="print the import circles and stop")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        roots = {commit: _checkout(commit, Path(folder) / str(place)) for place, commit in enumerate(args.commits)}
        if args.circles:
            for commit, root in roots.items():
                print(*(f"{commit}: {', '.join(sorted(group))}" for group in circles(imports(root))), sep="\n")
            return 0
        found = {commit: measure(root) for commit, root in roots.items()}
        for commit, seconds in import_seconds(roots).items():
            found[commit]["`from keye import SlowFastEncoder`"] = f"{seconds:.2f} s"
    names = next(iter(found.values()))
    rows = [f"| {name} | " + " | ".join(values[name] for values in found.values()) + " |" for name in names]
    head = ["| | " + " | ".join(found) + " |", "|---" * (len(found) + 1) + "|"]
    path = RESULTS / "layout.md"
    text = path.read_text(encoding="utf-8") if path.exists() else "# Layout\n\n"
    before = text.partition("<!-- figures -->")[0]
    after = text.partition("<!-- end -->")[2]
    command = f"`python -m scripts.bench.layout {' '.join(args.commits)}`"
    body = "\n".join([command, "", *head, *rows])
    path.write_text(f"{before}<!-- figures -->\n{body}\n<!-- end -->{after or chr(10)}", encoding="utf-8")
    print(body)
    return 0


if __name__ == "__main__":
    run(main)
