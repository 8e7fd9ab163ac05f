"""What is read from a response: thoughts, log-probabilities, and values that cannot be true."""

import pytest

from keye.processor.reply import parse_reply
from rl.endpoint.ask import InvalidAnswer, read_answer
from tests.rl.endpoint.fake_server import completion


def with_logprobs(text, pairs, **message):
    body = completion(text, logprobs={"content": [{"token": t, "logprob": v, "bytes": None} for t, v in pairs]})
    body["choices"][0]["message"] |= message
    return body


def test_a_separated_thought_is_part_of_the_text():
    for name in ("reasoning_content", "reasoning"):
        body = completion("red")
        body["choices"][0]["message"][name] = "the first is red\n"
        reply = parse_reply(read_answer(body).text)
        assert (reply.thinking, reply.answer) == ("the first is red", "red")


def test_log_probabilities_are_read_with_their_tokens():
    answer = read_answer(with_logprobs("so red", [("so", -0.5), (" red", -0.25), ("<|im_end|>", 0.0)]))
    assert answer.tokens == ("so", " red", "<|im_end|>") and answer.logprobs == (-0.5, -0.25, 0.0)


def test_a_character_of_several_tokens_belongs_to_the_token_that_completes_it():
    euro = "€".encode()
    entries = [{"token": "?", "logprob": -1, "bytes": list(euro[:1])}, {"token": "?", "logprob": -2,
                "bytes": list(euro[1:])}]  # fmt: skip
    answer = read_answer(completion("€", logprobs={"content": entries}))
    assert answer.tokens == ("", "€") and answer.logprobs == (-1, -2)


@pytest.mark.parametrize(
    "pairs",
    [
        [("green", -0.5)], [("red", 0.5)], [("red", float("nan"))], [("red", None)], [], [("red", "low")],
        [("red", float("-inf"))],
    ],
)  # fmt: skip
def test_log_probabilities_that_cannot_be_of_the_text_are_none(pairs):
    answer = read_answer(with_logprobs("red", pairs))
    assert answer.text == "red" and answer.logprobs is None and answer.tokens is None


def test_an_answer_that_the_limit_cut_off_is_not_finished():
    assert not read_answer(completion("re", finish="length")).finished
    assert read_answer(completion("red")).finished


@pytest.mark.parametrize("body", [None, 3, {}, {"choices": [{}]}, completion(5), completion("x", finish="error")])
def test_a_body_that_is_no_completion_is_refused(body):
    with pytest.raises(InvalidAnswer):
        read_answer(body)
