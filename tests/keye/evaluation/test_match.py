import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keye.evaluation.match import choose, extract_answer, iou, match, parse_number
from keye.evaluation.words import COLOURS, DEGREE, FRAMING, SHAPES, THINGS
from tests.keye.evaluation.answers import TRUTHS as FIRST
from tests.keye.evaluation.answers import Truth
from tests.keye.evaluation.answers_second import TRUTHS as SECOND

KNOWN = FRAMING | THINGS | COLOURS | SHAPES | DEGREE | set("times count counted number value code reads into".split())
KNOWN |= set(
    "second three four five eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
)
KNOWN |= set(
    "thirty forty fifty sixty seventy eighty ninety zero once twice thrice never minus bounding located".split()
)
TRUTHS = FIRST + SECOND

WORDS = st.lists(st.text(string.ascii_lowercase, min_size=3, max_size=7), min_size=2, max_size=6, unique=True).filter(
    lambda words: not any(one != two and one in two for one in words for two in words)
)


def test_the_table_of_answers_is_large() -> None:
    assert sum(len(truth.replies) for truth in TRUTHS) >= 1700


@pytest.mark.parametrize("truth", TRUTHS, ids=lambda truth: f"{truth.answer}-{truth.options}")
def test_match_agrees_with_judgements_by_hand(truth: Truth) -> None:
    judged = {reply: match(reply, truth.answer, truth.tolerance, truth.options) for reply, _ in truth.replies}
    assert {reply: right for reply, right in truth.replies if judged[reply] is not right} == {}


@given(WORDS, st.data())
def test_only_the_correct_option_matches(options: list[str], data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(options) - 1))
    answer, letter = options[place], string.ascii_uppercase[place]
    for truth in (answer, letter):
        for reply in (answer, letter, f"({letter})", f"{letter}. {answer}", f"The answer is {answer}."):
            assert match(reply, truth, options=options)
            assert not match(reply, truth, options=options, finished=False)
        for reply in (f"not {answer}", " ".join(options), ", ".join(string.ascii_uppercase[: len(options)])):
            assert not match(reply, truth, options=options)
        for other in range(len(options)):
            assert match(options[other], truth, options=options) is (other == place)
            assert match(string.ascii_uppercase[other], truth, options=options) is (other == place)


@given(
    st.text(string.ascii_lowercase, min_size=4, max_size=9).filter(lambda word: word not in KNOWN and word[-1] != "s")
)
def test_an_unknown_word_is_refused(word: str) -> None:
    cases = [("3", None), ("red", ["red", "blue"]), ("blue", None), ("[1, 1, 9, 9]", None), ("yes", ["yes", "no"])]
    for answer, options in cases:
        for reply in (
            f"{word} {answer}",
            f"{answer} {word}",
            f"The answer is {word} {answer}.",
            f"It is {word}, {answer}",
        ):
            assert match(answer, answer, options=options) and not match(reply, answer, options=options)


SPEECH = st.sampled_from(
    "red blue A B not or maybe 3 4 three no yes is the it , . ) ( hardly because I think answer <think> </think> "
    "<answer> </answer> and times left right to - / neither nor but".split()
)


@settings(deadline=None)
@given(st.lists(SPEECH, min_size=1, max_size=6).map(" ".join))
def test_no_reply_matches_two_answers_and_no_hedge_matches_any(reply: str) -> None:
    colours, ways, polar = ["red", "blue", "green"], ["left", "right", "up", "down"], ["yes", "no"]
    pairs = [("red", "blue", colours), ("3", "4", None), ("left", "right", ways), ("yes", "no", polar)]
    for one, two, options in [*pairs, ("yes", "no", None)]:
        right = [match(reply, truth, options=options) for truth in (one, two)]
        assert not all(right)
        assert not (any(right) and {"or", "maybe", "hardly"} & set(extract_answer(reply).split()))


@given(st.text(string.punctuation + string.whitespace), st.text(string.ascii_letters, min_size=1), st.none() | WORDS)
def test_an_empty_reply_never_matches(reply: str, answer: str, options: list[str] | None) -> None:
    assert not match(reply, answer, options=options)


PIECES = st.sampled_from(
    ["<think>", "</think>", "<answer>", "</answer>", "\\boxed{", "}", "{", "[", "(", "]", '"bbox_2d": ', "9" * 5000,
     ":", "1:", "e", "e99999999", ".", "-", "½", "²", "٣", "\ud800", "\x00", "$", "\\text{", "and a half",
     "half a second", "minutes", "not", "neither", "red", "A", " ", "\n", ",", "三", "①", "1,1,2,"]
)  # fmt: skip


@pytest.mark.parametrize("answer", ["3", "07", "0.5", "red", "A", "yes", "[1, 1, 2, 2]", "9" * 5000, "\ud800"])
@settings(deadline=None)
@given(st.lists(PIECES | st.text(st.characters(), max_size=3), max_size=14).map("".join), st.none() | st.floats(0, 2))
def test_no_reply_raises(answer: str, reply: str, tolerance: float | None) -> None:
    for options in (None, ["red", "blue"], ["1", "2", "3"]):
        assert match(reply, answer, tolerance, options) in (True, False)


@pytest.mark.parametrize("piece", ["9" * 5000, "[" * 5000, "(" * 5000, "<think>" * 2000, "1:" * 4000, "1," * 4000,
                                   "\\boxed{" * 2000, "not " * 4000, "$" * 5000, "a-" * 5000, "'" * 5000])  # fmt: skip
def test_long_replies_are_judged_in_time(piece: str) -> None:
    for answer in ("3", "red", "A", "[1, 1, 2, 2]"):
        assert not match(piece, answer) and not match(piece + ":00:00", answer, options=["red", "blue"])


@given(st.text(), st.text(max_size=12), st.none() | st.floats(0, 2), st.lists(st.text(max_size=6), max_size=5))
def test_any_text_is_judged(reply: str, answer: str, tolerance: float | None, options: list[str]) -> None:
    assert match(reply, answer, tolerance, options) in (True, False)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("blue", "blue"),
        ("<think>red?</think><answer> blue </answer>", "blue"),
        ("<answer>red</answer> no, <answer>blue</answer>", "blue"),
        ("<think>it is red</think>\nblue", "blue"),
        ("<answer>3", "3"),
        ("<think>never ends", ""),
        ("so \\boxed{42} it is", "42"),
        ("blue<|im_end|>", "blue"),
    ],
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "number"),
    [("3 times", "3"), ("at 3.5 seconds.", "3.5"), ("3.5s", "3.5"), ("0:07", "7"), ("1:02:03", "3723"),
     ("three", "3"), ("Twice", "2"), ("-4", "-4"), ("3 or 4", None), ("no idea", None), ("", None)],
)  # fmt: skip
def test_parse_number(text, number):
    assert parse_number(text) == number


@pytest.mark.parametrize(
    ("prediction", "answer", "tolerance", "right"),
    [
        ("Blue.", "blue", None, True),
        ("the  Blue", "blue", None, True),
        ("bluish", "blue", None, False),
        ("", "blue", None, False),
        ("3", "3", None, True),
        ("3.0", "3", None, True),
        ("3 times", "3", None, True),
        ("13", "3", None, False),
        ("3 or 4", "3", None, False),
        ("3.5", "3", 0.5, True),
        ("3.6", "3", 0.5, False),
        ("2.5 seconds", "3", 0.5, True),
        ("1 2 3 4 5", "3", 0.5, False),
        ("07", "07", None, True),
        ("7", "07", None, False),
        ("07", "7", None, False),
        ("[0, 0, 100, 100]", "[0, 0, 100, 100]", None, True),
        ("[0, 0, 100, 50]", "[0, 0, 100, 100]", None, True),
        ("[0, 0, 100, 49]", "[0, 0, 100, 100]", None, False),
        ("(0,0),(100,100)", "[0, 0, 100, 100]", None, True),
        ("[100, 100, 0, 0]", "[0, 0, 100, 100]", None, False),
        ("0 0 100 100", "[0, 0, 100, 100]", None, False),
        ("<answer>4</answer>", "4", None, True),
        ("A red disc at the top left.", "a red disc at the top left", None, True),
    ],
)
def test_match(prediction, answer, tolerance, right):
    assert match(prediction, answer, tolerance) is right


@pytest.mark.parametrize(
    ("reply", "option"),
    [("blue", "blue"), ("B", "blue"), ("b", "blue"), ("(B)", "blue"), ("(b)", "blue"), ("B. blue", "blue"),
     ("B) red", None), ("It is blue.", "blue"), ("red or blue", None), ("D", None), ("green", None),
     ("A blue one", "blue")],
)  # fmt: skip
def test_choose_among_words(reply, option):
    assert choose(reply, ["red", "blue"]) == option


def test_choose_among_numbers_and_phrases():
    assert match("four", "4", options=["1", "4"])
    assert not match("14", "4", options=["1", "4"])
    assert match("In the top left corner", "top left", options=["top left", "top right"])
    assert not match("left", "top left", options=["top left", "top right"])


def test_iou_by_hand():
    assert iou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert iou((0, 0, 1, 1), (1, 0, 2, 1)) == 0
