"""Cases of `to_qwen` on the real processors and on tiny models with random weights; `test_qwen.py` runs this file.

They need torchvision, which the environment has not and must not have (a build for another torch breaks the import of
transformers), so they run in a process of their own that has it on its path.
"""

from pathlib import Path

import pytest
import torch

from tests.keye.adapters.torchvision_wheel import import_torchvision

LIBRARY = import_torchvision()

from transformers import (  # noqa: E402
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from keye import SlowFastEncoder  # noqa: E402
from keye.adapters.qwen import clip_frames, to_qwen, visual_tokens  # noqa: E402
from keye.errors import KeyeError, ManifestError, VideoError  # noqa: E402
from keye.processor.tokenizer import train_tokenizer  # noqa: E402
from scripts.clips import clip  # noqa: E402
from tests.docs.examples import lay_out  # noqa: E402
from tests.docs.examples import run as run_examples  # noqa: E402

GUIDE = Path(__file__).resolve().parents[3] / "docs" / "encoder.md"
TOKENIZER = train_tokenizer(["What is seen in these videos? A bike. <12.5 seconds>"], 300)
SIDES = {"qwen2_5": 28, "qwen3": 32}
FAMILIES = tuple(SIDES)


def make_processor(family: str):
    parts = {"tokenizer": TOKENIZER, "chat_template": TOKENIZER.chat_template}
    if family == "qwen2_5":
        return Qwen2_5_VLProcessor(
            image_processor=Qwen2VLImageProcessor(), video_processor=Qwen2VLVideoProcessor(), **parts
        )
    mean = {"patch_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**mean), video_processor=Qwen3VLVideoProcessor(), **parts
    )


def make_model(family: str):
    names = {"image_token": "image_pad", "video_token": "video_pad", "vision_start_token": "vision_start"}
    ids = {f"{key}_id": TOKENIZER.convert_tokens_to_ids(f"<|{name}|>") for key, name in names.items()}
    ids["vision_end_token_id"] = TOKENIZER.convert_tokens_to_ids("<|vision_end|>")
    text = {
        "vocab_size": len(TOKENIZER),
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 8192,
        "eos_token_id": TOKENIZER.eos_token_id,
        "pad_token_id": TOKENIZER.pad_token_id,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 4, 4]},
    }
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 48}
    torch.manual_seed(0)
    if family == "qwen2_5":
        vision |= {"patch_size": 14, "fullatt_block_indexes": [1], "window_size": 56, "tokens_per_second": 2}
        config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
        return Qwen2_5_VLForConditionalGeneration(config).eval()
    vision |= {"patch_size": 16, "deepstack_visual_indexes": [0], "num_position_embeddings": 256}
    config = Qwen3VLConfig(text_config={**text, "head_dim": 24}, vision_config=vision, **ids)
    return Qwen3VLForConditionalGeneration(config).eval()


PROCESSORS = {family: make_processor(family) for family in FAMILIES}


def question(*sources, image=None) -> list[dict]:
    content = [{"type": "video", "video": source} for source in sources]
    content += [] if image is None else [{"type": "image", "image": image}]
    return [{"role": "user", "content": [*content, {"type": "text", "text": "What is seen?"}]}]


def encoder(family: str, **settings) -> SlowFastEncoder:
    own = {"measure": "patch_l1", "max_tokens": 900, "min_tokens_per_frame": 2, "token_side": SIDES[family]}
    return SlowFastEncoder(**{**own, **settings})


def noise(count: int, height: int = 96, width: int = 128) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


def scenes() -> torch.Tensor:
    """Seven frames in three scenes, with a little noise: slow, fast, fast, slow, slow, fast, fast."""
    shots = noise(3, 6, 8).float().repeat_interleave(torch.tensor([3, 1, 3]), 0)
    large = torch.nn.functional.interpolate(shots, (96, 128))
    return (large + noise(7) / 64).clamp(0, 255).to(torch.uint8)


def frames_in(pixels: torch.Tensor, grid: torch.Tensor, processor) -> list[torch.Tensor]:
    """The model's pixels as uint8 frames: every index of the layout explicit, then without normalisation."""
    side, merge = processor.image_processor.patch_size, processor.image_processor.merge_size
    mean, std = (torch.tensor(getattr(processor.video_processor, f"image_{name}")) for name in ("mean", "std"))
    frames, row = [], 0
    for steps, height, width in grid.tolist():
        for _ in range(steps):
            pair = torch.zeros(2, 3, height * side, width * side)
            for y in range(0, height, merge):
                for x in range(0, width, merge):
                    for dy in range(merge):
                        for dx in range(merge):
                            patch = pixels[row].reshape(3, 2, side, side).transpose(0, 1)
                            top, left = (y + dy) * side, (x + dx) * side
                            pair[:, :, top : top + side, left : left + side] = patch
                            row += 1
            pair = (pair * std[:, None, None] + mean[:, None, None]) * 255
            frames += list(pair.round().clamp(0, 255).to(torch.uint8))
    assert row == len(pixels)
    return frames


@pytest.mark.parametrize("mode", ("video", "images"))
@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_reads_it_and_answers(family, mode):
    processor, model = PROCESSORS[family], make_model(family)
    chosen = encoder(family)
    source = clip("carphone_pristine.mp4")
    inputs = to_qwen(processor, question(source, image=noise(1)[0]), chosen, mode=mode)
    plan = chosen.plan(source)
    name = "video" if mode == "video" else "image"
    pads = int((inputs["input_ids"] == TOKENIZER.convert_tokens_to_ids(f"<|{name}_pad|>")).sum())
    still = int(inputs["image_grid_thw"][-1].prod()) // 4
    assert pads == visual_tokens(plan, mode) + (still if mode == "images" else 0)
    with torch.inference_mode():
        logits = model(**inputs).logits
        answer = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert logits.shape == (1, inputs["input_ids"].shape[1], len(TOKENIZER)) and logits.isfinite().all()
    assert answer.shape[1] > inputs["input_ids"].shape[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_pixels_are_the_encoders_frames(family):
    processor, chosen = PROCESSORS[family], encoder(family)
    frames = clip_frames(scenes(), chosen)
    assert frames.plan.frame_types.tolist() == [0, 1, 1, 0, 0, 1, 1]
    assert [len(run.frames) for run in frames.runs] == [1, 2, 2, 2]
    inputs = to_qwen(processor, question(scenes()), chosen, mode="images")
    shown = frames_in(inputs["pixel_values"], inputs["image_grid_thw"], processor)
    assert len(shown) == 2 * len(frames.frames)
    for i, frame in enumerate(frames.frames):  # an image fills both places of a pair
        assert torch.equal(shown[2 * i], frame) and torch.equal(shown[2 * i + 1], frame)

    inputs = to_qwen(processor, question(scenes()), chosen)
    shown = frames_in(inputs["pixel_values_videos"], inputs["video_grid_thw"], processor)
    expected = []
    for run in frames.runs:
        expected += [*run.frames, run.frames[-1]] if len(run.frames) % 2 else [*run.frames]
    assert len(shown) == len(expected) and all(map(torch.equal, shown, expected))


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_fast_pathway_it_is_what_the_processor_makes_itself(family):
    processor = PROCESSORS[family]
    chosen = encoder(family, policy="all_slow", max_tokens=10_000)
    source = noise(6)
    frames = clip_frames(source, chosen)
    inputs = to_qwen(processor, question(source), chosen)
    text = TOKENIZER.apply_chat_template(question("x"), tokenize=False, add_generation_prompt=True)
    own = processor(
        text=[text],
        videos=[torch.stack(frames.frames)],
        do_resize=False,
        do_sample_frames=False,
        video_metadata=[{"total_num_frames": 6, "fps": 2.0, "frames_indices": list(range(6))}],
        return_tensors="pt",
    )
    assert set(inputs) == set(own)
    for name, value in own.items():
        assert torch.equal(inputs[name], value), name


@pytest.mark.parametrize(("rate", "expected"), [(2.0, 1.0), (2.03, 1.0), (1.0, 2.0), (4.0, 0.5)])
def test_qwen2_5_gets_the_rate(rate, expected):
    times = [i / rate for i in range(8)]
    chosen = encoder("qwen2_5", policy="all_slow")
    video = chosen(noise(8), timestamps=times)
    inputs = to_qwen(PROCESSORS["qwen2_5"], question(video), chosen)
    assert inputs["second_per_grid_ts"].tolist() == [expected]


def test_qwen3_gets_the_exact_times():
    chosen = encoder("qwen3", policy="all_slow")
    video = chosen(noise(5), timestamps=[0.0, 0.5, 3.3, 3.4, 61.0])
    ids = to_qwen(PROCESSORS["qwen3"], question(video), chosen)["input_ids"][0]
    text = TOKENIZER.decode(ids).replace("<|video_pad|>", "")
    assert [part.split(" ")[0] for part in text.split("<") if "seconds" in part] == ["0.2", "3.3", "61.0"]


def test_times_stand_before_runs_and_images_of_qwen2_5():
    red, blue = (torch.zeros(1, 3, 96, 128, dtype=torch.uint8).index_fill(1, torch.tensor(c), 250) for c in (0, 2))
    video = torch.cat([red, red, red, blue, blue])
    chosen = encoder("qwen2_5", max_tokens=100_000)
    assert chosen.plan(video).frame_types.tolist() == [0, 1, 1, 0, 1]
    for mode, times in (("video", ["0.0", "0.5", "1.5", "2.0"]), ("images", ["0.0", "0.5", "1.0", "1.5", "2.0"])):
        text = TOKENIZER.decode(to_qwen(PROCESSORS["qwen2_5"], question(video), chosen, mode=mode)["input_ids"][0])
        assert [part.split(" ")[0] for part in text.split("<") if " seconds>" in part] == times


@pytest.mark.parametrize("mode", ("video", "images"))
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_is_its_conversations(family, mode):
    processor, chosen, still = PROCESSORS[family], encoder(family), noise(1, 75, 150)[0]
    talks = [question(noise(4), scenes(), image=still), question(noise(3))]
    batch = to_qwen(processor, talks, chosen, mode=mode)
    singles = [to_qwen(processor, talk, chosen, mode=mode) for talk in talks]
    for row, single in enumerate(singles):
        kept = batch["attention_mask"][row].bool()
        assert torch.equal(batch["input_ids"][row][kept], single["input_ids"][0])
        assert kept[-1]  # padded on the left
    for name in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw", "second_per_grid_ts"):
        parts = [single[name] for single in singles if name in single]
        assert (name in batch) == bool(parts)
        if parts:
            assert torch.equal(batch[name], torch.cat(parts))
    own = processor.image_processor(images=[still], return_tensors="pt")
    count = len(own["pixel_values"])
    at = int(singles[0]["image_grid_thw"][:-1].prod(1).sum())
    assert torch.equal(singles[0]["image_grid_thw"][-1:], own["image_grid_thw"])
    assert (singles[0]["pixel_values"][at : at + count] - own["pixel_values"]).abs().max() < 0.02


def test_an_encoded_video_and_the_default_encoder_serve_too():
    processor = PROCESSORS["qwen3"]
    chosen = SlowFastEncoder(token_side=32)
    given = to_qwen(processor, question(chosen(noise(4))))
    made = to_qwen(processor, question(noise(4)))
    assert all(torch.equal(given[name], made[name]) for name in made)


def test_text_without_media_passes():
    inputs = to_qwen(PROCESSORS["qwen2_5"], [{"role": "user", "content": "Hello"}], add_generation_prompt=False)
    assert "pixel_values" not in inputs and "user\nHello" in TOKENIZER.decode(inputs["input_ids"][0])


def test_a_mismatch_is_an_error():
    processor = PROCESSORS["qwen3"]
    with pytest.raises(KeyeError, match=r"multiples of 28 .* multiples of 32; build it with token_side=32"):
        to_qwen(processor, question(noise(2, 84, 112)), SlowFastEncoder())
    with pytest.raises(KeyeError, match="mode is 'frames'"):
        to_qwen(processor, question(noise(2)), mode="frames")
    with pytest.raises(ManifestError, match="has fps"):
        to_qwen(processor, [{"role": "user", "content": [{"type": "video", "video": "a.mp4", "fps": 1}]}])
    with pytest.raises(ManifestError, match="names no file"):
        to_qwen(processor, [{"role": "user", "content": [{"type": "video"}]}])
    with pytest.raises(VideoError, match="does not exist"):
        to_qwen(processor, question("no.mp4"))
    with pytest.raises(ManifestError, match=r"wrote 2 placeholders <\|vision_start\|><\|video_pad\|>"):
        spoken = {"type": "text", "text": "<|vision_start|><|video_pad|><|vision_end|>"}
        to_qwen(processor, [{"role": "user", "content": [{"type": "video", "video": noise(2)}, spoken]}])
    with pytest.raises(KeyeError, match="Tokenizer.* has no patch_size"):
        to_qwen(TOKENIZER, question(noise(2)))


def test_the_example_of_the_guide_runs(tmp_path, monkeypatch, capsys):
    lay_out(tmp_path)
    monkeypatch.chdir(tmp_path)
    path = Path("Qwen/Qwen3-VL-8B-Instruct")  # a folder of that name goes before the hub
    make_model("qwen3").save_pretrained(path)
    PROCESSORS["qwen3"].save_pretrained(path)
    failed = run_examples(GUIDE, ["In Qwen-VL models"])
    printed = capsys.readouterr().out
    assert not failed and "tokens in mode video" in printed, printed
