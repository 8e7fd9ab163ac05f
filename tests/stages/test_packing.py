"""Packs have separate documents and are filled exactly; kinds keep their shares; a resumed source continues."""

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from keye.errors import RecipeError
from keye.slowfast.pixels import normalised
from stages.data.collate import pack
from stages.data.packing.closing import fill
from stages.recipe import SourceRecipe
from stages.stage import _shares
from tests.stages import small


def test_pack_literal():
    row = pack([small.text_sample(3, first=10), small.text_sample(2, first=20)], multiple=4, pad=9)
    assert row["input_ids"].tolist() == [[10, 11, 12, 20, 21, 9, 9, 9]]
    # The label at i is token i + 1; neither the last token of a document nor the padding has one.
    assert row["shift_labels"].tolist() == [[11, 12, -100, 21, -100, -100, -100, -100]]
    assert row["cu_seqlens"].tolist() == [0, 3, 5, 8] and row["cu_seqlens"].dtype == torch.int32
    assert row["position_ids"].tolist() == [[[0, 1, 2, 0, 1, 0, 1, 2]]] * 3
    assert set(row) == {"input_ids", "shift_labels", "cu_seqlens", "position_ids"}


def test_pack_of_the_right_length_has_no_padding():
    row = pack([small.text_sample(3), small.text_sample(5)], multiple=4)
    assert row["cu_seqlens"].tolist() == [0, 3, 8]


def test_pixels_follow_in_stream_order():
    samples = [small.text_sample(3) for _ in range(3)]
    for value, sample in zip((1.0, 2.0), samples[::2], strict=True):
        sample.pixel_values_videos = torch.full((4, 3, 14, 14), value)
        sample.video_grid_thw = torch.tensor([[1, 2, 2]])
    row = pack(samples)
    assert row["pixel_values_videos"][:, 0, 0, 0].tolist() == [1.0] * 4 + [2.0] * 4
    assert row["video_grid_thw"].tolist() == [[1, 2, 2]] * 2 and "pixel_values" not in row


@settings(max_examples=200, deadline=None)
@given(room=st.integers(0, 60), sizes=st.lists(st.integers(1, 40), max_size=9))
def test_fill_has_the_largest_possible_sum(room, sizes):
    chosen = fill(room, sizes)
    sums = {sum(part) for n in range(len(sizes) + 1) for part in combinations(sizes, n)}
    assert sum(sizes[i] for i in chosen) == max(total for total in sums if total <= room)
    assert chosen == sorted(set(chosen))


def test_fill_takes_the_earlier_of_equal_sums():
    assert fill(6, [2, 4, 6, 2]) == [0, 1]


def test_bytes_stay_bytes_unless_joined_with_floats():
    samples = [small.text_sample(3) for _ in range(2)]
    for sample in samples:
        sample.pixel_values = torch.full((4, 3, 14, 14), 51, dtype=torch.uint8)
        sample.image_grid_thw = torch.tensor([[1, 2, 2]])
    assert pack(samples)["pixel_values"].dtype == torch.uint8
    samples[1].pixel_values = normalised(samples[1].pixel_values)
    joined = pack(samples)["pixel_values"]
    assert joined.dtype == torch.float32 and joined.unique().tolist() == pytest.approx([51 / 127.5 - 1])


def test_kinds_keep_their_share_whatever_the_weights_inside():
    sources = [
        SourceRecipe("a.jsonl", "video", weight=3.0),
        SourceRecipe("b.jsonl", "video"),
        SourceRecipe("c.jsonl", "text"),
    ]
    mixture, key = {"video": 0.8, "text": 0.2}, "data.sources"
    assert [share for _, share in _shares("alignment", mixture, sources, key)] == pytest.approx([0.6, 0.2, 0.2])
    with pytest.raises(RecipeError, match="names image, but no data source of that kind"):
        _shares("alignment", {"image": 1.0}, sources, key)
    with pytest.raises(RecipeError, match="no data source is for the stage alignment"):
        _shares("alignment", mixture, [], key)
    with pytest.raises(RecipeError, match="the same part of a manifest twice"):
        _shares("alignment", mixture, [*sources, SourceRecipe("a.jsonl", "video")], key)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return small.world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("after", [0, 3, 4, 6])
def test_resumed_source_continues_over_the_end_of_its_epoch(manifest, after):
    processor = small.processor()
    whole = small.source(manifest, "text", processor)
    order = [whole.draw() for _ in range(12)]
    assert sorted(order[:4]) == sorted(order[4:8]) == sorted(order[8:]) and len(set(order)) == 4
    begun, resumed = small.source(manifest, "text", processor), small.source(manifest, "text", processor)
    for _ in range(after):
        begun.draw()
    resumed.load_state_dict(begun.state_dict())
    assert [resumed.draw() for _ in range(12 - after)] == order[after:]
