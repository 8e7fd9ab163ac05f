"""Replies parsed with any tag missing, and questions that ask for a thought."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keye.evaluation.match import extract_answer
from keye.processor.reply import Reply, parse_reply, with_suffix, write_reply


@pytest.mark.parametrize(
    ("text", "thinking", "answer"),
    [
        ("<think>so</think><answer>red</answer>", "so", "red"),
        ("<think>so</think>\n\n<answer> red </answer><|im_end|>\n", "so", "red"),
        ("<think>so</think>red", "so", "red"),
        ("so it is</think><answer>red</answer>", "so it is", "red"),  # the opening stood in the prompt
        ("<answer>red</answer>", None, "red"),
        ("<answer>red", None, "red"),  # cut off
        ("red</answer>", None, "red"),
        ("<think>so and so", "so and so", ""),  # cut off
        ("<think></think><answer>red</answer>", "", "red"),
        ("<answer>blue</answer> no: <answer>red</answer>", None, "red"),
        ("<think>perhaps <answer>blue</answer></think>red", "perhaps <answer>blue</answer>", "red"),
        ("red", None, "red"),
        ("red<|im_end|><|im_start|>user", None, "red"),
        ("", None, ""),
    ],
)
def test_reply_is_parsed_with_any_tag_missing(text: str, thinking: str | None, answer: str) -> None:
    assert parse_reply(text) == Reply(thinking, answer)


words = st.text(st.characters(exclude_characters="<>"), max_size=20).map(str.strip)


@given(st.none() | words, words)
def test_reply_written_and_read_is_the_same(thinking: str | None, answer: str) -> None:
    reply = Reply(thinking, answer)
    assert parse_reply(write_reply(reply)) == reply


@given(st.lists(st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", "red", " ", "\n"]), max_size=8))
def test_any_pieces_make_a_reply(pieces: list[str]) -> None:
    text = "".join(pieces)
    reply = parse_reply(text)
    assert (reply.thinking is not None) == ("think>" in text)
    assert "</answer>" not in reply.answer and reply.answer == reply.answer.strip()


def test_answers_are_those_of_the_evaluation() -> None:
    for text in ("<think>so</think><answer>red</answer>", "<think>so</think> red", "red", "<answer>red</answer>"):
        assert parse_reply(text).answer == extract_answer(text)


def test_suffix_takes_the_place_of_another() -> None:
    assert with_suffix("Why?", True) == "Why?/think"
    assert with_suffix("Why?", False) == "Why?/no_think"
    assert with_suffix("Why? /no_think\n", True) == "Why? /think"
    assert with_suffix("Why?/think", True) == "Why?/think"
    assert with_suffix("is /think a path?", False) == "is /think a path?/no_think"
