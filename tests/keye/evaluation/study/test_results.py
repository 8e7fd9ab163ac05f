"""The committed study: its tables come from the committed predictions, and it is small."""

import csv
from pathlib import Path

from keye.evaluation.study import write_tables

RESULTS = Path(__file__).resolve().parents[4] / "docs/results/ablation"


def test_the_tables_of_the_results_come_from_the_committed_predictions(tmp_path):
    write_tables(RESULTS, tmp_path)
    for name in ("rows.csv", "pairs.csv"):
        found, expected = (list(csv.DictReader((folder / name).open())) for folder in (tmp_path, RESULTS))
        assert len(found) == len(expected) > 100
        for row in (*found, *expected):  # another version of numpy may draw other resamples
            del row["low"], row["high"]
        assert found == expected
    assert sum(path.stat().st_size for path in RESULTS.iterdir()) < 2_000_000
