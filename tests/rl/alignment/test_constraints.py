"""Every kind of constraint against answers that were judged by hand."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keye.errors import ManifestError
from rl.alignment import KINDS, read_constraints
from rl.alignment.text import LONGEST, paragraphs, sentences, visible, words


def at(relation: str, count: int, **more: object) -> dict:
    return {"relation": relation, "count": count} | more


CASES = [
    ("words", at("exactly", 4), ["It's a well-known fact.", "one two three four", "我喜欢你"], ["a b c", "a b c d e"]),
    ("words", at("at least", 2), ["two words"], ["one", "- ", ". . ."]),
    ("words", at("at most", 2), ["two words", "one"], ["three words here"]),
    (
        "sentences",
        at("exactly", 2),
        ["It costs 1.5 euros. Fine!", "Dr. Lee left e.g. early. Why?", "他走了。她来了。"],
        ["One.", "A b. C d. E f.", "..."],
    ),
    ("sentences", at("at least", 3), ["- one\n- two\n- three", "# Head\nA sentence. Another one"], ["One. Two"]),
    ("paragraphs", at("exactly", 2), ["a\n\nb", "a\nc\n \n\n b"], ["a\nb", "a\n\nb\n\nc"]),
    ("characters", at("at most", 5), ["12345", " 12345 \n", "1\u200b2345"], ["123456"]),
    ("characters", at("at least", 4), ["abcd"], ["abc", "a\u200b\u200b\u200b"]),
    ("bullets", at("exactly", 2), ["Look:\n- one\n- two", "* a\n• b"], ["- one", "-one\n-two", "a - b\n- c\n-"]),
    ("numbered_items", at("at least", 2), ["1. a\n2. b", "1) a\n2) b\n3) c"], ["1. a\n3. b", "2. a\n1. b", "1. a"]),
    (
        "sections",
        at("exactly", 2),
        ["Section 1\ntext\nSection 2\nmore"],
        ["Section 1\nSection 2\nmore", "Section 2\na\nSection 1\nb", "Section 1\na", "In Section 1 and Section 2\nb"],
    ),
    ("sections", at("at least", 1, marker="Part"), ["PART 1:\ntext"], ["Section 1\ntext"]),
    ("sentence_length", {"longest": 3}, ["One two three. Four five."], ["One two three four."]),
    (
        "capital_words",
        at("exactly", 2),
        ["This is VERY GOOD", "NASA and ESA"],
        ["This is VERY good", "I am A B C", "ABC"],
    ),
    (
        "keywords_present",
        {"words": ["red", "traffic light"]},
        ["The Red Traffic light."],
        ["redder traffic light", "red"],
    ),
    ("keywords_absent", {"words": ["very"]}, ["every bird", "nothing"], ["Very odd", "not very", "very-good"]),
    ("keyword_frequency", at("exactly", 2, word="dog"), ["Dog eats dog."], ["dog", "dog dogs", "dog dog dog"]),
    (
        "keyword_order",
        {"words": ["first", "last"]},
        ["first then last, first"],
        ["last, first", "first", "firstly last"],
    ),
    ("sentence_start", {"letter": "s"}, ["So it is. She left. 'Sure.'"], ["So it is. He left.", "It"]),
    (
        "paragraph_start",
        {"paragraph": 2, "word": "Then"},
        ["One.\n\nThen two.", "a\n\n**then**"],
        ["Then one.", "One.\nThen two.", "a\n\nThence"],
    ),
    ("start_phrase", {"phrase": "In short"}, ["In short: yes"], ["in short: yes", "In short", "So, In short yes"]),
    ("end_phrase", {"phrase": "That is all."}, ["Yes. That is all."], ["That is all.", "Yes. That is all. Bye", "yes"]),
    (
        "json",
        {"keys": ["a"]},
        ['{"a": 1, "b": []}', '```json\n{"a": {"b": 0}}\n```', '{"a": false}'],
        [
            '{"b": 1}',
            '{"a": ""}',
            '[{"a": 1}]',
            '{"a": NaN}',
            '{"a": 1, "a": 2}',
            'It is {"a": 1}',
            '{"a": 1}}',
            "[" * 5000,
        ],
    ),
    ("json", {}, ['{"x": 1}'], ["{}", "[1]", "3"]),
    ("heading", at("exactly", 1, level=2), ["## Head\ntext"], ["# Head\ntext", "### Head", "##Head", "a ## Head"]),
    (
        "table",
        {"columns": 2, "rows": 1},
        ["| a | b |\n|---|:-:|\n| 1 | 2 |", "See:\n| a | b |\n| --- | --- |\n| 1 | 2 |\nok"],
        ["| a | b |\n| 1 | 2 |", "| a | b |\n|---|---|", "| a |\n|---|\n| 1 |", "| a | b |\n|---|---|\n| 1 |  |"],
    ),
    (
        "code_block",
        {"language": "python"},
        ["Code:\n```python\nx = 1\n```"],
        ["```\nx = 1\n```", "```python\n\n```", "```python\nx = 1", "python x = 1"],
    ),
    (
        "highlights",
        at("at least", 2),
        ["**one** and **two words**"],
        ["**one**", "****", "** a ** and ** b **", "*a* *b*"],
    ),
    (
        "title",
        {},
        ["<<A day>>\nIt began."],
        ["<<A day>>", "It began. <<A day>>", "<A day>\nIt", "<<>>\nIt", "<<a>>\nb <<c>>"],
    ),
    (
        "placeholders",
        at("at least", 2),
        ["Dear [name], see [place]."],
        ["[name] and [Name]", "[1] [2]", "[x](url) [y](url)"],
    ),
    (
        "postscript",
        {"marker": "P.S."},
        ["Bye.\n\nP.S. Call me."],
        ["P.S. Call me.", "Bye.\nP.S.", "Bye. P.S. Call", "a\nP.S. b\n\nc", "a\nP.S. b\nP.S. c"],
    ),
    (
        "repeat_prompt",
        {"request": "Name a colour."},
        ["Name a colour.\nRed."],
        ["Name a colour.", "Red.", "name a colour. Red", "Name a colour. Red. Name a colour."],
    ),
    (
        "two_answers",
        {},
        ["Red.\n******\nBlue."],
        ["Red.\n******\nred", "Red.\n******\n", "Red ****** Blue", "a\n******\nb\n******\nc"],
    ),
    ("choice", {"options": ["yes", "no"]}, ["yes", "No."], ["yes no", "yes or no", "maybe", "yes, because"]),
    ("lowercase", {}, ["all small, 42", "straße"], ["Not all", "42"]),
    ("uppercase", {}, ["ALL 42"], ["All", "42", "日本"]),
    ("script", {"script": "Cyrillic"}, ["Привет, мир 42"], ["Hello", "Привет hello friend", "42"]),
    ("script", {"script": "Japanese"}, ["これは本です。"], ["我喜欢你", "hello"]),
    ("letter_frequency", at("exactly", 2, letter="z"), ["zz top"], ["z", "Zoo zebra pizza"]),
    ("letter_frequency", at("at most", 0, letter="e"), ["A bird is up."], ["Eel"]),
    ("digits_only", {}, ["42", " 7\n"], ["4 2", "4.2", "forty", "٤٢", "1" * 101]),
    ("no_digits", {}, ["seven"], ["7", "H²O", "٧ days"]),
    ("no_commas", {}, ["one and two", "one; two"], ["one, two", "一，二", "一、二"]),
    ("quoted", {}, ['"It is so."', "“Yes.”"], ['"a', '"a" and "b"', "'a'", '""', 'a"']),
    (
        "date",
        {"format": "YYYY-MM-DD"},
        ["On 2024-02-29 it rained."],
        ["On 2023-02-29.", "2024-13-01", "29.02.2024", "2024-02-29 or 01/02/2024", "12024-02-29"],
    ),
    ("date", {"format": "DD.MM.YYYY"}, ["Am 01.02.2024."], ["1.2.2024", "2024-02-01", "31.02.2024"]),
]

LANGUAGE = ("language", {"language": "de"}, ["Die Kinder gehen durch die alte Stadt."],
            ["The children walk through the old town.", "Les enfants marchent dans la ville.", "Ja"])  # fmt: skip

HOSTILE = [
    "", " \n\t ", "\u200b\u200b", "...", "!!!???", ",", "\x00\x00", "<|", "\u202e\u202d", "—", "\ud800",
    "word " * 500, "yes. " * 300, "This is the same sentence again. " * 40, "a " * 10_000, "ab\n\n" * 400,
    "x" * (LONGEST + 1),
]  # fmt: skip


def make(kind: str, parameters: dict):
    [found] = read_constraints([{"kind": kind} | parameters], "here:1")
    return found


@pytest.mark.parametrize(("kind", "parameters", "good", "bad"), CASES, ids=lambda x: x if isinstance(x, str) else "")
def test_hand_judged(kind, parameters, good, bad):
    constraint = make(kind, parameters)
    for text in good:
        assert constraint.check(text), text
    for text in bad:
        assert not constraint.check(text), text
    assert constraint.describe().strip() and constraint.to_json()["kind"] == kind
    assert read_constraints([constraint.to_json()], "") != () and make(kind, parameters) == constraint


def test_language():
    pytest.importorskip("py3langid")
    test_hand_judged(*LANGUAGE)


def test_every_kind_has_cases():
    assert {case[0] for case in CASES} | {"language"} == set(KINDS) and len(KINDS) >= 25


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_an_answer_without_content_or_that_repeats_itself_satisfies_nothing(text):
    satisfied = [case[0] for case in CASES if make(case[0], case[1]).check(text)]
    assert satisfied == []


texts = st.text(st.sampled_from("abcXYZé 019.,!?\n\n-*#|\"[]<>{}:;'`我あ\u200b"), max_size=80)


@settings(max_examples=150, deadline=None)
@given(texts)
def test_no_text_raises_and_space_around_it_changes_nothing(text):
    for kind, parameters, _, _ in CASES:
        constraint = make(kind, parameters)
        assert constraint.check(text) == constraint.check(f"\n {text}\u200b\n") == constraint.check(f"{text}\r\n")


@settings(max_examples=60, deadline=None)
@given(texts, st.integers(0, 12), st.sampled_from([kind for kind, cls in KINDS.items() if hasattr(cls, "amount")]))
def test_exactly_is_at_least_and_at_most(text, count, kind):
    more = {"word": "a"} if kind == "keyword_frequency" else {"letter": "a"} if kind == "letter_frequency" else {}
    least, most, exact = (make(kind, at(r, count, **more)).check(text) for r in ("at least", "at most", "exactly"))
    assert exact == (least and most)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["alpha", "don't", "b2b", "well-known", "é"]), min_size=1, max_size=12))
def test_joined_words_are_counted(chosen):
    assert words(" ".join(chosen)) == chosen
    assert len(sentences(". ".join(f"{word} x" for word in chosen) + ".")) == len(chosen)
    assert paragraphs("\n\n".join(chosen)) == chosen and visible("\ufeff" + " ".join(chosen)) == " ".join(chosen)


@pytest.mark.parametrize(
    ("entries", "sentence"),
    [
        ({"kind": "words"}, "constraints must be a list"),
        ([{"kind": "wrods"}], "did you mean words"),
        ([3], "has the kind None"),
        ([{"kind": "no_commas"}, {"kind": "words", "relation": "at least"}], r"constraints\[1\].count is missing"),
        ([{"kind": "words", "relation": "more than", "count": 3}], "relation must be one of at least, at most"),
        ([{"kind": "words", "relation": "at least", "count": "3"}], "count is '3'"),
        ([{"kind": "words", "relation": "at least", "count": -1}], "count must be 0 or more"),
        ([{"kind": "no_commas", "count": 3}], r"unknown key constraints\[0\].count"),
        ([{"kind": "keywords_present", "words": []}], "at least one text"),
    ],
)
def test_a_wrong_entry_is_named(entries, sentence):
    with pytest.raises(ManifestError, match=f"a.jsonl:7.*{sentence}"):
        read_constraints(entries, "a.jsonl:7")


def test_long_runs_of_marks_are_read_in_linear_time():
    # A run of 20,000 dots took 100 s; 200,000 characters may be read, in the training process.
    began = time.process_time()
    for run in (".", "…", "。", "!?", '."', "_", "؟"):
        assert len(sentences("a" + run * (LONGEST // 2 // len(run)) + "x")) in (1, 2)
    assert time.process_time() - began < 20


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("मेरा भाई किताब पढ़ता है।", 5),
        ("كِتَابٌ جَدِيدٌ", 2),
        ("re\u0301sume\u0301 cafe\u0301", 2),
        ("שָׁלוֹם עוֹלָם", 2),
        ("👍🏽 done 👨‍👩‍👧", 1),
    ],
)
def test_combining_marks_belong_to_their_word(text, number):
    assert len(words(visible(text))) == number


def test_sentences_end_with_the_marks_of_their_script():
    assert len(sentences("मेरा भाई है। वह आता है।")) == 2
    assert len(sentences("هل هذا كتاب؟ نعم هذا كتاب۔")) == 2


def test_words_without_spaces_around_them_are_found():
    present = KINDS["keywords_present"](("罗盘", "灯"))
    absent = KINDS["keywords_absent"](("罗盘",))
    assert present.check("这是一个罗盘和灯的图片。") and not absent.check("这是一个罗盘的图片。")
    assert not present.check("这是一个图片。") and absent.check("这是一个图片。")
    assert KINDS["keyword_order"](("罗盘", "灯")).check("先有罗盘后有灯。")
    assert KINDS["keywords_present"](("camera",)).check("用camera拍照")
    assert not KINDS["keywords_present"](("cafe",)).check("un cafe\u0301 noir")  # another word


@pytest.mark.parametrize("value", ['" "', "{}", '[""]', '{"a": null}', "1e999", '"\\n"'])
def test_values_of_json_that_are_empty_in_another_way_do_not_count(value):
    assert not KINDS["json"](("answer",)).check(f'{{"answer": {value}}}')
    assert KINDS["json"](("answer",)).check('{"answer": 0}') and KINDS["json"](("answer",)).check('{"answer": false}')
