"""Results of the benches: a JSON file for each part with its claims and tables, and a document for each group.

A part is a module, `python -m scripts.bench.<group>.<part> [--quick] [--out DIR]`, that writes DIR/<part>.json.
scripts/bench/README.md describes the format.
"""

import argparse
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from keye.files import write_atomically

ROOT = Path(__file__).resolve().parents[3]
RESULTS = ROOT / "docs" / "results"
OUT = RESULTS / "encoder"
QUICK_OUT = ROOT / ".cache" / "bench" / "quick"
SHOWN = (
    "keye-vl-utils", "decord", "opencv-python-headless", "scikit-image", "torch", "transformers", "numpy", "av"
)  # fmt: skip
LOAD = os.getloadavg()[0]  # before this part adds its own load


@dataclass(frozen=True)
class Claim:
    """One claim, its goal, the measured figure and whether it meets the goal (None: there is no goal; or "open")."""

    claim: str
    goal: str
    figure: str
    ratio: str = ""
    met: bool | str | None = None


@dataclass(frozen=True)
class Table:
    """A table of figures in the document."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | int | float]]


def arguments(about: str, examples: str = "", results: str = "encoder") -> argparse.ArgumentParser:
    """A parser with the options of every part; `results` is its folder in docs/results."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=about, epilog=examples, formatter_class=layout)
    parser.add_argument(
        "--quick", action="store_true", help="a fraction of the work, as a smoke test; the figures are meaningless"
    )
    parser.add_argument(
        "--out", type=Path, help=f"where the JSON goes (docs/results/{results}, or .cache with --quick)"
    )
    parser.set_defaults(results=results)
    return parser


def run_parts(modules: dict[str, str], options: Sequence[str]) -> list[str]:
    """Run the parts (part → module) sequentially, each in its own process; returns those that failed."""
    failed = []
    for number, (part, module) in enumerate(modules.items(), 1):
        print(f"\n[{number}/{len(modules)}] {part}", flush=True)
        began = time.monotonic()
        if subprocess.run([sys.executable, "-m", module, *options], check=False, cwd=ROOT).returncode:
            failed.append(part)
        print(f"      {time.monotonic() - began:.0f} s", flush=True)
    return failed


def forget_other_code(scratch: Path, packages: Sequence[str] = ("keye", "stages")) -> None:
    """Delete saved measurements in `scratch` if they were taken with other code of the packages or files."""
    digest = hashlib.sha256()
    found = {
        path for each in packages for path in ((ROOT / each).rglob("*.py") if (ROOT / each).is_dir() else [ROOT / each])
    }
    for path in sorted(found):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    mark = scratch / "code.txt"
    if not mark.exists() or mark.read_text() != digest.hexdigest():
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        mark.write_text(digest.hexdigest())


def out_of(args: argparse.Namespace) -> Path:
    """The folder of the results."""
    quick = QUICK_OUT if args.results == "encoder" else QUICK_OUT.with_name(f"quick_{args.results}")
    return args.out or (quick if args.quick else RESULTS / args.results)


def save(
    out: Path,
    part: str,
    claims: Sequence[Claim],
    tables: Sequence[Table] = (),
    *,
    seconds: float,
    quick: bool,
    seeds: dict[str, int | str] | None = None,
    notes: Sequence[str] = (),
) -> Path:
    """Write `<out>/<part>.json` atomically, print the claims, and return the path.

    seconds: duration of the measurement. seeds: name → seed. notes: sentences below the tables.
    """
    record = {
        "part": part,
        "command": command(),
        "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
        "seconds": round(seconds, 1),
        "quick": quick,
        "machine": machine(),
        "versions": versions(),
        "seeds": seeds or {},
        "claims": [asdict(claim) for claim in claims],
        "tables": [asdict(table) for table in tables],
        "notes": list(notes),
    }
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{part}.json"
    write_atomically(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    for claim in claims:
        print(f"{_mark(claim.met):8} {claim.claim}: {claim.figure} (goal: {claim.goal})", flush=True)
    return path


def command() -> str:
    """The command line of this process, without --out and --parent, which say nothing of the measurement."""
    words = sys.argv[1:]
    for option in ("--out", "--parent"):
        if option in words:
            at = words.index(option)
            words = words[:at] + words[at + 2 :]
    spec = sys.modules["__main__"].__spec__
    name = spec.name.removesuffix(".__main__") if spec else "scripts.bench"
    return " ".join(["python", "-m", name, *map(shlex.quote, words)])


def machine() -> dict[str, str | int | float]:
    """Available cores, processor, memory, system and the load before the start, without the machine's name."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cores": cores,
        "cpu": _line("/proc/cpuinfo", "model name") or platform.machine(),
        "ram_gb": round(int((_line("/proc/meminfo", "MemTotal") or "0 kB").split()[0]) / 2**20, 1),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "load": round(LOAD, 2),
    }


def _line(path: str, key: str) -> str:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


def versions() -> dict[str, str]:
    """Package → version of the compared packages and their main dependencies, if installed."""
    site = ROOT / ".cache" / "bench" / "site"
    if str(site) not in sys.path:
        sys.path.append(str(site))  # last: the environment's packages take precedence
    found = {}
    for name in SHOWN:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def document(out: Path, order: Sequence[str], head: str) -> str:
    """The Markdown document: the head, a table of all claims, then every part with its tables, in `order`."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("*.json"))}
    records = [found[part] for part in order if part in found and "claims" in found[part]]
    lines = [
        *head.splitlines(),
        "",
        "| claim | goal | measured | ratio | goal met |",
        "|---|---|---|---|---|",
    ]
    for record in records:
        for claim in record["claims"]:
            cells = [claim["claim"], claim["goal"], claim["figure"], claim["ratio"], _mark(claim["met"])]
            lines.append(_row(cells))
    missing = [part for part in order if part not in {record["part"] for record in records}]
    if missing:
        lines += ["", f"Not measured yet: {', '.join(missing)}."]
    for record in records:
        lines += ["", *_section(record)]
        if (picture := out / f"{record['part']}.png").exists():
            lines += ["", f"![{record['tables'][0]['title']}]({out.name}/{picture.name})"]
    return "\n".join(lines) + "\n"


def _section(record: dict) -> list[str]:
    machine_line = "{cores} cores of {cpu}, {ram_gb} GB, {system}; load {load} at the start".format(**record["machine"])
    quick = " **Quick: a fraction of the work; the figures are meaningless.**" if record["quick"] else ""
    lines = [
        f"## {record['part'].capitalize()}",
        "",
        f"`{record['command']}` · {record['date']} · {record['seconds']:.0f} s · {machine_line}.{quick}",
        "",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in record["versions"].items()) + ".",
    ]
    if record["seeds"]:
        lines[-1] += " Seeds: " + ", ".join(f"{name} {seed}" for name, seed in record["seeds"].items()) + "."
    for table in record["tables"]:
        lines += ["", *markdown(Table(**table))]
    for note in record["notes"]:
        lines += ["", note]
    return lines


def markdown(table: Table) -> list[str]:
    """The Markdown lines of a table and its title."""
    head = [f"{table.title}:", "", _row(table.columns), _row(["---"] * len(table.columns))]
    return [*head, *(_row(row) for row in table.rows)]


def _row(cells: Sequence[object]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def _mark(met: bool | str | None) -> str:
    return met if isinstance(met, str) else {True: "yes", False: "**no**", None: "–"}[met]
