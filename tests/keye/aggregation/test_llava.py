"""The adapter against the video and image paths of transformers' own LLaVA models, with random tiny weights."""

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

from keye.aggregation import Pooling, SlowFastAggregation
from keye.aggregation.llava import AggregatedLlava
from keye.errors import KeyeError

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**SIZES, "vocab_size": 64, "num_key_value_heads": 2, "initializer_range": 0.3}
TOWER = {**SIZES, "image_size": 24, "patch_size": 4}  # a grid of 6 x 6
PAD = 60
KINDS = {
    "next": (LlavaNextForConditionalGeneration, LlavaNextConfig, CLIPVisionConfig, LlamaConfig),
    "next_video": (LlavaNextVideoForConditionalGeneration, LlavaNextVideoConfig, CLIPVisionConfig, LlamaConfig),
    "onevision": (LlavaOnevisionForConditionalGeneration, LlavaOnevisionConfig, SiglipVisionConfig, Qwen2Config),
}


def llava(kind: str, **more):
    torch.manual_seed(0)
    model_class, config_class, tower, text = KINDS[kind]
    strategy = "full" if kind == "onevision" else "default"
    tokens = {"image_token_index": PAD} if kind == "next" else {"image_token_index": 61, "video_token_index": PAD}
    grids = {"image_grid_pinpoints": [[24, 48], [48, 24], [48, 48]]}
    config = config_class(
        vision_config=tower(**TOWER).to_dict(), text_config=text(**TEXT).to_dict(), vision_feature_layer=-1,
        vision_feature_select_strategy=strategy, **tokens, **grids, **more,
    )  # fmt: skip
    return model_class(config).eval()


def video(frames: int = 7, seed: int = 1) -> torch.Tensor:
    return torch.randn(frames, 3, 24, 24, generator=torch.Generator().manual_seed(seed))


PROMPT = torch.tensor([5, 6, PAD, 7, 8])
EVERY_FRAME_BY_TWO = SlowFastAggregation(slow=0, slow_pool=None, fast_pool=Pooling(factor=(2, 2)))


@torch.no_grad()
def test_next_video_gives_the_logits_of_its_own_video_path():
    """It takes means of 2 x 2 before its projector, which commutes with them if it is affine."""
    model = llava("next_video", projector_hidden_act="linear", spatial_pool_stride=2, spatial_pool_mode="average")
    found = AggregatedLlava(model, EVERY_FRAME_BY_TWO)([PROMPT], [video()]).logits
    ids = torch.cat([PROMPT[:2], torch.full((7 * 9,), PAD), PROMPT[3:]])[None]
    expected = model(ids, pixel_values_videos=video()[None]).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_onevision_gives_the_features_of_its_own_video_path():
    """Its bilinear halving of an even grid is the mean of 2 x 2; it adds one token for a line break."""
    model = llava("onevision")
    reader = AggregatedLlava(model, EVERY_FRAME_BY_TWO)
    expected = model.get_video_features(video()[None]).pooler_output[0, :-1]
    torch.testing.assert_close(reader.aggregation(reader.encode(video())), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_next_encodes_a_frame_as_the_overview_of_an_image():
    model = llava("next")
    found = AggregatedLlava(model).encode(video(1))
    patches = torch.cat([video(1), video(2, seed=3)])[None]  # the overview, then the two halves of a wide image
    features = model.get_image_features(patches, torch.tensor([[24, 48]])).pooler_output[0]
    torch.testing.assert_close(found.flatten(0, 2), features[:36], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_generate_reads_the_tokens_of_forward_and_encodes_each_frame_once(kind):
    model = llava(kind)
    reader = AggregatedLlava(model, SlowFastAggregation.released(slow=3))
    seen = []
    hook = reader.tower.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    rows, videos = [PROMPT, torch.tensor([9, PAD, 4])], [video(20), video(3, seed=2)]
    found = reader.generate(rows, videos, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    hook.remove()
    assert sum(seen) == 23
    for row, clip, answer in zip(rows, videos, found, strict=True):
        ids = row
        for token in answer.tolist():
            logits = reader([ids], [clip]).logits
            assert logits.shape[1] == len(ids) - 1 + reader.aggregation.tokens(len(clip), 6, 6)
            assert int(logits[0, -1].argmax()) == token
            ids = torch.cat([ids, torch.tensor([token])])


def test_training_reaches_tower_and_projector_and_the_loss_is_that_of_the_labels():
    model = llava("onevision")
    reader = AggregatedLlava(model, SlowFastAggregation.trained(slow=2))
    labels = torch.tensor([-100, -100, -100, 7, 8])
    out = reader([PROMPT], [video(4)], labels=[labels])
    rows = out.logits[0, -3:-1].log_softmax(-1)
    expected = F.nll_loss(rows, labels[3:])
    torch.testing.assert_close(out.loss, expected, atol=1e-5, rtol=1e-5)
    out.loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in reader.projector.parameters())


def test_frames_are_squeezed_and_normalised():
    class Processor:
        image_mean, image_std = [0.5, 0.4, 0.3], [0.2, 0.2, 0.1]

    frames = torch.tensor([10, 20, 30], dtype=torch.uint8)[None, :, None, None].expand(2, 3, 10, 50)
    found = AggregatedLlava(llava("next")).pixels(frames, Processor())
    assert found.shape == (2, 3, 24, 24)
    expected = (torch.tensor([10, 20, 30]) / 255 - torch.tensor([0.5, 0.4, 0.3])) / torch.tensor([0.2, 0.2, 0.1])
    torch.testing.assert_close(found, expected[None, :, None, None].expand_as(found))


def test_mistakes_are_named():
    reader = AggregatedLlava(llava("next"))
    with pytest.raises(KeyeError, match="1 placeholders .* for 2 videos"):
        reader([PROMPT], [video(), video()])
    with pytest.raises(KeyeError, match="list of rows"):
        reader(PROMPT, [video()])
    for labels in ([PROMPT[:-1]], []):
        with pytest.raises(KeyeError, match="a label for each id"):
            reader([PROMPT], [video()], labels=labels)
    for frames in (torch.rand(2, 3, 8, 8), torch.zeros(2, 8, 8, 3, dtype=torch.uint8), [1]):
        with pytest.raises(KeyeError, match=r"torch.uint8 \[T, 3, H, W\]"):
            reader.pixels(frames, None)
    with pytest.raises(KeyeError, match="one frame or more"):
        reader.pixels(torch.zeros(0, 3, 8, 8, dtype=torch.uint8), None)
    with pytest.raises(KeyeError, match="give a LLaVA model"):
        AggregatedLlava(torch.nn.Linear(2, 2))
    reader.model.config.vision_feature_select_strategy = "full"
    with pytest.raises(KeyeError, match="37 tokens for a grid of 6x6"):
        reader.encode(video(1))
