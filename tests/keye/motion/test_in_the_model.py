"""The motion pathway in the complete model: forward, generate, packs, the update of RL, directories, recipes."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from keye import KeyeForConditionalGeneration, KeyeProcessor, SlowFastEncoder
from keye.errors import KeyeError, RecipeError
from keye.model.config import KeyeConfig
from keye.processor.sample import Sample
from keye.processor.tokenizer import train_tokenizer
from rl.policy.scoring import Group, score
from stages.data.collate import from_bytes, pack, to_bytes
from stages.data.items import Item
from stages.distributed.parallel import ParallelDims, shard_vision
from stages.recipe import load
from tests.keye.drawn_chat import chat, clip

MOTION = {"size": 32, "width": 8, "blocks": [1, 1]}
SIZES = {"min_tokens_per_frame": 4, "max_tokens_per_frame": 16, "max_tokens": 400, "fps": 2.0}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["user assistant Which colour? red or blue 0.5"] * 3, 400)


def new_model(tokenizer, motion: dict | None) -> KeyeForConditionalGeneration:
    torch.manual_seed(0)
    config = KeyeConfig.preset("tiny", {"motion": motion}, vocab_size=len(tokenizer), initializer_range=0.3)
    config.vision_config.num_hidden_layers, config.text_config.num_hidden_layers = 1, 2
    config.text_config.layer_types = config.text_config.layer_types[:2]
    return KeyeForConditionalGeneration(KeyeProcessor(tokenizer).configure(config)).eval()


@pytest.fixture(scope="module")
def model(tokenizer) -> KeyeForConditionalGeneration:
    made = new_model(tokenizer, MOTION)
    torch.manual_seed(1)
    nn.init.normal_(made.visual.motion.output.weight, std=0.3)
    return made


def processor_of(tokenizer, aggregation: str | None = "none", policy: str = "adaptive") -> KeyeProcessor:
    return KeyeProcessor(tokenizer, encoder={**SIZES, "policy": policy, "aggregation": aggregation})


def features_of(model: KeyeForConditionalGeneration, sample: Sample) -> torch.Tensor:
    """Visual tokens of a sample of one video: the pathway's own call on its frames, then tower and projector."""
    [plan] = sample.plans
    times = [round(1000 * t) for t in plan.timestamps.tolist()]
    clips = torch.tensor([[0, *row] for row in zip(plan.frame_types.tolist(), times, strict=True)])
    return model.encode_vision(sample.pixel_values_videos, sample.video_grid_thw, clips=clips)


@torch.no_grad()
def test_forward_reads_motion_of_the_plans_own_times(model, tokenizer):
    sample = processor_of(tokenizer).sample(chat())
    pixels = {name: getattr(sample, name) for name in ("pixel_values_videos", "video_grid_thw", "video_blocks")}
    ids, positions = sample.input_ids[None], sample.position_ids[:, None]
    found = model(ids, **pixels).logits
    known = model(ids, position_ids=positions, visual_features=features_of(model, sample)).logits
    torch.testing.assert_close(found, known, atol=1e-4, rtol=1e-4)
    still = model.model.projector(
        model.visual(sample.pixel_values_videos, sample.video_grid_thw), sample.video_grid_thw
    )
    assert not torch.allclose(found, model(ids, position_ids=positions, visual_features=still).logits, atol=1e-3)


def test_aggregation_none_changes_only_what_the_model_is_told(tokenizer):
    plain, told = (processor_of(tokenizer, spec).sample(chat(image=True)) for spec in (None, "none"))
    for name in ("input_ids", "position_ids", "pixel_values", "pixel_values_videos", "video_grid_thw"):
        assert torch.equal(getattr(plain, name), getattr(told, name)), name
    [plan] = told.plans
    assert plain.video_blocks is None and told.video_blocks[:, 5].tolist() == plan.frame_types.tolist()
    assert told.video_blocks[:, 6].tolist() == [500 * place for place in range(9)]
    [(_, item)] = from_bytes(to_bytes([(1, Item(told, "a", 0, "video", ""))]))
    assert torch.equal(item.sample.video_blocks, told.video_blocks)


@torch.no_grad()
@pytest.mark.parametrize("spec", ["none", "mean"])
def test_generate_equals_forward_also_from_a_cache(model, tokenizer, spec):
    processor = processor_of(tokenizer, spec)
    inputs = processor.apply_chat_template(chat(image=True)[:1], tokenize=True, add_generation_prompt=True)
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    found = model.generate(**inputs, **options)
    sample = processor.collate([processor.sample(chat(image=True)[:1], add_generation_prompt=True)])
    given = {name: sample[name] for name in sample if name.startswith(("pixel", "image", "video"))}
    ids, positions = sample["input_ids"], sample["position_ids"]
    for _ in range(3):
        logits = model(ids, position_ids=positions, **given).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        positions = torch.cat([positions, (positions.max() + 1).expand(3, 1, 1)], 2)
    assert torch.equal(found[:, -3:], ids[:, -3:])
    length = inputs["input_ids"].shape[1]
    for cut in (length // 3, length // 2):  # the cache ends inside the video
        cache = copy.deepcopy(model(**inputs, use_cache=True).past_key_values)
        cache.crop(cut - length)
        assert torch.equal(found, model.generate(**inputs, **options, past_key_values=cache))


@torch.no_grad()
def test_clips_of_a_batch_stay_apart_in_generate(model, tokenizer):
    """Clips of one length would be joined to one clip whose time goes back, or move each other."""
    processor = processor_of(tokenizer)
    chats = [chat(seed, frames, image)[:1] for seed, frames, image in ((0, 9, False), (1, 5, True), (2, 9, False))]
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    given = {"tokenize": True, "add_generation_prompt": True, "return_tensors": "pt"}
    together = model.generate(**processor.apply_chat_template(chats, padding=True, **given), **options)
    for row, one in enumerate(chats):
        alone = model.generate(**processor.apply_chat_template([one], **given), **options)
        assert together[row, -3:].tolist() == alone[0, -3:].tolist()


def test_a_document_has_the_same_loss_and_gradients_in_a_pack(model, tokenizer):
    samples = [
        processor_of(tokenizer, spec).sample(chat(seed, frames, image))
        for spec, seed, frames, image in (("none", 0, 9, False), ("mean", 1, 5, True), ("none", 2, 6, True))
    ]
    network = copy.deepcopy(model)
    network.set_attn_implementation("keye")

    def gradients(batches):
        network.zero_grad()
        total = sum(network(**batch, num_items_in_batch=1.0).loss for batch in batches)
        total.backward()
        return total.detach(), {name: p.grad.clone() for name, p in network.named_parameters()}

    one, ours = gradients([pack(samples)])
    sum_of, theirs = gradients([pack([sample]) for sample in samples])
    torch.testing.assert_close(one, sum_of, atol=1e-4, rtol=1e-5)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], atol=2e-4, rtol=2e-3, msg=name)
    assert ours["model.visual.motion.stem.weight"].abs().max() > 1e-4


def test_text_and_stills_train_every_parameter_of_the_pathway(model, tokenizer):
    network = copy.deepcopy(model).train()
    for messages in ([{"role": "user", "content": "red"}, chat()[1]], chat(image=True)[1:]):
        network.zero_grad()
        batch = pack([processor_of(tokenizer).sample([{"role": "user", "content": "blue"}, messages[-1]])])
        network(**batch, num_items_in_batch=1.0).loss.backward()
        assert all(p.grad is not None for p in network.visual.motion.parameters())


@torch.no_grad()
def test_the_update_of_rl_scores_the_tokens_of_the_rollout(model, tokenizer):
    processor, network = processor_of(tokenizer), copy.deepcopy(model)
    samples = [processor.sample(chat(seed)[:1], add_generation_prompt=True) for seed in (0, 1)]
    answers = [torch.tensor([7, 8, 9]), torch.tensor([10, 11])]
    groups = [Group(s, [a], [torch.zeros(len(a))], [True], [""]) for s, a in zip(samples, answers, strict=True)]
    network.set_attn_implementation("keye")
    found = score(network, groups).log_probs
    expected = []
    for sample, answer in zip(samples, answers, strict=True):
        pixels = {name: getattr(sample, name) for name in ("pixel_values_videos", "video_grid_thw", "video_blocks")}
        logits = model(torch.cat([sample.input_ids, answer])[None], **pixels).logits[0]
        logits[:, [model.config.image_token_id, model.config.video_token_id]] = -torch.inf
        rows = logits[-len(answer) - 1 : -1].log_softmax(-1)
        expected.append(rows.gather(1, answer[:, None])[:, 0])
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-4, rtol=1e-4)


def test_a_saved_model_and_its_encoder(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path)
    processor = processor_of(tokenizer)
    processor.save_pretrained(tmp_path)
    again = KeyeForConditionalGeneration.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    sample = processor.sample(chat())
    video = SlowFastEncoder.from_pretrained(tmp_path)(clip())
    with torch.no_grad():
        torch.testing.assert_close(video.features, features_of(model, sample), atol=1e-4, rtol=1e-4)


def test_a_model_without_the_pathway_is_as_before_and_its_weights_begin_one_with_it(tokenizer, tmp_path):
    plain = new_model(tokenizer, None)
    assert not any("motion" in name for name in plain.state_dict())
    plain.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config"].pop("motion", None)  # a directory written before the setting existed
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert KeyeConfig.from_pretrained(tmp_path).vision_config.motion is None
    config = KeyeConfig.from_pretrained(tmp_path)
    config.vision_config.motion = MOTION
    begun = KeyeForConditionalGeneration.from_pretrained(tmp_path, config=config).eval()
    assert begun.visual.motion.stem.weight.std() > 0.01  # drawn, not left as it was allocated
    sample = processor_of(tokenizer).sample(chat())
    pixels = {name: getattr(sample, name) for name in ("pixel_values_videos", "video_grid_thw", "video_blocks")}
    with torch.no_grad():
        assert torch.equal(
            begun(sample.input_ids[None], **pixels).logits, plain(sample.input_ids[None], **pixels).logits
        )


def test_what_cannot_be_done_is_refused(model, tokenizer, tmp_path):
    told, untold = processor_of(tokenizer).sample(chat()), processor_of(tokenizer, None).sample(chat())
    with pytest.raises(KeyeError, match=r"processor.encoder.aggregation"):
        model(
            untold.input_ids[None], pixel_values_videos=untold.pixel_values_videos, video_grid_thw=untold.video_grid_thw
        )
    with pytest.raises(KeyeError, match="video_blocks|type and time"):
        model.get_video_features(untold.pixel_values_videos, untold.video_grid_thw)
    with pytest.raises(RecipeError, match="sequence parallelism"):
        shard_vision(pack([told], 2), ParallelDims(0, 2, 2, object()), 0, 1)
    twice = processor_of(tokenizer, "none", "two_stream:slow=3,fast_tokens=4").sample(chat())
    with pytest.raises(KeyeError, match="one time twice"):
        model(**pack([twice]))
    with pytest.raises(KeyeError, match="no oversample"):
        SlowFastEncoder(aggregation="none:oversample=2")
    with pytest.raises(RecipeError, match=r"processor.encoder.aggregation"):
        load(
            Path(__file__).parents[3] / "stages" / "recipes" / "tiny.toml",
            ["model.vision.motion={size=32, blocks=[1, 1]}"],
        )
