"""Steps of a thought and their confidence, against sums by hand."""

import pytest

from rl.endpoint import Answer
from rl.reasoning.chain import read_chain, spans, steps_of


@pytest.mark.parametrize(
    ("thought", "steps"),
    [
        ("one\ntwo\n\n three ", ["one", "two", "three"]), ("3.5 s. Then red! So?", ["3.5 s.", "Then red!", "So?"]),
        ("", []), ("  \n ", []), ("alone", ["alone"]), ("一。二。", ["一。二。"]), ("1. a\n2. b", ["1. a", "2. b"]),
    ],
)  # fmt: skip
def test_steps(thought, steps):
    assert steps_of(thought) == steps
    assert all(thought[start:end].strip() for start, end in spans(thought))


def test_confidence_is_the_mean_over_a_steps_own_tokens():
    tokens = ("<think>", "I", " see.", "\nIt", " is", " red.", "</think>", "<answer>", "red", "</answer>", "<|im_end|>")
    logprobs = (0.0, -1.0, -2.0, -4.0, -6.0, -8.0, -9.0, -9.0, -0.5, -9.0, -9.0)
    answer = Answer("<think>I see.\nIt is red.</think><answer>red</answer>", True, 1, 1, tokens, logprobs)
    steps, confidence = read_chain(answer)
    assert [(step.text, step.confidence) for step in steps] == [("I see.", -1.5), ("It is red.", -6.0)]
    assert confidence == -0.5  # not of the same word in the thought


def test_without_log_probabilities_or_with_others_there_is_none():
    text = "<think>I see.</think><answer>red</answer>"
    for tokens, logprobs in ((None, None), (("x", "y"), (-1.0, -1.0))):
        steps, confidence = read_chain(Answer(text, True, 1, 1, tokens, logprobs))
        assert [step.confidence for step in steps] == [None] and confidence is None


def test_a_plain_answer_has_no_steps():
    steps, confidence = read_chain(Answer("blue", True, 1, 1, ("bl", "ue", "<|im_end|>"), (-1.0, -2.0, -7.0)))
    assert steps == [] and confidence == -1.5
