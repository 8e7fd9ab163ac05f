"""The report: complete for a partial run, self-contained, and explicit about what was not learnt."""

import json
import math
import re

import pytest

from keye.errors import CheckpointError
from keye.evaluation import Score
from stages.commands import report as command
from stages.metrics import read_metrics
from stages.report import findings
from stages.report import page as report
from stages.report.charts import Series, line_chart, smooth, ticks


def write_evaluation(run, name: str, shares: dict[str, float], n: int = 100) -> None:
    (run / "evaluation").mkdir(exist_ok=True)
    families = {
        family: {"n": n, "accuracy": share, "stderr": 0.04, "chance": 0.25, "majority": 0.3}
        for family, share in shares.items()
    }
    (run / "evaluation" / f"{name}.json").write_text(json.dumps({"families": families}))


def write_jsonl(path, rows: list[dict]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_an_empty_run_has_every_section_as_not_run(tmp_path):
    page = report.write(tmp_path).read_text()
    assert page.count("Not run yet.") == 4 and "GSPO" not in page  # the four stages, without the demo's sections
    (tmp_path / "plans").mkdir()
    page = report.write(tmp_path).read_text()
    assert page.count("Not run yet.") == 8 + 4  # with all sections of a demo


RECIPE = """
name = "mine"
[[data.sources]]
path = "a.jsonl"
kind = "video"
[[data.sources]]
path = "b.jsonl"
kind = "text"
[annealing]
steps = 8
learning_rate = 1e-3
context = 4096
context_schedule = { 1024 = 4 }
mixture = { video = 0.6, text = 0.4 }
"""


def test_a_training_run_shows_shares_speed_and_skipped_steps(tmp_path):
    (tmp_path / "recipe.toml").write_text(RECIPE)
    rows = [
        {"step": i, "loss": 4 - i / 2, "tokens": 100}
        | {"tokens_video": 70 if i < 3 else 50, "tokens_text": 30 if i < 3 else 50}
        | {"seconds": 2.0, "tokens_per_second": 50.0, "mfu": 0.4, "stall_share": 0.125, "stall_seconds": 0.25}
        | {"skipped": "loss 9 is 4.5 times its running median" if i == 2 else "", "not_finite": 0}
        for i in range(1, 5)
    ]  # fmt: skip
    write_jsonl(tmp_path / "annealing-1024" / "metrics.jsonl", rows)
    (tmp_path / "annealing-1024" / "peak.json").write_text(
        json.dumps({"peak_flops": 2e12, "peak_source": "a measured <product>", "processes": 2})
    )
    bad = [{"file": "/a/b.jsonl", "line": line, "reason": f"/x/{line}.mp4: no such file"} for line in (3, 7)]
    write_jsonl(tmp_path / "annealing-1024" / "quarantine.jsonl", bad)
    page = report.write(tmp_path).read_text()
    assert "<b>4 of 12</b>" in page and "<b>12.5 %</b>" in page  # steps of the chain; waiting for data
    assert "Stage 3 · annealing, 1,024 tokens" in page and page.count("Not run yet.") == 1  # the last phase
    assert "<td>video</td><td>60.0 %</td><td>60.0 %</td><td>0.0 %</td>" in page
    assert "<td>50</td><td>40.0 %</td><td>12.5 %</td><td>2.00 s</td>" in page
    assert "2 TFLOP/s over 2 processes, a measured &lt;product&gt;." in page
    assert "<td>2</td><td>loss 9 is 4.5 times its running median</td>" in page
    assert "<td>2</td><td>…: no such file</td>" in page or "<td>2</td><td>… no such file</td>" in page


def test_a_folder_that_is_no_run_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["keye report", str(tmp_path)])
    (tmp_path / "notes").mkdir()
    with pytest.raises(CheckpointError, match="is not a run: it has neither recipe.toml nor"):
        command.main()
    assert not (tmp_path / "report.html").exists()
    (tmp_path / "recipe.toml").write_text("seed = 3\n")
    command.main()
    assert (tmp_path / "report.html").is_file()


def test_the_page_is_self_contained(tmp_path):
    write_evaluation(tmp_path, "annealing", {"count": 0.9})
    write_jsonl(tmp_path / "vision" / "metrics.jsonl", [{"step": i, "loss": 1 / i} for i in range(1, 9)])
    page = report.write(tmp_path).read_text()
    assert not re.search(r'(src|href)="(?!data:)', page) and "<script" not in page and "url(" not in page


def test_families_not_learnt_are_named(tmp_path):
    write_evaluation(tmp_path, "annealing", {"count": 0.9, "motion": 0.27})
    write_evaluation(tmp_path, "annealing_blind", {"count": 0.2, "motion": 0.25})
    write_evaluation(tmp_path, "annealing_zeroed", {"count": 0.2, "motion": 0.25})
    page = report.write(tmp_path).read_text()
    assert "Not learnt in this run: <b>motion</b>" in page


def test_a_recipe_and_names_are_escaped(tmp_path):
    (tmp_path / "recipe.toml").write_text('seed = 3\nname = "<script>"\n')
    page = report.write(tmp_path).read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert "seed of the recipe" in page


@pytest.mark.parametrize(
    ("before", "blind", "zeroed", "learnt"),
    [
        (0.90, 0.20, 0.20, True),
        (0.27, 0.10, 0.10, False),  # not above chance, 0.25
        (0.60, 0.52, 0.25, False),  # not above blind: the answers can be guessed without the video
        (0.98, 0.10, 0.97, False),  # not above zeroed pixels: the answers can be read from frame types and seconds
        (0.90, None, 0.20, False),  # not yet known
        (0.90, 0.20, None, False),
    ],
)
def test_learnt_means_two_standard_errors_above_chance_and_both_controls(before, blind, zeroed, learnt):
    def score(accuracy):
        return None if accuracy is None else Score(n=100, accuracy=accuracy, stderr=0.04, chance=0.25, majority=0.3)

    finding = findings.FamilyFinding("x", score(before), score(blind), score(zeroed), None)
    assert finding.learnt is learnt


def test_a_family_without_pictures_is_compared_with_chance(tmp_path):
    write_evaluation(tmp_path, "annealing", {"count": 0.9, "text": 0.8})
    assert not any(f.learnt for f in findings.families(tmp_path))
    write_evaluation(tmp_path, "annealing_blind", {"count": 0.2})
    write_evaluation(tmp_path, "annealing_zeroed", {"count": 0.2})
    assert [f.learnt for f in findings.families(tmp_path)] == [True, True]


def test_reward_rose_only_if_by_more_than_two_standard_errors(tmp_path):
    (tmp_path / "gspo").mkdir()
    for after, rose in ((0.60, True), (0.53, False)):
        sides = {"before": 0.5, "after": after}
        evaluated = {side: {"reward_mean": mean, "reward_stderr": 0.02} for side, mean in sides.items()}
        (tmp_path / "gspo" / "eval.json").write_text(json.dumps(evaluated))
        assert findings.reward(tmp_path).significant is rose


def test_an_incomplete_last_line_of_the_metrics_is_skipped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}]


def test_chart_leaves_a_gap_at_nan_and_draws_one_point():
    chart = line_chart([Series("a", [0, 1, 2, 3, 4], [1, 2, math.nan, 4, 5])], "x", "y")
    assert chart.count("<polyline") == 2
    assert "<circle" in line_chart([Series("a", [1], [0.5], style="marks")], "x", "y")
    assert "no points yet" in line_chart([Series("a", [1], [math.nan])], "x", "y")


def test_ticks_are_round_and_inside():
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(3, 1234) == [500, 1000]


def test_smoothing_neither_lags_nor_changes_a_straight_line():
    line = [3.0 * i for i in range(100)]
    assert smooth(line) == pytest.approx(line)
    assert smooth([0.0, 3.0, 0.0]) == pytest.approx([0.0, 1.0, 0.0])


@pytest.mark.parametrize("name", ["environment.json", "steps/plan.json", "plans/clip.json"])
def test_a_damaged_result_is_named(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text('{"python": "3.1')
    with pytest.raises(CheckpointError, match=rf"{name}: not JSON .*; remove it"):
        report.write(tmp_path)
