"""Part a: the tests that need a GPU (`@pytest.mark.cuda`), one file after the other, each in a process of its own.

Without a GPU they are skipped, and the record says so.
"""

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from keye.errors import KeyeError, run
from scripts.bench.common.record import ROOT, Claim, Table
from scripts.bench.gpu.journal import Journal, Values, parser

PART = "cuda_tests"
MARK = "@pytest.mark." + "cuda"  # in two pieces, so that this file is not found
PATIENCE = 240  # seconds of one file
SMALL_FILES = 2
COLUMNS = ("file", "passed", "failed", "skipped", "seconds", "first failure, or reason of the skips")
NOTES = ["A file that is not finished after four minutes is stopped and counts as failed."]


def files() -> list[str]:
    """The files with marked tests, relative to the repository."""
    folder = ROOT / "tests"
    return sorted(str(p.relative_to(ROOT)) for p in folder.rglob("test_*.py") if MARK in p.read_text(encoding="utf-8"))


def measure(file: str) -> Values:
    """Counts of one file.

    Raises:
        KeyeError: the process ended without a report.
    """
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider", f"--junitxml={report}"]
        try:
            done = subprocess.run(
                [*command, file], capture_output=True, text=True, check=False, cwd=ROOT, timeout=PATIENCE,
                env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "4")},
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise KeyeError(f"{file} did not finish in {PATIENCE} s; run it alone with pytest -m cuda") from None
        if not report.exists():
            last = (done.stdout + done.stderr).strip().splitlines() or ["no output"]
            raise KeyeError(f"{file} ended with code {done.returncode} and without a report: {last[-1][:200]}")
        return counts(report)


def counts(report: Path) -> Values:
    """Counts and the first reason of a JUnit report."""
    suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
    cases = list(suite.iter("testcase"))
    bad = [(case, why) for case in cases for kind in ("failure", "error") if (why := case.find(kind)) is not None]
    skipped = [why for case in cases if (why := case.find("skipped")) is not None]
    reason = ""
    if bad:
        case, why = bad[0]
        reason = f"{case.get('name')}: {(why.get('message') or 'no reason given').strip().splitlines()[0][:200]}"
    elif skipped:
        reason = "; ".join(sorted({(why.get("message") or "").strip() for why in skipped}))[:200]
    return {
        "passed": len(cases) - len(bad) - len(skipped),
        "failed": len(bad),
        "skipped": len(skipped),
        "seconds": float(suite.get("time", 0)),
        "reason": reason,
    }


def main() -> int:
    args = parser(__doc__, PART).parse_args()
    journal = Journal.open(args, PART)
    names = files()[: SMALL_FILES if journal.small else None]

    def tables() -> list[Table]:
        kinds = ("passed", "failed", "skipped")
        rows = [
            (name, *(found[kind] for kind in kinds), f"{found['seconds']:.1f}", found["reason"] or "–")
            for name, found in journal.found.items()
        ]
        return [Table("Tests that need a GPU", COLUMNS, rows)]

    journal.tables = tables
    for name in names:
        journal.row(name, lambda name=name: measure(name))
    sums = {kind: sum(found[kind] for found in journal.found.values()) for kind in ("passed", "failed", "skipped")}
    figure = f"{sums['passed']} passed, {sums['failed']} failed, {sums['skipped']} skipped"
    met = not sums["failed"] and not journal.failed and sums["passed"] > 0
    notes = [*NOTES, *([f"Only the first {SMALL_FILES} files."] if journal.small else [])]
    journal.save([Claim("tests that need a GPU", "all pass", figure, met=met)], notes)
    return 0


if __name__ == "__main__":
    run(main)
