"""Aggregation in Keye's own model: the tower, loops over bins and the plan give the tokens that every path reads."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from keye import KeyeForConditionalGeneration, KeyeProcessor, SlowFastEncoder
from keye.aggregation.plans import entry_frames, plan_blocks, reading_order
from keye.errors import KeyeError, RecipeError
from keye.evaluation import controls
from keye.evaluation.public.frames import part_of
from keye.inference.planned import planned_video
from keye.model.config import KeyeConfig
from keye.model.placeholders import read_tokens
from keye.processor.sample import Sample
from keye.processor.tokenizer import train_tokenizer
from keye.slowfast.plan import VideoPlan
from rl.policy.scoring import Group, score
from rl.policy.sequence_parallel import _shared
from rl.rollout.inprocess import InProcessRollout
from rl.rollout.messages import messages_of
from stages import recipe as recipes
from stages.cost.work import kinds_of, largest_frame, work_of
from stages.data.collate import from_bytes, pack, to_bytes
from stages.data.items import Item
from stages.data.sources.decontaminate import sample_hashes
from stages.distributed.parallel import ParallelDims, shard_vision
from stages.recipe import load
from tests.keye.drawn_chat import chat, clip

SIZES = {"min_tokens_per_frame": 4, "max_tokens_per_frame": 24, "max_tokens": 400, "fps": 2.0}
SPECS = ["mean", "max", "mean:oversample=2", "mean:layout=slow_then_fast"]
POLICIES = ["adaptive", "two_stream:slow=3,fast_tokens=4"]
RECIPE = Path(recipes.__file__).parent / "recipes" / "tiny.toml"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["user assistant Which colour? red or blue 0.5"] * 3, 400)


@pytest.fixture(scope="module")
def model(tokenizer) -> KeyeForConditionalGeneration:
    torch.manual_seed(0)
    config = KeyeConfig.preset("tiny", vocab_size=len(tokenizer), initializer_range=0.3)
    config.vision_config.num_hidden_layers, config.text_config.num_hidden_layers = 1, 2
    config.text_config.layer_types = config.text_config.layer_types[:2]
    config = KeyeProcessor(tokenizer).configure(config)
    return KeyeForConditionalGeneration(config).eval()


def processor_of(tokenizer, aggregation: str | None, policy: str = "adaptive") -> KeyeProcessor:
    return KeyeProcessor(tokenizer, encoder={**SIZES, "policy": policy, "aggregation": aggregation})


def by_hand(model: KeyeForConditionalGeneration, sample: Sample, kind: str) -> torch.Tensor:
    """The visual tokens of the frames of one video, pooled in loops."""
    [plan] = sample.plans
    tokens = model.encode_vision(sample.pixel_values_videos, sample.video_grid_thw)
    parts = tokens.split((sample.video_grid_thw.prod(1) // 4).tolist())
    found = []
    for entry in reading_order(plan):
        frame = entry_frames(plan)[entry]
        height, width = (sample.video_grid_thw[frame, 1:] // 2).tolist()
        rows, columns = (side // 28 for side in plan.frame_sizes[entry])
        grid = parts[frame].view(height, width, -1)
        for r in range(rows):
            for c in range(columns):
                top, left = r * height // rows, c * width // columns
                bottom, right = -(-(r + 1) * height // rows), -(-(c + 1) * width // columns)
                cells = grid[top:bottom, left:right].flatten(0, 1)
                found.append(cells.mean(0) if kind == "mean" else cells.amax(0))
    return torch.stack(found)


@torch.no_grad()
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("spec", SPECS)
def test_forward_reads_the_tokens_computed_by_hand(model, tokenizer, spec, policy):
    sample = processor_of(tokenizer, spec, policy).sample(chat())
    expected = by_hand(model, sample, spec[:4].rstrip(":"))
    assert len(expected) == sample.plans[0].tokens == sample.visual_tokens <= 400
    ids, positions = sample.input_ids[None], sample.position_ids[:, None]
    pixels = {"pixel_values_videos": sample.pixel_values_videos, "video_grid_thw": sample.video_grid_thw}
    found = model(ids, **pixels, video_blocks=sample.video_blocks)  # it also computes the positions
    known = model(ids, position_ids=positions, visual_features=expected)
    torch.testing.assert_close(found.logits, known.logits, atol=1e-4, rtol=1e-4)


def test_each_frame_is_encoded_once(model, tokenizer):
    sizes = {}
    for spec in (None, "mean"):
        sample = processor_of(tokenizer, spec, "two_stream:slow=3,fast_tokens=4").sample(chat())
        sizes[spec] = len(sample.video_grid_thw)
    assert sizes == {None: 12, "mean": 9}  # pixels: three frames are resized and encoded twice


def test_the_stream_is_that_of_the_pixel_pathway(tokenizer):
    pixels, features = (processor_of(tokenizer, spec).sample(chat(image=True)) for spec in (None, "mean:oversample=2"))
    assert torch.equal(pixels.input_ids, features.input_ids)
    assert torch.equal(pixels.position_ids, features.position_ids)
    assert pixels.plans[0].frame_types.tolist() == features.plans[0].frame_types.tolist()
    assert pixels.video_blocks is None and len(features.pixel_values_videos) > len(pixels.pixel_values_videos)


def test_slow_then_fast_is_the_order_of_the_stream(tokenizer):
    by_time, blocks = (processor_of(tokenizer, f"mean:layout={x}").sample(chat()) for x in ("time", "slow_then_fast"))
    [plan] = blocks.plans
    slow = plan.frame_types == 0
    wanted = [*plan.timestamps[slow].tolist(), *plan.timestamps[~slow].tolist()]
    words = tokenizer.decode(blocks.input_ids).split("<|frame|>")[1:]
    assert [float(word[:3]) for word in words] == wanted
    assert sorted(by_time.input_ids.tolist()) == sorted(blocks.input_ids.tolist())


@torch.no_grad()
@pytest.mark.parametrize("spec", ["mean", "max:layout=slow_then_fast"])
def test_generate_equals_forward_token_by_token(model, tokenizer, spec):
    processor = processor_of(tokenizer, spec, "two_stream:slow=2,fast_tokens=4")
    chats = [chat(seed, frames, image)[:1] for seed, frames, image in ((0, 9, False), (1, 5, True))]
    inputs = processor.apply_chat_template(
        chats, tokenize=True, add_generation_prompt=True, padding=True, return_tensors="pt"
    )
    found = model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
    for row, one in enumerate(chats):
        alone = processor.collate([processor.sample(one, add_generation_prompt=True)])
        alone.pop("labels")
        positions = alone.pop("position_ids")
        ids = alone.pop("input_ids")
        alone.pop("attention_mask")
        for _ in range(4):
            later = torch.arange(int(positions.max()) + 1, int(positions.max()) + 1 + ids.shape[1] - positions.shape[2])
            every = torch.cat([positions, later.expand(3, 1, -1)], 2)
            logits = model(ids, position_ids=every, **alone).logits[:, -1]
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        assert found[row, -4:].tolist() == ids[0, -4:].tolist()


@torch.no_grad()
def test_generation_from_a_cache_and_in_chunks_and_with_copies_equals_generation_at_once(model, tokenizer):
    processor = processor_of(tokenizer, "mean", "two_stream:slow=2,fast_tokens=4")
    inputs = processor.apply_chat_template(chat(image=True)[:1], tokenize=True, add_generation_prompt=True)
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    expected = model.generate(**inputs, **options)
    chunked = model.generate(**inputs, **options, prefill_chunk_size=7)
    assert torch.equal(expected, chunked)
    beams = model.generate(**inputs, **{**options, "num_beams": 2, "num_return_sequences": 2})
    assert beams.shape[0] == 2
    length = inputs["input_ids"].shape[1]
    for cut in (length // 3, length // 2, length - 2):  # the cache ends inside a video, inside one of its frames
        full = model(**inputs, use_cache=True)
        cache = copy.deepcopy(full.past_key_values)
        cache.crop(cut - length)
        assert torch.equal(expected, model.generate(**inputs, **options, past_key_values=cache))


def test_a_document_has_the_same_loss_and_gradients_in_a_pack(model, tokenizer):
    samples = [
        processor_of(tokenizer, spec, policy).sample(chat(seed, frames, image))
        for spec, policy, seed, frames, image in (
            ("mean", POLICIES[1], 0, 9, False),
            (None, POLICIES[0], 1, 5, True),  # pixels in the same pack
            ("max:layout=slow_then_fast", POLICIES[0], 2, 6, True),
        )
    ]
    network = copy.deepcopy(model)
    network.set_attn_implementation("keye")

    def gradients(batches):
        network.zero_grad()
        total = sum(network(**batch, num_items_in_batch=1.0).loss for batch in batches)
        total.backward()
        return total.detach(), [p.grad.clone() for p in network.parameters()]

    one, ours = gradients([pack(samples)])
    sum_of, theirs = gradients([pack([sample]) for sample in samples])
    torch.testing.assert_close(one, sum_of, atol=1e-4, rtol=1e-5)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_the_update_of_rl_scores_the_tokens_of_the_rollout(model, tokenizer):
    processor = processor_of(tokenizer, "mean", "two_stream:slow=2,fast_tokens=4")
    network = copy.deepcopy(model)
    samples = [processor.sample(chat(seed)[:1], add_generation_prompt=True) for seed in (0, 1)]
    answers = [torch.tensor([7, 8, 9]), torch.tensor([10, 11])]
    groups = [
        Group(s, [a, a[:1]], [torch.zeros(len(a)), torch.zeros(1)], [True] * 2, [""] * 2)
        for s, a in zip(samples, answers, strict=True)
    ]
    network.set_attn_implementation("keye")
    found = score(network, groups).log_probs
    expected = []
    for sample, answer in zip(samples, answers, strict=True):
        for completion in (answer, answer[:1]):
            ids = torch.cat([sample.input_ids, completion])[None]
            logits = model(
                ids,
                pixel_values_videos=sample.pixel_values_videos,
                video_grid_thw=sample.video_grid_thw,
                video_blocks=sample.video_blocks,
            ).logits[0]
            logits[:, [model.config.image_token_id, model.config.video_token_id]] = -torch.inf
            rows = logits[-len(completion) - 1 : -1].log_softmax(-1)
            expected.append(rows.gather(1, completion[:, None])[:, 0])
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-4, rtol=1e-4)


def test_a_plan_and_a_prompt_travel(tokenizer):
    processor = processor_of(tokenizer, "max:oversample=2", POLICIES[1])
    sample = processor.sample(chat()[:1], add_generation_prompt=True)
    assert VideoPlan.from_json(sample.plans[0].to_json()) == sample.plans[0]
    [(_, item)] = from_bytes(to_bytes([(1, Item(sample, "a", 0, "video", ""))]))
    assert torch.equal(item.sample.video_blocks, sample.video_blocks)
    [message] = messages_of(sample, processor)
    video = next(part for part in message["content"] if part["type"] == "video_plan")["video_plan"]
    read = planned_video(video, 1 << 24)
    content = [{"type": "video", "video": read}, {"type": "text", "text": "Which colour?"}]
    again = processor.sample([{"role": "user", "content": content}], add_generation_prompt=True)
    for name in ("input_ids", "position_ids", "pixel_values_videos", "video_grid_thw", "video_blocks"):
        assert torch.equal(getattr(again, name), getattr(sample, name)), name


def test_an_encoder_with_a_tower_gives_the_plans_tokens(model):
    encoder = SlowFastEncoder(**SIZES, policy=POLICIES[1], aggregation="mean", tower=model.encode_vision)
    video = encoder(clip())
    assert video.features.shape == (video.plan.tokens, 128)
    assert torch.equal(video.picture(0), video.picture(1))  # the two entries of the first frame
    assert len(video.pictures()) == 9


def test_controls_change_the_pixels_of_encoded_frames_only(tokenizer):
    processor = processor_of(tokenizer, "mean:layout=slow_then_fast", POLICIES[1])
    sample, partner = processor.sample(chat(0)), processor.sample(chat(1, frames=5))
    known = controls.frames_of(sample.pixel_values_videos, sample.video_grid_thw)
    for changed in (controls.one_frame(sample), controls.shuffled(sample, 3), controls.other(sample, partner)):
        assert changed.pixel_values_videos.shape == sample.pixel_values_videos.shape
        assert changed.video_blocks is sample.video_blocks
    shown = controls.frames_of(controls.one_frame(sample).pixel_values_videos, sample.video_grid_thw)
    assert all(torch.equal(picture, known[3]) for picture in shown)  # 0, 3 and 6 of 9 are slow
    shuffled = controls.frames_of(controls.shuffled(sample, 3).pixel_values_videos, sample.video_grid_thw)
    assert sorted(int(p.long().sum()) for p in shuffled) == sorted(int(p.long().sum()) for p in known)


def test_a_part_of_a_video_has_the_blocks_of_its_entries():
    encoder = SlowFastEncoder(**SIZES, policy=POLICIES[1], aggregation="mean")
    video = encoder(clip())
    first = part_of(video, 0, 5)  # slow and fast of frame 0, fast of 1 and 2, slow of 3
    rest = part_of(video, 6, 12)
    assert [len(part.grid_thw) for part in (first, rest)] == [4, 5]
    assert plan_blocks(first.plan)[:, 1].tolist() == [0, 0, 1, 2, 3]
    assert plan_blocks(rest.plan)[:, 1].tolist() == [0, 1, 2, 2, 3, 4][: len(rest.plan)]
    joined = torch.cat([first.pixel_values, rest.pixel_values])
    assert torch.equal(joined, video.pixel_values)


def test_the_hashes_of_decontamination_are_of_slow_frames(tokenizer):
    sample = processor_of(tokenizer, "mean", POLICIES[1]).sample(chat())
    plain = processor_of(tokenizer, None, POLICIES[1]).sample(chat())
    assert sample_hashes(sample) == sample_hashes(plain)  # slow frames have the same pictures in both


def test_a_smaller_context_shrinks_the_video(tokenizer):
    processor = processor_of(tokenizer, "mean:layout=slow_then_fast", POLICIES[1])
    full = processor.sample(chat())
    fitted = processor.sample(chat(), max_length=len(full) - 60)
    assert len(fitted) <= len(full) - 60 and fitted.visual_tokens == fitted.plans[0].tokens


def test_without_aggregation_nothing_is_added(tokenizer):
    sample = processor_of(tokenizer, None).sample(chat())
    assert sample.video_blocks is None
    assert "video_blocks" not in pack([sample])
    assert "video_blocks" not in processor_of(tokenizer, None).collate([sample])


def test_what_cannot_be_done_is_refused(tokenizer):
    with pytest.raises(KeyeError, match="pool is 'median'"):
        SlowFastEncoder(aggregation="median")
    with pytest.raises(KeyeError, match="'window=3' is not an option"):
        SlowFastEncoder(aggregation="mean:window=3")
    with pytest.raises(KeyeError, match="keye.aggregation.llava"):
        SlowFastEncoder(aggregation="mean").frames(clip())
    sample = processor_of(tokenizer, "mean").sample(chat())
    with pytest.raises(RecipeError, match="sequence parallelism"):
        shard_vision(pack([sample], 2), ParallelDims(0, 2, 2, object()), 0, 1)
    group = Group(sample, [torch.tensor([1])], [torch.zeros(1)], [True], [""])
    with pytest.raises(RecipeError, match=r"gspo.sequence_parallel"):
        _shared(group, 0)
    bad = replace(sample, video_grid_thw=sample.video_grid_thw[:-1])
    with pytest.raises(KeyeError, match="prepare blocks and pixels"):
        read_tokens(
            torch.zeros(int(bad.video_grid_thw.prod(1).sum()) // 4, 2), None, bad.video_grid_thw, bad.video_blocks
        )


def test_a_rollout_samples_with_the_log_probabilities_that_the_update_scores(model, tokenizer):
    processor = processor_of(tokenizer, "mean:layout=slow_then_fast", "two_stream:slow=2,fast_tokens=4")
    network = copy.deepcopy(model)
    network.set_attn_implementation("keye")
    samples = [processor.sample(chat(seed)[:1], add_generation_prompt=True) for seed in (0, 1)]
    engine = InProcessRollout(network, processor, torch.Generator().manual_seed(0))
    groups = engine.generate(samples, 3, 1.0, 5)
    sampled = torch.cat([row for group in groups for row in group.log_probs])
    assert all(torch.equal(g.sample.video_blocks, s.video_blocks) for g, s in zip(groups, samples, strict=True))
    torch.testing.assert_close(sampled, score(network, groups).log_probs.detach(), atol=1e-4, rtol=1e-4)


def test_the_cost_of_a_recipe_counts_the_patches_that_are_encoded():
    sizes = "processor.encoder={min_tokens_per_frame=16,max_tokens_per_frame=64"
    works = {}
    for spec in (None, "mean", "mean:oversample=2"):
        recipe = load(
            RECIPE, ["annealing.sequence_parallel=1", sizes + ("}" if spec is None else f",aggregation='{spec}'}}")]
        )
        stage = recipe.multitask
        works[spec] = work_of(stage, kinds_of(recipe, stage)), largest_frame(recipe, stage)
    # A frame has 32 tokens on average (between 16 and 64) and is encoded with 64, or 256 where it is oversampled.
    videos = {spec: max(work.frames) for spec, (work, _) in works.items()}
    assert videos == {None: (12, 12), "mean": (16, 16), "mean:oversample=2": (32, 32)}
    assert len({len(work.frames) for work, _ in works.values()}) == 1
    assert [frame for _, frame in works.values()] == [256, 256, 1024]
