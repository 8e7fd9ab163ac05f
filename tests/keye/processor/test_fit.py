"""Chats that must fit: never a token too many, never part of a frame, and an error only if nothing smaller is left."""

import io

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from keye import KeyeProcessor, SlowFastEncoder
from keye.errors import KeyeError
from keye.processor.fit import _shares

POLICIES = [
    "adaptive", "all_slow", "uniform:3", "two_stream:slow=2,fast_tokens=2", "adaptive_budget:share=0.5", "ladder"
]  # fmt: skip


def clip(frames: int, changes: int, seed: int = 0) -> np.ndarray:
    """Static scenes in sequence: uint8 [T, 112, 140, 3] with about `changes` cuts."""
    pictures = np.random.default_rng(seed).integers(0, 255, (changes + 1, 4, 5, 3), dtype=np.uint8)
    return pictures.repeat(28, 1).repeat(28, 2)[np.arange(frames) * (changes + 1) // frames]


def chat(videos: list[np.ndarray], images: list[np.ndarray], words: str = "Which colour?") -> list[dict]:
    media = [{"type": "image", "image": i} for i in images] + [{"type": "video", "video": v} for v in videos]
    return [
        {"role": "user", "content": [*media, {"type": "text", "text": words}]},
        {"role": "assistant", "content": "red"},
    ]


def complete_groups(processor: KeyeProcessor, ids: list[int]) -> list[list[tuple[str, int]]]:
    """Every video's frames as (time, pads), read from the ids; fails if one is not complete."""
    frame, pad = processor.token_id("<|frame|>"), processor.token_id("<|video_pad|>")
    first, last = processor.token_id("<|fast_start|>"), processor.token_id("<|fast_end|>")
    ends = processor.token_id("<|vision_end|>")
    videos, at = [], 0
    while at < len(ids):
        if ids[at] != frame or ids[at - 1] != processor.token_id("<|vision_start|>"):
            at += 1
            continue
        videos.append([])
        while ids[at] != ends:
            assert ids[at] == frame
            start = at = at + 1
            while ids[at] not in (pad, first):
                at += 1
            time, fast = processor.decode(ids[start:at]), ids[at] == first
            start = at = at + fast
            while ids[at] == pad:
                at += 1
            videos[-1].append((time, at - start))
            assert at > start and not (fast and ids[at] != last)
            at += fast
    return videos


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Records every video that an encoder encodes from now on."""
    seen: list[object] = []
    real = SlowFastEncoder.__call__

    def call(self: SlowFastEncoder, source: object, **sampling: object):
        seen.append(source)
        return real(self, source, **sampling)

    monkeypatch.setattr(SlowFastEncoder, "__call__", call)
    return seen


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    videos=st.lists(st.tuples(st.integers(1, 14), st.integers(0, 13)), max_size=3),
    images=st.lists(st.tuples(st.integers(20, 200), st.integers(20, 200)), max_size=2),
    policy=st.sampled_from(POLICIES),
    words=st.text(st.sampled_from("abc <"), max_size=30),
    share=st.floats(0, 1.1),
)
def test_no_chat_exceeds_max_length_and_every_frame_is_complete(
    processor: KeyeProcessor, decoded: list[object], videos, images, policy, words, share
) -> None:
    settings_ = {**processor.encoder, "policy": policy, "max_tokens": 200}
    own = KeyeProcessor(processor.tokenizer, settings_, processor.image)
    clips = [clip(frames, min(changes, frames - 1), seed) for seed, (frames, changes) in enumerate(videos)]
    stills = [np.full((height, width, 3), 90, np.uint8) for height, width in images]
    messages = chat(clips, stills, words)
    free = own.sample(messages)
    # The least: the text, stills and one frame of 4 tokens with its token, two markers and a time such as "0.0" or
    # "12.5"; two_stream shows each frame in both sizes.
    text = (
        len(free)
        - sum(len(group) for group in _groups(own, free))
        - int(free.image_grid_thw is not None)
        * int(0 if free.image_grid_thw is None else free.image_grid_thw.prod(1).sum() // 4)
    )
    each = 2 * 7 + 4 + 2 if policy.startswith("two") else 7 + 4
    least = text + len(clips) * each + len(stills) * 4
    max_length = int(text + share * (len(free) - text)) + 1
    decoded.clear()
    try:
        sample = own.sample(messages, max_length=max_length)
    except KeyeError as error:
        assert max_length < least and str(max_length) in str(error)
        return
    assert len(sample) <= max_length
    assert len(decoded) <= 2 * len(clips)
    groups = complete_groups(own, sample.input_ids.tolist())
    assert [[pads for _, pads in group] for group in groups] == [p.tokens_per_frame.tolist() for p in sample.plans]
    assert [[time for time, _ in group] for group in groups] == [
        [f"{t:.1f}" for t in p.timestamps.tolist()] for p in sample.plans
    ]
    assert sample.visual_tokens == sum(p.tokens for p in sample.plans) + (len(sample.input_ids) - text) - sum(
        len(group) for group in _groups(own, sample)
    )
    if len(free) <= max_length:
        assert torch.equal(sample.input_ids, free.input_ids) and len(decoded) == len(clips)
    else:
        said = [w for plan in sample.plans for w in plan.warnings if "max_length" in w] + sample.warnings
        assert said and all(f"max_length={max_length}" in w for w in said)


def _groups(processor: KeyeProcessor, sample) -> list[list[int]]:
    return [
        processor._stream.video(p.frame_types.tolist(), p.tokens_per_frame.tolist(), p.timestamps.tolist())
        for p in sample.plans
    ]


def test_videos_share_what_is_left_in_proportion(processor: KeyeProcessor) -> None:
    messages = chat([clip(40, 39), clip(10, 9, 1)], [])
    free = processor.sample(messages)
    fitted = processor.sample(messages, max_length=len(free) // 2)
    large, small = (plan.tokens for plan in fitted.plans)
    assert 3 <= large / small <= 5 and free.plans[0].tokens == 4 * free.plans[1].tokens
    # Of frames of 4 tokens, each with as many beside them, a good part is kept free for markers; of 48 it is little.
    assert len(fitted) >= 0.7 * (len(free) // 2)
    for before, plan in zip(free.plans, fitted.plans, strict=True):
        cut = f"from {before.tokens} to {plan.tokens} tokens and from {len(before)} to {len(plan)} frames"
        assert cut in plan.warnings[-1] and f"max_length={len(free) // 2}" in plan.warnings[-1]


@pytest.mark.parametrize("share", [0.9, 0.6])
def test_a_context_that_binds_leaves_out_similar_frames_as_a_budget_does(
    processor: KeyeProcessor, share: float
) -> None:
    """Ten pictures of 0.5 seconds in a minute: more frames are compared than fit."""
    frames, changes = clip(120, 0), range(5, 120, 12)
    for index in changes:
        frames[index] = clip(1, 0, seed=index)[0]
    limits = {"max_tokens": 1_200, "min_tokens_per_frame": 16, "max_tokens_per_frame": 20, "measure": "patch_l1"}
    own = KeyeProcessor(processor.tokenizer, limits)
    messages = chat([frames], [])
    messages[0]["content"][0]["source_fps"] = 2.0
    free = own.sample(messages)
    fitted = own.sample(messages, max_length=int(share * len(free)))
    for plan in (free.plans[0], fitted.plans[0]):
        assert set(changes) <= set(plan.frame_indices.tolist())
    assert 0.6 * share * len(free) <= len(fitted) <= share * len(free)


def test_the_text_of_many_small_slow_frames_is_counted(processor: KeyeProcessor) -> None:
    """Sixty pictures: of 48 tokens a quarter fits, of 16 more do, and each has the tokens of its time."""
    own = KeyeProcessor(processor.tokenizer, {"min_tokens_per_frame": 48, "measure": "patch_l1"})
    messages = chat([clip(60, 59)], [])
    free = own.sample(messages)
    assert free.plans[0].counts == (60, 0)
    for max_length in (900, 1300, 2000):
        fitted = own.sample(messages, max_length=max_length)
        plan = fitted.plans[0]
        assert 0.6 * max_length <= len(fitted) <= max_length and len(plan) > plan.max_tokens // 48


def test_stills_give_way_after_the_videos(processor: KeyeProcessor) -> None:
    messages = chat([clip(8, 7)], [np.zeros((112, 112, 3), np.uint8)])
    free = processor.sample(messages)
    text = len(free) - len(_groups(processor, free)[0]) - 16
    some = processor.sample(messages, max_length=text + 16 + 60)
    assert some.image_grid_thw.prod() // 4 == 16 and not some.warnings and some.plans[0].tokens < 60
    few = processor.sample(messages, max_length=text + 9 + 11)
    assert few.image_grid_thw.prod() // 4 <= 9 and len(few.plans[0]) == 1
    assert few.warnings == [
        f"image 1 is made smaller, from 16 to 9 tokens, so that the chat fits max_length={text + 20}"
    ]
    with pytest.raises(KeyeError, match=rf"{text} of text, 4 or more of 1 image, 1\d or more of 1 video.*raise"):
        processor.sample(messages, max_length=text + 8)


def test_text_is_never_cut(processor: KeyeProcessor) -> None:
    with pytest.raises(KeyeError, match="max_length is 5; raise max_length, shorten the text"):
        processor.sample(chat([], []), max_length=5)


def test_encoded_video_stays_and_the_others_give_way(processor: KeyeProcessor) -> None:
    encoded = SlowFastEncoder(**processor.encoder)(clip(8, 7))
    messages = chat([encoded, clip(8, 7)], [])
    free = processor.sample(messages)
    fitted = processor.sample(messages, max_length=len(free) - 60)
    assert fitted.plans[0] == encoded.plan and fitted.plans[1].tokens < free.plans[1].tokens
    with pytest.raises(KeyeError, match="raise max_length"):
        processor.sample(chat([encoded], []), max_length=len(free) // 4)


def test_what_can_be_read_only_once_is_still_made_to_fit(processor: KeyeProcessor) -> None:
    frames = clip(12, 11)
    whole = processor.sample(chat([frames], []), max_length=120)
    assert len(whole.plans[0]) < 12
    generator = processor.sample(chat([iter(list(frames))], []), max_length=120)
    assert torch.equal(generator.input_ids, whole.input_ids)
    pictures, file = [Image.fromarray(frame) for frame in frames], io.BytesIO()
    pictures[0].save(file, "webp", save_all=True, append_images=pictures[1:], duration=500, lossless=True)

    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return False

    piped = processor.sample(chat([Pipe(file.getvalue())], []), max_length=120)
    assert torch.equal(piped.input_ids, whole.input_ids)


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 500)), min_size=1, max_size=5), st.integers(0, 1500))
def test_shares_are_in_proportion_above_the_least(pairs: list[tuple[int, int]], spare: int) -> None:
    least, wanted = [low for low, _ in pairs], [low + more for low, more in pairs]
    room = sum(least) + spare
    shares = _shares(wanted, least, room)
    assert sum(shares) <= room
    assert all(low <= share <= want for low, share, want in zip(least, shares, wanted, strict=True))
    rates = [share / want for low, share, want in zip(least, shares, wanted, strict=True) if share > low]
    assert not rates or max(rates) - min(rates) <= 2 / min(want for low, want in zip(least, wanted, strict=True))
