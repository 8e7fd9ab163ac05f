"""What the official rules read in replies, case by case, and scores and intervals by hand."""

import math

import pytest

from keye.evaluation.public import BENCHMARKS
from keye.evaluation.public.question import PublicQuestion
from keye.evaluation.public.scores import Prediction, interval, score, scores, table

LINES = ["A. brighter", "B. darker", "C. faster"]
CAPTIONS = ["Caption A: It turns bright.", "Caption B: It turns dark."]


def verdict(name: str, reply: str, answer: str, family: str = "", options=("a", "b", "c", "d"), official: str = ""):
    question = PublicQuestion("q", family, [], answer, list(options), official={"answer": official})
    benchmark = object.__new__(BENCHMARKS[name])
    found = benchmark.judge(question, reply)
    return found.choice, found.correct


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("B", ("B", True)),
        (" B.", ("B", True)),
        ("The best answer is B. A dog", ("B", True)),
        ("The answer: (B)", ("B", True)),
        ("A dog and B", ("A", False)),
        ("b", ("", False)),
        ("I cannot see the clip", ("", False)),
        ("Best option: C", ("B", True)),  # the script's list has a missing comma, so that the B of "Best" counts
        ("", ("", False)),
    ],
)
def test_video_mme(reply, expected):
    assert verdict("video_mme", reply, "B") == expected


def test_longvideobench_reads_a_letter_and_draws_one_without():
    assert verdict("longvideobench", "Best option: C", "C") == ("C", True)
    assert verdict("longvideobench", "The correct option is E", "C") == ("E", False)
    choices = {answer: verdict("longvideobench", "none", answer) for answer in "ABCD"}
    assert all(choice == "" for choice, _ in choices.values())
    assert sum(correct for _, correct in choices.values()) == 1  # the choice that the id draws


@pytest.mark.parametrize(
    ("reply", "correct"),
    [
        ("B) two", True),
        ("B", True),
        ("b).", True),
        ("B) two\nbecause A", True),
        ("A) one", False),
        ("", False),  # the notebook counts it as correct
        (")", False),
        ("two", False),
    ],
)
def test_mvbench(reply, correct):
    assert verdict("mvbench", reply, "B")[1] is correct


@pytest.mark.parametrize(
    ("family", "reply", "expected"),
    [
        ("multi-choice", "B", ("B", True)),
        ("multi-choice", "B. darker", ("B", True)),
        ("multi-choice", "B) something", ("B", True)),
        ("multi-choice", "A.", ("A", False)),
        ("multi-choice", "The answer is B", ("", False)),
        ("multi-choice", "Because", ("", False)),
        ("yes_no", "Yes, it does", ("yes", False)),
        ("yes_no", "no.</s>", ("no", True)),
        ("yes_no", "It does not", ("", False)),
        ("caption_matching", "Caption B: It turns dark.", ("B", True)),
        ("caption_matching", "It turns dark.", ("B", True)),
        ("caption_matching", "B) It turns dark.", ("B", True)),
        ("caption_matching", "Caption B.", ("B", True)),
        ("caption_matching", "Caption A", ("A", False)),
        ("caption_matching", "B", ("B", True)),
        ("caption_matching", "B, I think", ("", False)),
    ],
)
def test_tempcompass(family, reply, expected):
    options = {"multi-choice": LINES, "yes_no": ["yes", "no"], "caption_matching": CAPTIONS}[family]
    answer = "no" if family == "yes_no" else "B"
    assert verdict("tempcompass", reply, answer, family, options, "B. darker") == expected


def test_captions_have_no_rule():
    question = PublicQuestion("q", "captioning", [], "B. darker")
    assert object.__new__(BENCHMARKS["tempcompass"]).judge(question, "B. darker") is None


def prediction(number: int, correct: bool | None, clip: str | None = None, choice: str = "A") -> Prediction:
    group = {"duration": "short" if number % 2 else "long"}
    return Prediction(str(number), clip or str(number), "", "A", choice, correct, 0.25, number == 0, group)


def test_the_interval_is_wilsons_where_clips_have_one_question():
    made = [prediction(number, number < 8) for number in range(10)]
    low, high = interval(made)
    # Wilson's interval of 8 of 10, e.g. in the tables of Brown, Cai and DasGupta: 0.490 to 0.943.
    assert low == pytest.approx(0.4902, abs=2e-4) and high == pytest.approx(0.9433, abs=2e-4)
    assert interval([prediction(number, True) for number in range(10)])[1] == pytest.approx(1.0)
    assert 0.68 < interval([prediction(number, True) for number in range(10)])[0] < 0.73


def test_questions_that_share_a_clip_widen_the_interval_as_fewer_questions_would():
    halves = [prediction(number, number < 30, clip=str(number // 3)) for number in range(60)]
    alone = [prediction(number, number < 10) for number in range(20)]
    wide, narrow = interval(halves), interval([prediction(number, number < 30) for number in range(60)])
    assert wide[0] < narrow[0] and wide[1] > narrow[1]
    # Three equal answers about each of 20 clips are worth 20 answers, but for the 19 degrees of freedom.
    assert wide[1] - wide[0] == pytest.approx(interval(alone)[1] - interval(alone)[0], rel=0.03)


def test_scores_by_hand():
    made = [
        prediction(0, True),
        prediction(1, False),
        prediction(2, False, choice=""),
        prediction(3, True),
        prediction(4, None),
    ]
    row = scores(made, drops_unread=True)["all"]["all"]
    assert (row.n, row.accuracy, row.unread, row.chance, row.majority) == (4, 0.5, 0.25, 0.25, 0.25)
    assert row.official == pytest.approx(2 / 3) and score(made[:4]).official == 0.5
    groups = scores(made)["duration"]
    assert {name: (group.n, group.accuracy) for name, group in groups.items()} == {"long": (2, 0.5), "short": (2, 0.5)}
    lines = table("mme", [("all", row)]).splitlines()
    assert (
        lines[1].split()
        == ["all", "4", "50.0", f"[{100 * row.low:.1f},", f"{100 * row.high:.1f}]", "66.7"] + ["25.0"] * 3
    )
    assert math.isclose(row.low + row.high, 1.0)
