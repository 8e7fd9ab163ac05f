"""What a policy may try instead of answering earns nothing, from any rule, and costs no time."""

import importlib.util
import math
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rl.rewards import rewards_from
from rl.rewards.base import REGISTRY
from tests.rl.rewards.cases import ASKED, FORM_ONLY, OPTIONS, RIGHT, TABLE, judged

MODELS = ("judge", "reward_model")  # test_reward_judge.py, test_reward_model_score.py
RULES = [
    name
    for name in sorted(RIGHT)
    if name != "math" or importlib.util.find_spec("math_verify") and importlib.util.find_spec("antlr4")
]
MEGABYTE = 1 << 20
BLANK = [
    "",
    " ",
    "\n\t \n",
    "\u200b",
    "\ufeff",
    "<answer></answer>",
    "<think></think><answer> </answer>",
    "<think>so</think>",
]
LISTS = [
    ", ".join(OPTIONS),
    " or ".join(OPTIONS),
    "A B C D",
    "A, B, C, D",
    "\n".join(OPTIONS),
    "<answer>A</answer> B C D",
    "1 2 3 4 5",
    "1, 2 or 3",
    "0 - 100 - 200",
    "[0, 0, 9, 9] [1, 1, 5, 5]",
    r"\boxed{1} \boxed{0.5} \boxed{2}",
    "all of the above",
    "any",
    "unknown",
    "?",
    "yes no",
]
EMPTY_FORMS = [
    "<think>thinking</think><answer></answer>",
    "<answer>\n</answer>",
    "```json\n{}\n```",
    "{}",
    "[]",
    "null",
    "``` ```",
    "| | |\n|---|---|",
    "# ",
    "- ",
    "$ $",
    r"\boxed{}",
    "[,,,]",
    "-",
    ".",
    "()",
]
NUMBERS = [
    "nan",
    "NaN",
    "inf",
    "-inf",
    "Infinity",
    r"\infty",
    "1e999",
    "1e-999",
    "0/0",
    "1/0",
    "²",
    "𝟛𝟛",
    "Ⅷ",
    "٩٩",
    "9" * 5000,
    "0." + "3" * 5000,
    "[nan, nan, nan, nan]",
    "[0, 0, inf, inf]",
    "[-9e99, -9e99, 9e99, 9e99]",
    "0 - inf",
    "00:00:00:00",
    "[0, 0, 1000, 1000]",
    "[200, 200, 100, 100]",
    "0 - 9999",
]
HOSTILE = [
    "__import__('os').system('false')",
    "'; DROP TABLE answers; --",
    "${7*7}",
    "{{7*7}}",
    "%s%s%n",
    "\x00\x01\x02",
    "10^10^10",
    r"$9^{9^{9^{9}}}$",
    "1000000000!",
    r"\frac{" * 60,
    r"\sum_{k=1}^{10^9} k",
    "(" * 5000,
    "{" * 100_000,
    "[" * 100_000 + "]" * 100_000,
    '{"a":' * 50_000 + "1" + "}" * 50_000,
    "<answer>" * 20_000,
    "<think>" * 20_000,
    "</think>" * 20_000,
    "<answer><answer><answer>",
    "<think><think></think></think>",
    ">" * 5000 + " a",
    "- " * 3000,
    "*" * 10_000,
    "[" * 5000 + "](",
    "|" * 20_000,
    "<|im_end|>",
    "\ud800",
    "a\u0301" * 20_000,
    "e" * 100 + "!" * 100,
]
HUGE = [
    sign * (MEGABYTE // len(sign))
    for sign in ("a", "9", " ", "\n", "<answer>", "{", "[", "\\frac{", "$", "- ", "1,", "A ")
]
REWARDS = {name: rewards_from({name: {"time_limit": 1.0, **TABLE.get(name, {})}}) for name in RULES}


def test_every_registered_reward_is_tested():
    built_in = {name for name, factory in REGISTRY.items() if factory.__module__.startswith("rl.")}
    assert built_in - set(MODELS) == set(RIGHT)


@pytest.mark.parametrize("name", RULES)
def test_the_right_answer_earns_and_a_truncated_one_does_not(name):
    prompt, answer = RIGHT[name]
    tagged = f"<think>perhaps 7 or [1, 2, 3, 4]</think><answer>{answer}</answer>"
    for text in (answer, tagged) if name != "format" else (answer, "3"):
        earned = REWARDS[name](judged(prompt, text))
        assert 0.7 < earned.total <= 1 and not earned.failures, text
        assert REWARDS[name](judged(prompt, text, finished=False)).total == 0


@pytest.mark.parametrize("name", RULES)
def test_only_the_answer_counts_and_not_the_thought(name):
    prompt, answer = RIGHT[name]
    if name not in FORM_ONLY:
        for text in (f"<think>{answer}</think><answer>no</answer>", f"<think>{answer}", f"{answer}</think>no"):
            assert REWARDS[name](judged(prompt, text)).total == 0


@pytest.mark.parametrize("name", RULES)
def test_what_is_no_answer_earns_nothing_in_a_short_time(name):
    prompt, answer = RIGHT[name]
    texts = [*BLANK, *LISTS, *EMPTY_FORMS, *NUMBERS, *HOSTILE, *HUGE, ASKED]
    if name == "format":  # any plain line has the form
        texts = [text for text in texts if "\n" in text.strip() or "<answer>" in text or not text.strip()]
    elif name == "length":
        texts = BLANK[:3]
    elif name != "markdown":
        texts += [f"{answer} {ASKED}", f"{answer} or not"]
    began = time.monotonic()
    earned = REWARDS[name].all([judged(prompt, text) for text in texts])
    seconds = time.monotonic() - began
    for text, one in zip(texts, earned, strict=True):
        assert one.total == 0 or name.endswith("constraints") and text not in BLANK[:3], (
            f"{text!r:.60} earns {one.total}"
        )
        assert not one.failures or (name == "math" and "longer than 1 s" in one.failures[name]), one.failures
    assert seconds < 60 if name == "math" else seconds < 20, seconds


@pytest.mark.parametrize("name", [name for name in RULES if name not in FORM_ONLY])
def test_a_repeated_answer_earns_no_more_than_the_answer(name):
    prompt, answer = RIGHT[name]
    once = REWARDS[name](judged(prompt, answer)).total
    for text in (f"{answer} {answer}", f"{answer}\n{answer}", f"{answer}, {answer}", f"{answer} " * 1000):
        assert REWARDS[name](judged(prompt, text)).total <= once


FRAGMENTS = st.sampled_from(
    [
        "red",
        "A",
        "3",
        "1.5",
        "km",
        "s",
        "-",
        ",",
        ":",
        "[",
        "]",
        "{",
        "}",
        '"',
        "\\frac",
        "^",
        "$",
        "|",
        "\n",
        "#",
        "```",
        "<think>",
        "</think>",
        "<answer>",
        "</answer>",
        "not",
        "or",
        "\u0663",
        "\u200b",
        "e99",
        "/",
        "0",
        "\\boxed{",
    ]
)


@settings(max_examples=60, deadline=2000, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(FRAGMENTS | st.text(max_size=5), max_size=30), st.booleans())
def test_any_text_gives_a_number_from_0_to_1_without_a_failure(parts, finished):
    text = " ".join(parts) if len(parts) % 2 else "".join(parts)
    for name in RULES:
        if name != "math":
            earned = REWARDS[name](judged(RIGHT[name][0], text, finished))
            assert math.isfinite(earned.total) and 0 <= earned.total <= 1 and not earned.failures, (name, earned)
            assert finished or earned.total == 0
