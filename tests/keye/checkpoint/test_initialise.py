"""Models made of pretrained parts: a decoder, a SigLIP and a tokenizer in the format of the real ones."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from keye import KeyeConfig, KeyeForConditionalGeneration, KeyeProcessor
from keye.checkpoint.convert import initialise
from keye.checkpoint.initialise import EMBEDDINGS, HEAD
from keye.checkpoint.shards import open_checkpoint
from keye.errors import CheckpointError
from keye.model.config import KeyeVisionConfig
from tests.keye.model import parts


@pytest.mark.parametrize("family", parts.DECODERS)
@pytest.mark.parametrize("tied", [False, True])
def test_made_of_a_decoder_it_generates_what_the_decoder_generates(family: str, tied: bool, tmp_path: Path) -> None:
    decoder = parts.decoder(tmp_path / "text", family, tie_word_embeddings=tied)
    report = initialise(tmp_path / "text", KeyeVisionConfig(**parts.TOWER), out=tmp_path / "keye", max_shard=60_000)
    assert report.clean and len(list((tmp_path / "keye").glob("model-*.safetensors"))) > 2
    model = KeyeForConditionalGeneration.from_pretrained(tmp_path / "keye").eval()
    processor = KeyeProcessor.from_pretrained(tmp_path / "keye")
    assert model.config.image_token_id == processor.token_id("<|image_pad|>")
    assert processor.tokenizer.eos_token_id in model.generation_config.eos_token_id

    ids = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs, ours = decoder(ids).logits, model(input_ids=ids).logits
    before = len(parts.plain_tokenizer())
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours[..., :before], theirs[..., :before], rtol=1e-5, atol=1e-5)
    old, new = decoder.get_input_embeddings().weight, model.get_input_embeddings().weight
    assert torch.equal(old[:before], new[:before])


def test_new_rows_stand_around_the_mean_and_use_the_padding_first(tmp_path: Path) -> None:
    tokens = parts.plain_tokenizer()
    decoder = parts.decoder(tmp_path / "text", dtype=torch.bfloat16, vocab_size=len(tokens) + 2)
    report = initialise(tmp_path / "text", KeyeVisionConfig(**parts.TOWER), out=tmp_path / "keye")
    assert report.made["9 rows of new tokens around the mean"] == [EMBEDDINGS, HEAD]
    stored = open_checkpoint(tmp_path / "keye")
    state = decoder.state_dict()
    for ours, theirs in ((EMBEDDINGS, "model.embed_tokens.weight"), (HEAD, "lm_head.weight")):
        rows, old = stored[ours].read(), state[theirs]
        known, count = len(tokens), len(tokens) + 9
        assert rows.dtype == torch.bfloat16 and len(rows) % 64 == 0 and len(rows) >= count
        assert torch.equal(rows[:known], old[:known])
        mean, deviation = old[:known].float().mean(0), old[:known].float().std(0)
        distance = (rows[known:count].float() - mean) / deviation
        assert 0.07 < distance.square().mean().sqrt() < 0.13  # a tenth of the spread
        assert len({tuple(row.tolist()) for row in rows[known:count]}) == 9
        assert torch.equal(rows[count:], mean.to(torch.bfloat16).expand(len(rows) - count, -1))


def test_padding_rows_are_enough_when_there_are_many(tmp_path: Path) -> None:
    decoder = parts.decoder(tmp_path / "text", vocab_size=448)
    initialise(tmp_path / "text", KeyeVisionConfig(**parts.TOWER), out=tmp_path / "keye")
    rows, known = open_checkpoint(tmp_path / "keye")[EMBEDDINGS].read(), len(parts.plain_tokenizer())
    assert rows.shape == (448, 64)
    old = decoder.get_input_embeddings().weight
    assert torch.equal(rows[known + 9 :], old[known + 9 :])
    assert not torch.equal(rows[known : known + 9], old[known : known + 9])


@pytest.mark.parametrize("whole", [False, True])
def test_a_siglip_is_taken_over_without_its_head(whole: bool, tmp_path: Path) -> None:
    parts.decoder(tmp_path / "text")
    siglip = parts.siglip(tmp_path / "vision", complete=whole)
    report = initialise(tmp_path / "text", tmp_path / "vision", out=tmp_path / "keye")
    left = report.left_out["SigLIP's pooling head and text tower"]
    assert all("head." in name or name.startswith(("text_model.", "logit_")) for name in left) and len(left) >= 11
    config = KeyeConfig.from_pretrained(tmp_path / "keye")
    config.vision_config.rotary = False
    model = KeyeForConditionalGeneration.from_pretrained(tmp_path / "keye", config=config).eval()
    assert config.vision_config.position_grid == 4
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    tower = siglip.vision_model if whole else siglip
    patches = pixels.unfold(2, 14, 14).unfold(3, 14, 14)[0].permute(1, 2, 0, 3, 4).flatten(0, 1)
    with torch.no_grad():
        theirs = tower(pixel_values=pixels).last_hidden_state[0]
        ours = model.visual(patches, torch.tensor([[1, 4, 4]]))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_siglip_of_larger_patches_takes_larger_tokens(tmp_path: Path) -> None:
    parts.decoder(tmp_path / "text")
    parts.siglip(tmp_path / "vision", patch_size=16, image_size=64)
    initialise(tmp_path / "text", tmp_path / "vision", out=tmp_path / "keye")
    processor = KeyeProcessor.from_pretrained(tmp_path / "keye")
    model = KeyeForConditionalGeneration.from_pretrained(tmp_path / "keye")
    sample = processor.sample(
        [{"role": "user", "content": [{"type": "video", "video": torch.zeros(2, 3, 64, 96, dtype=torch.uint8)}]}]
    )
    inputs = processor.collate([sample])
    assert inputs["pixel_values_videos"].shape[1:] == (3, 16, 16)
    assert model(**inputs).logits.isfinite().all()


def test_random_weights_are_initialised_like_a_siglip(tmp_path: Path) -> None:
    parts.decoder(tmp_path / "text")
    sizes = {**parts.TOWER, "hidden_size": 96, "intermediate_size": 192}
    initialise(tmp_path / "text", KeyeVisionConfig(**sizes, position_grid=4), out=tmp_path / "keye")
    siglip = parts.siglip(tmp_path / "vision", **sizes).state_dict()
    drawn = {name: stored.read() for name, stored in open_checkpoint(tmp_path / "keye").items()}
    compared = 0
    for name, tensor in siglip.items():
        if not name.startswith("head."):
            mine = drawn["model.visual." + name]
            # The position table is larger, so that a place is not small beside a colour; its mean of 1,536 values then
            # has a standard error of 0.013.
            std, error = (0.5, 0.05) if "position_embedding" in name else (float(tensor.std()), 0.02)
            assert abs(float(mine.mean() - tensor.mean())) < error, name
            assert float(mine.std()) == pytest.approx(std, rel=0.15, abs=1e-5), name
            compared += 1
    assert compared == 2 + 1 + 2 * 16 + 2
    projector = drawn["model.projector.linear_1.weight"]  # Xavier, uniform
    assert float(projector.abs().max()) == pytest.approx((6 / (384 + 384)) ** 0.5, rel=0.01)
    assert float(projector.std()) == pytest.approx((2 / (384 + 384)) ** 0.5, rel=0.05)
    assert torch.equal(drawn["model.projector.pre_norm.weight"], torch.ones(384))


def test_made_of_a_gguf_file_it_generates_what_transformers_generates(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    decoder = parts.decoder(tmp_path / "text", "llama", tie_word_embeddings=True)
    parts.gguf_of(decoder, tmp_path / "text" / "tiny.gguf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "text", gguf_file="tiny.gguf").eval()
    parts.plain_tokenizer().save_pretrained(tmp_path / "tokenizer")
    tower, out = KeyeVisionConfig(**parts.TOWER), tmp_path / "keye"
    initialise(tmp_path / "text", tower, out=out, gguf_file="tiny.gguf", tokenizer=tmp_path / "tokenizer")
    ours = KeyeForConditionalGeneration.from_pretrained(out).eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected, logits = theirs(input_ids=ids).logits, ours(input_ids=ids).logits
    known = len(parts.plain_tokenizer())
    torch.testing.assert_close(logits[..., :known], expected[..., :known], rtol=1e-5, atol=1e-5)
    with torch.no_grad():  # the file holds the decoder's own weights
        torch.testing.assert_close(expected, decoder(ids).logits, rtol=1e-4, atol=1e-4)


def test_weights_that_cannot_be_cast_are_refused(tmp_path: Path) -> None:
    parts.decoder(tmp_path / "text")
    name = "model.layers.0.mlp.up_proj.weight"
    path = open_checkpoint(tmp_path / "text")[name].path
    tensors = load_file(path)
    save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, path, metadata={"format": "pt"})
    for dtype in (None, torch.bfloat16):
        with pytest.raises(CheckpointError, match=r"\.safetensors: .*F8_E4M3.*; save the model in bfloat16"):
            initialise(tmp_path / "text", KeyeVisionConfig(**parts.TOWER), out=tmp_path / "keye", dtype=dtype)
    assert not (tmp_path / "keye").exists()


def test_parts_that_do_not_fit_are_named_and_leave_nothing(tmp_path: Path) -> None:
    parts.decoder(tmp_path / "text")
    parts.siglip(tmp_path / "vision", hidden_act="gelu")
    out = tmp_path / "keye"
    with pytest.raises(CheckpointError, match="gelu_pytorch_tanh"):
        initialise(tmp_path / "text", tmp_path / "vision", out=out)
    with pytest.raises(CheckpointError, match="not a SigLIP"):
        initialise(tmp_path / "text", tmp_path / "text", out=out)
    with pytest.raises(CheckpointError, match="no tokenizer"):
        initialise(tmp_path / "vision", out=out)
    parts.plain_tokenizer(420).save_pretrained(tmp_path / "tokenizer")
    parts.decoder(tmp_path / "small", vocab_size=310)
    with pytest.raises(CheckpointError, match="the decoder.s tokenizer"):
        initialise(tmp_path / "small", KeyeVisionConfig(**parts.TOWER), out=out, tokenizer=tmp_path / "tokenizer")
    out.mkdir()
    (out / "file").touch()
    with pytest.raises(CheckpointError, match="exists already"):
        initialise(tmp_path / "text", KeyeVisionConfig(**parts.TOWER), out=out)
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".part")]


def test_a_recipe_starts_from_such_a_directory(tmp_path: Path) -> None:
    from stages import recipe as recipes
    from stages.distributed.weights import open_start
    from stages.run import make_processor, prepare_tokenizer, start_of

    parts.decoder(tmp_path / "text", "llama", dtype=torch.bfloat16)
    parts.siglip(tmp_path / "vision")
    initialise(tmp_path / "text", tmp_path / "vision", out=tmp_path / "keye")
    recipe = recipes.load(Path(recipes.__file__).parent / "recipes" / "tiny.toml", [f"model.path={tmp_path / 'keye'}"])
    (tmp_path / "run").mkdir()
    prepare_tokenizer(recipe, tmp_path / "run")
    name = recipe.stages[0]
    processor = make_processor(recipe, getattr(recipe, name), tmp_path / "run")
    model = open_start(start_of(name, recipe, tmp_path / "run")).build(torch.float32)
    assert model.dtype == torch.float32 and model.config.text_config.model_type == "llama"
    assert len(processor.tokenizer) <= model.config.text_config.vocab_size
    assert processor.token_id("<|video_pad|>") == model.config.video_token_id
    stored = open_checkpoint(tmp_path / "vision")["embeddings.patch_embedding.weight"].read()
    assert torch.equal(model.visual.embeddings.patch_embedding.weight, stored.to(torch.bfloat16).float())
