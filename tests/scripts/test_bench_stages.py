"""The benches of the stages compare equal work and count it correctly."""

import itertools
import math
import random

import pytest
import torch

from keye.model.config import KeyeConfig
from keye.model.keye import KeyeForConditionalGeneration
from keye.model.projector import merge_order
from keye.model.rope import stream_positions
from keye.processor.processor import Sample
from scripts.bench.stages import extension as stages_extension
from scripts.bench.stages import packing as stages_packing
from scripts.bench.stages import trainer as stages_trainer
from stages.data.collate import pack

IMAGE, VIDEO = 7, 8


def sample(seed: int, stills: list[tuple[int, int]], frames: list[tuple[int, int]], words: int) -> Sample:
    """Alternating text, images and frames (height, width in patches); all text but the first token has labels."""
    draw = torch.Generator().manual_seed(seed)
    parts = [torch.randint(10, 60, (words,), generator=draw)]
    for token, grids in ((IMAGE, stills), (VIDEO, frames)):
        for height, width in grids:
            parts += [torch.full((height * width // 4,), token), torch.randint(10, 60, (2,), generator=draw)]
    ids = torch.cat(parts)
    grid = {t: torch.tensor([(1, *g) for g in gs]) for t, gs in ((IMAGE, stills), (VIDEO, frames)) if gs}
    pixels = {t: torch.randn(int(g.prod(1).sum()), 3, 14, 14, generator=draw) for t, g in grid.items()}
    labels = ids.masked_fill((ids == IMAGE) | (ids == VIDEO), -100)
    positions = stream_positions(ids, [(t, g[:, 1:] // 2) for t, g in grid.items()])
    return Sample(ids, labels, positions, pixels.get(IMAGE), grid.get(IMAGE), pixels.get(VIDEO), grid.get(VIDEO))


def samples() -> list[Sample]:
    return [
        sample(0, [], [(4, 2), (2, 2)], 5),
        sample(1, [(2, 4)], [], 9),
        sample(2, [], [], 3),
        sample(3, [(2, 2), (4, 4)], [(2, 2)], 4),
    ]


def test_documents_of_a_pack_are_the_samples_it_was_made_of():
    given = samples()
    found = stages_packing.documents(pack(given, multiple=16, pad=0), IMAGE, VIDEO)
    assert len(found) == len(given)  # what fills up the row is none
    for document, one in zip(found, given, strict=True):
        assert torch.equal(document.input_ids, one.input_ids)
        assert torch.equal(document.position_ids, one.position_ids)
        assert torch.equal(document.shift_labels[:-1], one.labels[1:]) and document.shift_labels[-1] == -100
        for name in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"):
            value = getattr(one, name)
            assert (name in document.visual) == (value is not None)
            assert value is None or torch.equal(document.visual[name], value)


def test_padded_batches_have_the_loss_of_the_pack():
    torch.manual_seed(0)
    config = KeyeConfig.preset("tiny", vocab_size=64)
    config.image_token_id, config.video_token_id = IMAGE, VIDEO
    model = KeyeForConditionalGeneration(config).train()
    row = pack(samples())
    packed = model(**row, num_items_in_batch=1.0).loss
    stage, found = stages_packing.Padded(), stages_packing.documents(row, IMAGE, VIDEO)
    batches = [stages_packing.padded(found[:1], 0), stages_packing.padded(found[1:], 0)]
    apart = sum(stage.loss(model, batch, None) for batch in batches)
    assert torch.allclose(packed, apart, rtol=1e-5)
    assert sum(stage.weight(batch, None) for batch in batches) == int((row["shift_labels"] != -100).sum())


@pytest.mark.parametrize("seed", range(5))
def test_no_other_cut_of_the_sorted_documents_has_fewer_padded_positions(seed):
    draw = random.Random(seed)
    sizes, batches = [draw.randint(1, 40) for _ in range(8)], 3
    groups = stages_packing.by_length(sizes, batches)
    assert sorted(i for group in groups for i in group) == list(range(8)) and len(groups) == batches

    def positions(parts) -> int:
        return sum(max(part) * len(part) for part in parts)

    down = sorted(sizes, reverse=True)
    every = [(down[:a], down[a:b], down[b:]) for a, b in itertools.combinations(range(1, 8), 2)]
    assert positions([[sizes[i] for i in group] for group in groups]) == min(map(positions, every))


def test_batches_as_drawn_hold_every_document_once_and_ranks_get_as_many():
    sizes = [random.Random(1).randint(1, 90) for _ in range(21)]
    groups = stages_packing.as_drawn(sizes, 6, random.Random(0))
    assert sorted(i for group in groups for i in group) == list(range(21))
    assert {len(group) for group in groups} <= {3, 4}
    given = stages_packing.share_out(groups, sizes, 2)
    assert [len(rank) for rank in given] == [3, 3]
    assert sorted(map(tuple, given[0] + given[1])) == sorted(map(tuple, groups))


def test_their_samples_predict_the_same_words_and_hold_the_same_patches():
    found = stages_packing.documents(pack(samples()), IMAGE, VIDEO)
    document = found[3]
    given = stages_trainer.their_sample(document)
    # transformers compares the output at i with the label at i + 1.
    assert torch.equal(given["labels"][1:], document.shift_labels[:-1]) and given["labels"][0] == -100
    grid, pixels = document.visual["image_grid_thw"], document.visual["pixel_values"]
    assert torch.equal(given["pixel_values"][4], pixels[merge_order(grid, len(pixels)).flatten()[4]].flatten())
    batch = stages_trainer.collate([given, stages_trainer.their_sample(found[2])])
    assert batch["attention_mask"].sum(1).tolist() == [document.tokens, 3]
    assert batch["position_ids"].shape == (3, 2, document.tokens)
    assert (batch["labels"][1, 3:] == -100).all()


def test_collation_of_theirs_is_timed_apart():
    found = stages_packing.documents(pack(samples()), IMAGE, VIDEO)
    given, collation = [stages_trainer.their_sample(document) for document in found], stages_trainer.Collation()
    batch = collation(given)
    assert collation.seconds > 0
    assert all(torch.equal(value, batch[name]) for name, value in stages_trainer.collate(given).items())


def test_a_gain_is_paired():
    more, error = stages_extension.gain([True, True, False, True], [False, True, False, False])
    assert more == 0.5
    assert error == pytest.approx(math.sqrt((0.25 * 4) / 3 / 4))
    assert stages_extension.gain([True] * 3, [True] * 3) == (0.0, 0.0)


def test_lengths_beyond_the_context_alone_count_for_the_extension():
    def answers(tokens: int, right: list[bool]) -> dict:
        return {"tokens": tokens, "right": {arm: right for arm in stages_extension.ARMS}}

    found = {
        seed: {
            str(duration): answers(200 if duration <= 5 else 300 * duration, [duration <= 5, duration == 10])
            for duration in stages_extension.ASKED
        }
        for seed in (1, 2)
    }
    claims, table = stages_extension.judge(found)
    assert claims[0].figure.startswith("50") and claims[0].met is False
    assert claims[1].figure.startswith("10 ")  # one question of two at one length of five
    assert claims[1].met is False and claims[3].met is None  # equal arms are no gain; the base's part promises nothing
    assert [row[2] for row in table.rows][0] == "0.8 ×"
