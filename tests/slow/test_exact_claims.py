"""The exact claims of the benches hold at a reduced size; docs/results has their figures at full size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("encoder.identity", "encoder.budget", "encoder.decoding", "encoder.fuzz", "model.parity", "stages.kills")
"""The parts whose claims are equalities or counts of failures, and no speed or memory."""


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_exact_claims_hold(part, tmp_path):
    command = [sys.executable, "-m", f"scripts.bench.{part}", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    claims = json.loads((tmp_path / f"{part.split('.')[1]}.json").read_text(encoding="utf-8"))["claims"]
    assert claims and not [claim for claim in claims if claim["met"] is False]
