"""Packs are full, whole and apart; shares are counted in tokens; a resumed stream is the uninterrupted one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from keye.errors import CheckpointError, RecipeError
from stages.data.mixture import Mixture
from stages.data.packing import Packer, pack
from stages.recipe import SourceRecipe, StageRecipe
from stages.stage import _shares
from tests.stages import small


def stream(lengths: list[int]) -> Mixture:
    return Mixture([(small.Lengths("numbers", "text", lengths), 1.0)])


def packed(packer: Packer, count: int) -> list[list[int]]:
    """The lengths in each of the next packs."""
    return [[item.tokens for item in packer.next()] for _ in range(count)]


def test_oldest_goes_first_and_then_always_the_largest_that_fits():
    packer = Packer(stream([5, 7, 3, 4, 2]), context=10, pool=5)
    # Pool 5 7 3 4 2: the oldest is 5; of what is left 4 is the largest that fits into 5; then nothing fits into 1.
    assert packed(packer, 1) == [[5, 4]]
    # Pool 7 3 2, filled up with 5 7.
    assert packed(packer, 1) == [[7, 3]]
    # Pool 2 5 7, filled up with 3 4.
    assert packed(packer, 1) == [[2, 7]]


def test_of_equal_samples_the_older_goes_first():
    packer = Packer(stream([6, 2, 2, 9, 9]), context=8, pool=5)
    assert [item.index for item in packer.next()] == [0, 1]


def test_pack_literal():
    row = pack([small.text_sample(3, first=10), small.text_sample(2, first=20)], multiple=4, pad=9)
    assert row["input_ids"].tolist() == [[10, 11, 12, 20, 21, 9, 9, 9]]
    # The label at i is token i + 1; the last of a document predicts nothing, nor does the filling.
    assert row["shift_labels"].tolist() == [[11, 12, -100, 21, -100, -100, -100, -100]]
    assert row["cu_seqlens"].tolist() == [0, 3, 5, 8] and row["cu_seqlens"].dtype == torch.int32
    assert row["position_ids"].tolist() == [[[0, 1, 2, 0, 1, 0, 1, 2]]] * 3
    assert set(row) == {"input_ids", "shift_labels", "cu_seqlens", "position_ids"}


def test_pack_needs_no_filling_when_it_fits():
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


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60),
    context=st.integers(40, 120),
    pool=st.integers(1, 12),
    packs=st.integers(1, 30),
)
def test_nothing_is_lost_and_no_pack_is_over_the_context(lengths, context, pool, packs):
    mixture = stream(lengths)
    packer = Packer(mixture, context, pool)
    seen = []
    for _ in range(packs):
        items = packer.next()
        assert items and sum(item.tokens for item in items) <= context
        seen += [item.index for item in items]
    # What was drawn is either in one pack or still in the pool, once.
    drawn = mixture.sources["numbers"].at
    assert sorted(seen + [item.index for item in packer.pool]) == list(range(drawn))


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60), context=st.integers(40, 120))
def test_no_sample_waits_for_ever(lengths, context):
    packer = Packer(stream(lengths), context, 8)
    for _ in range(20):
        oldest = packer.pool[0].index if packer.pool else 0
        assert oldest in [item.index for item in packer.next()]


def test_long_packs_are_nearly_full():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(20, 400, (997,), generator=generator).tolist()
    filled = [sum(pack_) for pack_ in packed(Packer(stream(lengths), 4096), 40)]
    assert sum(filled) / (40 * 4096) > 0.98


def test_shares_are_counted_in_tokens():
    generator = torch.Generator().manual_seed(0)
    shares = {"video": 0.24, "image": 0.5, "text": 0.26}
    means = {"video": 400, "image": 60, "text": 25}
    mixture = Mixture(
        [
            (small.Lengths(kind, kind, torch.randint(1, 2 * means[kind], (97,), generator=generator).tolist()), share)
            for kind, share in shares.items()
        ]
    )
    for _ in range(5000):
        mixture.next()
    assert mixture.realised() == pytest.approx(shares, abs=0.01)


def test_kinds_keep_their_share_whatever_the_weights_inside():
    sources = [
        SourceRecipe("a.jsonl", "video", weight=3.0),
        SourceRecipe("b.jsonl", "video"),
        SourceRecipe("c.jsonl", "text"),
    ]
    stage = StageRecipe(steps=1, lr=1.0, mixture={"video": 0.8, "text": 0.2})
    assert [share for _, share in _shares("alignment", stage, sources)] == pytest.approx([0.6, 0.2, 0.2])
    with pytest.raises(RecipeError, match="wants image"):
        _shares("alignment", StageRecipe(steps=1, lr=1.0, mixture={"image": 1.0}), sources)
    with pytest.raises(RecipeError, match="no data source serves the stage alignment"):
        _shares("alignment", stage, [])
    with pytest.raises(RecipeError, match="the same part of a manifest twice"):
        _shares("alignment", stage, [*sources, SourceRecipe("a.jsonl", "video")])


@pytest.mark.parametrize("after", [0, 1, 7])
def test_resumed_packer_gives_the_same_packs(after):
    def fresh() -> Packer:
        parts = [(small.Lengths("a", "video", [31, 8, 15]), 0.7), (small.Lengths("b", "text", [5, 9]), 0.3)]
        return Packer(Mixture(parts), 64, 6)

    whole, begun = fresh(), fresh()
    for _ in range(after):
        whole.next(), begun.next()
    resumed = fresh()
    resumed.load_state_dict(begun.state_dict())
    for _ in range(20):
        assert [item.ref for item in whole.next()] == [item.ref for item in resumed.next()]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return small.world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("after", [0, 3, 4, 6])
def test_resumed_source_goes_on_over_the_end_of_its_epoch(manifest, after):
    processor = small.processor()
    whole = small.source(manifest, "text", processor)
    order = [whole.next().index for _ in range(12)]
    assert sorted(order[:4]) == sorted(order[4:8]) == sorted(order[8:]) and len(set(order)) == 4
    begun, resumed = small.source(manifest, "text", processor), small.source(manifest, "text", processor)
    for _ in range(after):
        begun.next()
    resumed.load_state_dict(begun.state_dict())
    assert [resumed.next().index for _ in range(12 - after)] == order[after:]


def test_resumed_stream_of_real_sources_gives_the_same_tensors(manifest):
    def fresh() -> Packer:
        processor = small.processor()
        parts = [(small.source(manifest, kind, processor), 1 / 3) for kind in ("video", "image", "text")]
        return Packer(Mixture(parts), 128, 4)

    whole, begun, resumed = fresh(), fresh(), fresh()
    for _ in range(3):
        whole.next(), begun.next()
    resumed.load_state_dict(begun.state_dict())
    for _ in range(3):
        one, two = (pack([item.sample for item in packer.next()], 2) for packer in (whole, resumed))
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_state_of_other_sources_is_refused():
    state = Mixture([(small.Lengths("a", "text", [3]), 1.0)]).state_dict()
    with pytest.raises(CheckpointError, match="other data.sources"):
        Mixture([(small.Lengths("b", "text", [3]), 1.0)]).load_state_dict(state)
