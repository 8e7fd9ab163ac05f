"""Numbers with units, boxes, times, text similarity, formats and structures, by hand computation."""

from fractions import Fraction

import pytest

from keye.errors import RecipeError
from rl.rewards import rewards_from
from rl.rewards.measures import parse_span
from rl.rewards.rules import mode_of, similarity
from rl.rewards.structure import fits, markdown_elements, parse_json
from rl.rewards.units import parse_quantity
from tests.rl.rewards.cases import SCHEMA, judged, question


def earned(name: str, answer: str, text: str, tolerance: float | None = None, options: dict | None = None, **extra):
    rewards = rewards_from({name: options or 1.0})
    return rewards(judged(question(answer, (), tolerance, **extra), text))


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ("3.5 m", "350 cm"),
        ("36 km/h", "10 m/s"),
        ("25 °C", "77 °F"),
        ("25 °C", "298.15 K"),
        ("1,000 g", "1 kg"),
        ("5 kN·m", "5000 J"),
        ("9.8 m/s²", "9.8 m s^-2"),
        ("3 × 10^-3 m", "3 mm"),
        ("2 h", "120 minutes"),
        ("1/2 m", "0.5 m"),
        ("8 Mbit", "1 MB"),
        ("12 in", "1 ft"),
        ("1 mi", "1.609344 km"),
        ("5 L", "5 dm^3"),
        ("1 kWh", "3.6 MJ"),
        ("10 µm", "0.01 millimetres"),
        ("$5", "5 dollars"),
        ("3 meters per second", "3 m/s"),
        ("50 %", "50 percent"),
        ("The answer is 3.5 m.", "3.5 m"),
        (r"3.5 \text{ m}", "3.5 m"),
        ("−3 m", "-3 m"),
    ],
)
def test_quantities_are_equal_after_conversion(one, two):
    assert parse_quantity(one).unit.dimension == parse_quantity(two).unit.dimension
    assert abs(parse_quantity(one).base - parse_quantity(two).base) < Fraction(1, 10**12)
    assert earned("number", one, two).total == earned("number", two, one).total == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "m",
        "3 apples",
        "3 m or 4 m",
        "10^10^10",
        "3 m^",
        "3 / 0 m",
        "about 3 m",
        "3 m?",
        "3..5 m",
        "9" * 40,
        "3 m / ",
        "3 pounds-force",
        "at least 3 m",
        "3 m 4",
    ],
)
def test_what_is_no_quantity(text):
    assert parse_quantity(text) is None


def test_tolerance_is_in_the_unit_of_the_answer_and_a_unit_may_be_optional():
    assert [earned("number", "2.0 km", f"{n} m", 0.1).total for n in (2100, 2101, 1900, 1899)] == [1, 0, 1, 0]
    relative = {"relative": 0.05}
    assert [earned("number", "2.0 km", f"{n} m", None, relative).total for n in (2100, 2101)] == [1, 0]
    assert earned("number", "2 km", "2").total == 0 and earned("number", "2", "2 km").total == 0
    assert earned("number", "2 km", "2", None, {"unit_optional": True}).total == 1
    assert earned("number", "2 km", "2 kg").total == 0 and earned("number", "2 km", "2000").total == 0
    assert "no number" in earned("number", "long", "2").failures["number"]
    with pytest.raises(RecipeError, match="relative"):
        rewards_from({"number": {"relative": 2.0}})


def test_a_box_earns_its_overlap():
    # [0,0,10,10] and [0,0,10,5]: 50 of 100. [5,0,15,10]: 50 of 150. [8,0,18,10]: 20 of 180.
    truth = "[0, 0, 10, 10]"
    for text, value in (
        ("[0,0,10,5]", 0.5),
        ("(5,0),(15,10)", 1 / 3),
        ("[8,0,18,10]", 0.0),
        ('{"bbox_2d": [0,0,10,5]}', 0.5),
    ):
        assert earned("iou", truth, text).total == pytest.approx(value)
    assert earned("iou", truth, "[8,0,18,10]", None, {"least": 0.0}).total == pytest.approx(20 / 180)
    assert "no box" in earned("iou", "[5, 5, 5, 5]", "[5, 5, 5, 5]").failures["iou"]


@pytest.mark.parametrize(
    ("text", "span"),
    [
        ("3.5 - 10", (3.5, 10)),
        ("from 0:03 to 0:10.5", (3, 10.5)),
        ("[3.5, 10]", (3.5, 10)),
        ("3.5s – 10s.", (3.5, 10)),
        ("<|clip_time_start|>3.5<|clip_time_end|> <|clip_time_start|>10<|clip_time_end|>", (3.5, 10)),
        ("1:00:00 to 1:00:30", (3600, 3630)),
        ("between 3 and 10 seconds", (3, 10)),
        ("10 - 3", None),
        ("3", None),
        ("1 2 3", None),
        ("3 - nan", None),
        ("not 3 - 10", None),
    ],
)
def test_spans_of_time(text, span):
    assert parse_span(text) == span


def test_times_earn_their_overlap_or_their_distance():
    for text, value in (
        ("0 - 10", 1.0),
        ("0 - 5", 0.5),
        ("5 - 15", 1 / 3),
        ("9 - 30", 0.0),
        ("20 - 30", 0.0),
        ("5 - 5", 0.0),
    ):
        assert earned("temporal_iou", "0 - 10", text).total == pytest.approx(value)
    assert "no span" in earned("temporal_iou", "soon", "0 - 5").failures["temporal_iou"]
    assert [earned("seconds", "65", text, 1.0).total for text in ("1:05", "66", "67", "1 minute 4 seconds")] == [
        1,
        1,
        0,
        1,
    ]
    falling = {"fall": 4.0}
    assert [earned("seconds", "10", text, 1.0, falling).total for text in ("11", "13", "15", "2")] == [1, 0.5, 0, 0]


def test_anls_is_the_paper_s_and_exact_takes_every_accepted_answer():
    # kitten → sitting: 3 edits of 7. ANLS is 0 from a normalised distance of 0.5 on.
    assert similarity("kitten", "sitting") == pytest.approx(1 - 3 / 7)
    assert earned("anls", "sitting", "kitten").total == pytest.approx(1 - 3 / 7)
    assert earned("anls", "abcd", "abxx").total == 0.0
    assert earned("anls", "no", "New York", answers=["new  york"]).total == 1.0
    assert earned("exact", "NYC", "the New York.", answers=["New York"]).total == 1.0
    assert earned("exact", "NYC", "New York City", answers=["New York"]).total == 0.0
    assert "list of texts" in earned("exact", "NYC", "x", answers="New York").failures["exact"]


def test_choice_is_one_option_and_its_truth_an_option():
    prompt = question("red", ("red", "blue"))
    rewards = rewards_from({"choice": 1.0})
    values = [rewards(judged(prompt, text)).total for text in ("A", "red", "(A) red", "A or B", "B", "red, blue", "AB")]
    assert values == [1, 1, 1, 0, 0, 0, 0]
    assert "none of its options" in rewards(judged(question("pink", ("red", "blue")), "A")).failures["choice"]


THOUGHT, PLAIN = "<think>so</think><answer>3</answer>", "<answer>3</answer>"


@pytest.mark.parametrize(
    ("mode", "suffix", "values"),
    [
        ("any", "", [1, 1, 1, 1]),
        ("think", "", [1, 0, 0, 0]),
        ("no_think", "", [0, 1, 1, 0]),
        ("prompt", " /think", [1, 0, 0, 0]),
        ("prompt", "/no_think ", [0, 1, 1, 0]),
        ("prompt", "", [1, 1, 1, 1]),
        ("auto", "/think", [1, 1, 1, 1]),
    ],
)
def test_format_in_all_modes(mode, suffix, values):
    prompt = question("3")
    prompt.messages[0]["content"] += suffix
    rewards = rewards_from({"format": {"mode": mode}})
    texts = (THOUGHT, PLAIN, "3", "<think> </think><answer>3</answer>")
    assert [rewards(judged(prompt, text)).total for text in texts] == values
    parts = [{"type": "video", "video": "a.mp4"}, {"type": "text", "text": f"how many? {suffix}"}]
    assert mode_of([{"role": "user", "content": parts}]) == mode_of(prompt.messages)


def test_length_falls_between_its_limits():
    rewards = rewards_from({"length": {"full": 10, "zero": 20}})
    prompt = question("3")
    tokens = [rewards(type(judged(prompt, "a"))(prompt, "a", True, n)).total for n in (1, 10, 15, 20, 30)]
    assert tokens == [1, 1, 0.5, 0, 0]
    assert "not known" in rewards(type(judged(prompt, "a"))(prompt, "a", True)).failures["length"]
    with pytest.raises(RecipeError, match="full < zero"):
        rewards_from({"length": {"full": 10, "zero": 5}})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"colour": "red", "count": 3}', 1),
        ('```json\n{"colour": "red", "count": 4}\n```', 1),
        ('{"colour": "red"}', 0),
        ('{"colour": "red", "count": "3"}', 0),
        ('{"colour": "", "count": 3}', 0),
        ('{"colour": "red", "count": true}', 0),
        ('{"colour": "red", "count": 3, "more": 1}', 0),
        ('{"colour": "red", "count": 3, "count": 4}', 0),
        ("{'colour': 'red'}", 0),
        ('{"colour": "red", "count": NaN}', 0),
        ('Here: {"colour": "red", "count": 3}', 0),
        ('[{"colour": "red", "count": 3}]', 0),
    ],
)
def test_json_has_the_keys_and_types_of_its_schema(text, value):
    assert earned("json", "-", text, schema=SCHEMA).total == value


def test_json_without_schema_with_values_and_with_a_schema_that_is_not_known():
    assert (
        earned("json", "-", "[1]").total == 1 and earned("json", "-", "{}").total == earned("json", "-", "3").total == 0
    )
    values = {"values": True}
    for text, value in (('{"b": 1, "a": "$5 and $6"}', 1), ('{"b": 2, "a": "$5 and $6"}', 0)):
        assert earned("json", '{"a": "$5 and $6", "b": 1}', text, None, values).total == value
    assert "'pattern'" in earned("json", "-", "[1]", schema={"pattern": "(a+)+"}).failures["json"]
    assert fits([1, 2], {"type": "array", "items": {"type": "number", "maximum": 2}, "minItems": 2})
    assert not fits([1, 3], {"items": {"maximum": 2}}) and fits(None, {"type": ["null", "string"]})
    with pytest.raises(ValueError, match="deeply"):
        parse_json("[" * 65 + "]" * 65)


MARKDOWN = (
    "# A\n\nSome **bold** and *soft* [link](http://a).\n\n## B\n\n1. one\n2. two\n\n- x\n\n"
    "> said\n\n```python\na\n```\n"
)


def test_markdown_has_its_elements_and_is_well_formed():
    assert markdown_elements(MARKDOWN) == {"heading", "bold", "italic", "link", "numbers", "bullets", "quote", "code"}
    assert markdown_elements("# A\n\n### C") is None and markdown_elements("```\nopen") is None
    assert markdown_elements("<b>x</b>") is None and markdown_elements("<div>\nx\n</div>") is None
    assert markdown_elements("plain") == markdown_elements("- \n\n# \n") == markdown_elements("```\n\n```") == set()
    assert earned("markdown", "-", MARKDOWN, markdown=["heading", "code"]).total == 1
    assert earned("markdown", "-", MARKDOWN, markdown=["heading", "table"]).total == 0
    assert "required elements" in earned("markdown", "-", MARKDOWN, markdown=["hading"]).failures["markdown"]
