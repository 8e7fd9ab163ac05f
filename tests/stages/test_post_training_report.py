"""The report's sections on post-training: every curve that a phase has logged, and the held-out gain of each family."""

import json
import re

from stages.report import page as report
from tests.stages.test_report import write_jsonl

SUMMARY = {"reward_mean": 0.5, "reward_stderr": 0.02, "accuracy_mean": 0.4, "accuracy_stderr": 0.02}


def evaluated(folder, gain: float, **more) -> None:
    after = SUMMARY | {"reward_mean": 0.5 + gain, "accuracy_mean": 0.4 + gain}
    families = [{"families": {"count": {"n": 30, **values}}} for values in (SUMMARY, after)]
    result = {"questions": 30, "before": SUMMARY | families[0], "after": after | families[1], "gain": gain}
    (folder / "eval.json").write_text(json.dumps(result | {"gain_stderr": 0.03, "rejected": [], "steps": 6} | more))


def gspo_rows(steps: int) -> list[dict]:
    return [
        {"step": i, "loss": 0.1, "reward_mean": 0.4 + i / 20, "response_length": 10.0 + i, "finished": 0.9}
        | {"entropy": 1.0 / i, "clip_fraction": 0.2, "informative": 0.5, "all_wrong": 0.25, "grad_norm": 1.0}
        | {"seconds_rollout": 2.0, "seconds_update": 1.0, "sampler_difference_mean": 1e-4}
        | ({"gap/smallest": 0.3, "seen": 0.6, "blind/zeroed": 0.3, "heldout/reward_mean": 0.6} if i % 3 == 0 else {})
        for i in range(1, steps + 1)
    ]


def test_gspo_has_a_panel_for_each_curve_and_the_gain_of_each_family(tmp_path):
    write_jsonl(tmp_path / "gspo" / "metrics.jsonl", gspo_rows(6))
    evaluated(tmp_path / "gspo", 0.2, best={"step": 3, "reward_mean": 0.6})
    page = report.write(tmp_path).read_text()
    titles = re.findall(r"<h3>(.*?)</h3>", page)
    wanted = ["Reward", "Groups", "Blindness", "Length of an answer", "Entropy", "Clipped", "Gradient", "Sampler"]
    wanted.append("Time")
    assert [title for title in titles if title in wanted] == wanted
    assert "Reward on held-out questions" in page and "+0.200 ± 0.030" in page
    assert re.search(r"<td>count</td><td>30</td><td>0.500.*?</td><td>0.700", page)
    assert "+0.200</b>" in page, "the tile of the gain"


def test_a_panel_without_its_metric_is_left_out_and_a_run_under_way_says_so(tmp_path):
    rows = [{k: v for k, v in row.items() if "/" not in k and k not in ("seen", "all_wrong")} for row in gspo_rows(2)]
    write_jsonl(tmp_path / "gspo" / "metrics.jsonl", rows)
    page = report.write(tmp_path).read_text()
    assert "<h3>Blindness</h3>" not in page and "all wrong" not in page and "<h3>Entropy</h3>" in page
    assert "not been measured yet" in page


def test_sft_and_mpo_have_sections_in_the_order_of_the_phases(tmp_path):
    write_jsonl(tmp_path / "sft" / "metrics.jsonl", [{"step": i, "loss": 2.0 / i, "tokens": 10} for i in (1, 2)])
    row = {"loss": 1.0, "preference": 0.7, "quality": 0.6, "generation": 0.5, "reward_chosen": 0.1}
    row |= {"reward_rejected": -0.1, "margin": 0.2, "reward_accuracy": 0.8}
    write_jsonl(tmp_path / "mpo" / "metrics.jsonl", [{"step": i, **row} for i in (1, 2)])
    write_jsonl(tmp_path / "gspo" / "metrics.jsonl", gspo_rows(2))
    evaluated(tmp_path / "mpo", -0.1)
    page = report.write(tmp_path).read_text()
    titles = re.findall(r"<h2>(.*?)</h2>", page)
    assert [title for title in titles if title in ("SFT", "MPO", "GSPO")] == ["SFT", "MPO", "GSPO"]
    assert "-0.100 ± 0.030" in page
    assert "<h3>Implicit rewards</h3>" in page and "<h3>Pairs in the right order</h3>" in page
