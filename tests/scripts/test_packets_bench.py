"""The bench of planning from packets: which half is dropped, intervals, and claims."""

import pytest

from keye import SlowFastEncoder
from keye.world.render import write_mp4
from scripts.bench.encoder import packets, packets_time
from tests.keye.slowfast.test_packets import drawn


@pytest.mark.parametrize(
    ("way", "shown"),
    [("even", [0, 2, 4, 6]), ("similar", [0, 1, 4, 5]), ("tails", [0, 1, 4, 5]), ("runs", [0, 1, 2, 3])],
)
def test_half_of_the_frames_is_shown(way, shown):
    nearby = [0.3, 0.9, 0.8, 0.2, 0.4, 0.95, 0.9]  # of frames 1 to 7 with the one before

    class Clip:
        def __len__(self):
            return 8

        def score(self, before, index):
            assert before == index - 1
            return nearby[before]

    if way in ("tails", "runs"):
        nearby[3] = 0.02  # two runs of four frames
    found = packets_time.Half(0.35, way).decide(Clip(), None)
    assert found.positions == shown and len(found.types) == len(found.scores) == 4
    assert found.types[0] == 0 and (way == "runs" or found.types[found.positions.index(4)] == 0)


def test_the_interval_is_that_of_paired_differences():
    assert packets.interval([True] * 50, [True] * 50) == (0, 0)
    low, high = packets.interval([True, False] * 50, [False, True] * 50)
    assert -25 < low < 0 < high < 25
    assert packets.interval([True] * 20, [False] * 20) == (100, 100)


def result(share: float, hits: list[bool]) -> dict:
    counts = {"seen": sum(hits), "of": len(hits), "recall": sum(hits) / len(hits)}
    return {"share": share, "hits": hits, "changes": {"all": counts, "cuts": counts}}


def test_claims_compare_with_the_best_pixel_measure():
    worse, best = [True] * 18 + [False] * 2, [True] * 20
    measures = {name: result(0.2, worse) for name in (*packets.PIXELS, "uniform", packets.ALONE)}
    measures |= {"packets": result(0.2, worse), "lab": result(0.2, best)}
    claims, (table,) = packets.recall_claims({"hevc": {"20%": measures, "10%": measures}})
    assert len(claims) == 1 and claims[0].met is False and "packets 90%, lab 100%; -10.0 points" in claims[0].figure
    assert len(table.rows) == 2 and all(len(row) == len(table.columns) for row in table.rows)


def test_ratios_are_medians_of_the_rounds():
    seconds = {"bare": [10.0, 20.0, 10.0], "plan": [0.5, 1.0, 2.0], "tails": [6.0, 9.0, 6.0]}
    seconds["needed tails"] = [4.0, 8.0, 5.0]
    rounds = {name: [{"seconds": 2 * one, "cpu": one} for one in values] for name, values in seconds.items()}
    rounds["needed tails"][0]["needed"] = 0.3
    claims, (table,) = packets_time.time_claims({"film": rounds})
    assert [(claim.ratio, claim.met) for claim in claims] == [("0.050 ×", True), ("0.600 ×", False)]
    assert "decoding the 30% of the packets that these frames need takes 0.400 ×" in claims[1].figure
    assert len(table.rows) == 4 and all(len(row) == len(table.columns) for row in table.rows)
    assert [row[-2:] for row in table.rows if row[0] == "film"][2] == ("30%", "1.20")


def test_the_packets_that_a_way_needs_give_its_frames(tmp_path):
    path = tmp_path / "clip.mp4"
    write_mp4(path, drawn(rate=10), 10)
    one, every = (packets_time.needed_packets(path, times) for times in ([0.0], [index / 10 for index in range(80)]))
    assert one.sum() == 1 and every.all() and len(every) == 80
    assert packets_time.decode_packets(path, one) == 1 and packets_time.decode_packets(path, every) == 80


def test_scores_of_packets_are_those_of_a_plan(tmp_path):
    path = tmp_path / "clip.mp4"
    write_mp4(path, drawn(rate=10), 10)
    scores, plan = packets.PacketScores(path), SlowFastEncoder(measure="packets").plan(path)
    assert scores.walk(0.4) == [index for index, kind in enumerate(plan.frame_types.tolist()) if kind == 0]
    assert scores.times == pytest.approx(plan.timestamps.tolist(), abs=1e-6)
