"""The token stream, literally, for small plans."""

import pytest
import torch

from keye.processor.stream import SPECIAL_TOKENS, Stream
from keye.processor.tokenizer import train_tokenizer

IDS = {token: 1000 + i for i, token in enumerate(SPECIAL_TOKENS)}
NAMES = {v: k for k, v in IDS.items()}


@pytest.fixture
def stream() -> Stream:
    return Stream(lambda text: [ord(c) for c in text], IDS)


def readable(ids: list[int]) -> str:
    return "".join(NAMES.get(i) or chr(i) for i in ids)


def test_slow_and_fast_frames_are_written_as_released(stream: Stream) -> None:
    ids = stream.video([0, 1, 0], [3, 1, 2], [0.0, 0.5, 12.26])
    assert readable(ids) == (
        "<|frame|>0.0<|video_pad|><|video_pad|><|video_pad|>"
        "<|frame|>0.5<|fast_start|><|video_pad|><|fast_end|>"
        "<|frame|>12.3<|video_pad|><|video_pad|>"
    )


def test_without_timestamps_there_is_only_the_frame_token(stream: Stream) -> None:
    assert readable(stream.video([0, 1], [1, 1], None)) == (
        "<|frame|><|video_pad|><|frame|><|fast_start|><|video_pad|><|fast_end|>"
    )


def test_placeholders_expand_in_order(stream: Stream) -> None:
    image, video = IDS["<|image_pad|>"], IDS["<|video_pad|>"]
    out = stream.expand([65, image, 66, video, image], [2, 1], [[7, 8]])
    assert out == [65, image, image, 66, 7, 8, image]


@pytest.mark.parametrize(("stills", "videos"), [([1], []), ([], [[5]]), ([1, 1], [[5]])])
def test_placeholders_and_media_must_match(stream: Stream, stills: list[int], videos: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="placeholders"):
        stream.expand([IDS["<|image_pad|>"], IDS["<|video_pad|>"]], stills, videos)


def test_only_the_assistants_words_and_their_end_are_learnt(stream: Stream) -> None:
    start, end = IDS["<|im_start|>"], IDS["<|im_end|>"]
    turn = lambda role, words: [start, *map(ord, f"{role}\n{words}"), end, ord("\n")]  # noqa: E731
    ids = torch.tensor(turn("user", "a?") + turn("assistant", "yes") + turn("user", "b?") + turn("assistant", "no"))
    labels = stream.labels(ids)
    assert readable(labels[labels != -100].tolist()) == "yes<|im_end|>no<|im_end|>"
    assert torch.equal(labels[labels != -100], ids[labels != -100])


def test_trained_tokenizer_round_trips_any_text_and_splits_digits() -> None:
    tokenizer = train_tokenizer(["how many flashes? three red flashes", "the red square moves left"] * 5, 400)
    text = "Ünïcode 漢字 tabs\tand\n\nred flashes 12.5"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("47")["input_ids"]) == 2
    assert len(tokenizer(" red")["input_ids"]) == 1
    assert all(tokenizer(token)["input_ids"] == [i] for i, token in enumerate(SPECIAL_TOKENS))
