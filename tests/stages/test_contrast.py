"""Stage 0's module and loss against transformers' SigLIP, its sums in bf16, and micro-batches against one batch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedTokenizerFast, SiglipConfig, SiglipModel, SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipMultiheadAttentionPoolingHead

from keye.checkpoint.convert import initialise
from keye.errors import CheckpointError, RecipeError
from keye.model.config import KeyeConfig, KeyeVisionConfig
from keye.model.heads import PoolingHead
from keye.model.keye import KeyeForConditionalGeneration
from keye.model.vision import KeyeVisionModel
from stages.contrastive import Contrast, siglip_text_tower
from stages.distributed import engine
from stages.distributed.activation_memory import apply_memory_options
from stages.distributed.parallel import ParallelDims, build_parallel_dims, sum_over_ranks
from stages.losses import siglip_loss
from stages.recipe import VisionRecipe
from stages.vision import Vision
from tests.distributed import run_distributed
from tests.keye.model import parts
from tests.stages import small

ALONE = ParallelDims(0, 1, 1, None)
CAPTIONS = ["A red cat.", "two Dogs, on the grass", "a bird", "night: it flashes three times and then goes out again"]


# --- the pooling head


def heads(patches: int, dtype: torch.dtype) -> tuple[PoolingHead, SiglipMultiheadAttentionPoolingHead, Tensor]:
    """Ours with weights of `dtype`, SigLIP's in float64 with the same values, and features of `dtype`."""
    torch.manual_seed(0)
    config = KeyeVisionConfig(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_hidden_layers=1)
    ours = PoolingHead(config).to(dtype)
    for linear in (ours.q_proj, ours.k_proj, ours.v_proj, ours.out_proj):
        nn.init.normal_(linear.bias, std=0.1)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    theirs = SiglipMultiheadAttentionPoolingHead(SiglipVisionConfig(**sizes)).double()
    state = {name: value.double() for name, value in ours.state_dict().items()}
    for kind in ("weight", "bias"):
        state[f"attention.in_proj_{kind}"] = torch.cat([state.pop(f"{part}_proj.{kind}") for part in "qkv"])
        state[f"attention.out_proj.{kind}"] = state.pop(f"out_proj.{kind}")
    theirs.load_state_dict(state)
    return ours, theirs, (torch.randn(patches, 64) + 0.5).to(dtype)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("patches", [2500, 20_000])
def test_head_is_siglips_in_float64(patches, dtype, most):
    ours, theirs, features = heads(patches, dtype)
    owner = (torch.arange(patches) >= 7).long()  # a visual of seven patches beside one of all the others
    wanted = torch.cat([theirs(features[owner == i].double()[None]) for i in range(2)])
    error = (ours(features, owner, 2).double() - wanted).abs().max() / wanted.abs().max()
    assert error < most


class RunningSums(TorchDispatchMode):
    """The running sums that were made in fewer bits than fp32: of a GPU these lose what a CPU keeps."""

    names = ("index_add", "scatter_add", "scatter_reduce", "segment_reduce", "cumsum", "index_reduce")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        low = any(isinstance(x, Tensor) and x.dtype in (torch.bfloat16, torch.float16) for x in args)
        if low and any(name in str(op) for name in self.names):
            self.found.append(str(op))
        return op(*args, **(kwargs or {}))


def test_stage_0_has_no_running_sum_in_bf16():
    model = small.model(small.processor())
    module = Vision(VisionRecipe(steps=1, learning_rate=1.0), small.processor()).prepare(model).bfloat16()
    batch = pairs_of(model.config.vision_config)
    with RunningSums() as sums:
        vision, text, *rest = module(*batch.values())
        siglip_loss(vision, text, batch["captions"], *rest).backward()
    assert not sums.found and {x.dtype for x in (vision, text, *rest)} == {torch.float32}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_language_step_has_no_running_sum_in_bf16(tmp_path, checkpointing):
    made = small.processor()
    model = small.model(made).bfloat16().train()
    apply_memory_options(model, checkpointing)
    rows = small.lines(small.world(tmp_path))
    batch = made.collate([made.sample(row["messages"], tmp_path) for row in rows[:6]])
    with RunningSums() as sums:
        model(**batch).loss.backward()
    assert not sums.found


def test_head_keeps_visuals_apart():
    ours, _, features = heads(10, torch.float32)
    owner = torch.tensor([0] * 3 + [1] * 6 + [2])
    alone = [ours(features[owner == i], torch.zeros(int((owner == i).sum()), dtype=torch.long), 1) for i in range(3)]
    torch.testing.assert_close(ours(features, owner, 3), torch.cat(alone), atol=1e-6, rtol=1e-5)


# --- SigLIP's own towers


def fast_tokenizer() -> PreTrainedTokenizerFast:
    """A unigram tokenizer as SigLIP's is: lower case, no punctuation, `</s>` behind a text and as padding."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.Unigram())
    plain = [normalizers.Lowercase(), normalizers.Replace(Regex(r"[[:punct:]]"), "")]
    tokenizer.normalizer = normalizers.Sequence(plain)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator([caption.lower() for caption in CAPTIONS] * 8, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>", unk_token="<unk>")
    made.model_max_length = 16
    return made


def write_siglip(folder: Path, **text: Any) -> SiglipModel:
    """A SigLIP with random weights and the temperature and bias of a trained one; returns it."""
    torch.manual_seed(3)
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {"vocab_size": 64, "max_position_embeddings": 16, "projection_size": parts.TOWER["hidden_size"], **text}
    more |= {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 1}
    config = SiglipConfig(vision_config={**parts.TOWER, "image_size": 56}, text_config={**sizes, **more})
    model = SiglipModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms must not stay at zero and one
            parameter.add_(torch.randn_like(parameter) * 0.05)
        model.logit_scale.fill_(4.7)
        model.logit_bias.fill_(-16.5)
    model.save_pretrained(folder, max_shard_size="20KB")
    fast_tokenizer().save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def siglip(tmp_path_factory) -> tuple[Path, SiglipModel]:
    folder = tmp_path_factory.mktemp("siglip")
    return folder, write_siglip(folder)


@pytest.fixture(scope="module")
def keye(siglip, tmp_path_factory) -> KeyeForConditionalGeneration:
    """A Keye made from that SigLIP and a decoder, its rotary off, as SigLIP has none."""
    folder = tmp_path_factory.mktemp("parts")
    parts.decoder(folder / "text")
    initialise(folder / "text", siglip[0], out=folder / "keye")
    config = KeyeConfig.from_pretrained(folder / "keye")
    config.vision_config.rotary = False
    return KeyeForConditionalGeneration.from_pretrained(folder / "keye", config=config, dtype=torch.float32)


def patches_of(pixels: Tensor) -> Tensor:
    """Stills `[B, 3, 56, 56]` → patches `[B · 16, 3, 14, 14]` in raster order."""
    cut = pixels.unflatten(2, (4, 14)).unflatten(4, (4, 14))
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)


def test_loss_of_a_siglips_own_towers_is_transformers(siglip, keye):
    folder, theirs = siglip
    stage = Vision(VisionRecipe(steps=1, learning_rate=1.0, pairs=4, text_model=str(folder)), small.processor())
    module = stage.prepare(keye)
    pixels = torch.randn(4, 3, 56, 56, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    ids = stage.tokens(CAPTIONS)
    wanted_ids = PreTrainedTokenizerFast.from_pretrained(folder)(CAPTIONS, padding="max_length", truncation=True)
    assert ids.tolist() == wanted_ids["input_ids"] and ids.shape == (4, 16)
    wanted = theirs(input_ids=ids, pixel_values=pixels, return_loss=True)
    batch = {"pixels": patches_of(pixels), "grids": torch.tensor([[1, 4, 4]] * 4), "owners": torch.arange(4)}
    loss = stage.loss(module, {**batch, "captions": ids}, ALONE)
    assert loss.item() == pytest.approx(wanted.loss.item(), rel=1e-5)
    vision, text, scale, bias = module(*batch.values(), ids)
    logits = vision @ text.T * scale.exp() + bias
    torch.testing.assert_close(logits, wanted.logits_per_image, atol=1e-4, rtol=1e-5)
    # The diagonal lost its meaning where the head or the tokenizer is another: it is far from what a drawn head gives.
    drawn = Contrast(module.visual, module.text, 4.7, -16.5)
    assert abs(siglip_loss(*drawn(*batch.values(), ids)[:2], ids, scale, bias).item() - wanted.loss.item()) > 1e-2


def test_gradients_of_a_siglips_own_towers_are_transformers(siglip, keye):
    folder, theirs = siglip
    stage = Vision(VisionRecipe(steps=1, learning_rate=1.0, pairs=4, text_model=str(folder)), small.processor())
    module = stage.prepare(keye)
    module.zero_grad()
    theirs.zero_grad()
    pixels = torch.randn(4, 3, 56, 56, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
    batch = {"pixels": patches_of(pixels), "grids": torch.tensor([[1, 4, 4]] * 4), "owners": torch.arange(4)}
    batch["captions"] = stage.tokens(CAPTIONS)
    stage.loss(module, batch, ALONE).backward()
    theirs(input_ids=batch["captions"], pixel_values=pixels, return_loss=True).loss.backward()
    head, text = theirs.vision_model.head, theirs.text_model
    same = [
        (module.head.probe, head.probe), (module.head.mlp.fc1.weight, head.mlp.fc1.weight),
        (module.head.out_proj.weight, head.attention.out_proj.weight), (module.text.head.weight, text.head.weight),
        (module.text.embeddings.token_embedding.weight, text.embeddings.token_embedding.weight),
        (module.visual.embeddings.position_embedding.weight, theirs.vision_model.embeddings.position_embedding.weight),
        (module.scale, theirs.logit_scale), (module.bias, theirs.logit_bias),
    ]  # fmt: skip
    for ours, wanted in same:
        torch.testing.assert_close(ours.grad, wanted.grad, atol=1e-5 * float(wanted.grad.abs().max()), rtol=1e-4)


def test_siglips_own_sentencepiece_tokenizer_is_read(siglip, keye, tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")  # of the train extra
    from transformers import SiglipTokenizer

    write_siglip(tmp_path)
    for file in tmp_path.glob("*token*"):
        file.unlink()
    with (tmp_path / "spiece.model").open("wb") as out:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([caption.lower() for caption in CAPTIONS] * 8), model_writer=out, vocab_size=60,
            pad_id=-1, bos_id=-1, eos_id=1, unk_id=2, hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
    SiglipTokenizer(str(tmp_path / "spiece.model"), model_max_length=16).save_pretrained(tmp_path)
    stage = Vision(VisionRecipe(steps=1, learning_rate=1.0, text_model=str(tmp_path)), small.processor())
    ids = stage.tokens(["A red CAT!", "a red cat"])
    assert ids.shape == (2, 16) and torch.equal(ids[0], ids[1]) and ids[0, -1] == 1
    assert torch.isfinite(stage.prepare(keye).text(input_ids=ids).pooler_output).all()


def test_text_tower_that_does_not_fit_is_named(siglip, keye, tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere: no config.json of a SigLIP; .*--set vision.text_model= "):
        siglip_text_tower(tmp_path / "nowhere", keye.visual)
    with pytest.raises(CheckpointError, match="projects to 32 values and the vision tower is 96 wide"):
        siglip_text_tower(siglip[0], KeyeVisionModel(KeyeConfig.preset("tiny").vision_config))
    parts.decoder(tmp_path / "qwen")
    with pytest.raises(CheckpointError, match="qwen3 is not a SigLIP with a text tower"):
        siglip_text_tower(tmp_path / "qwen", keye.visual)


def test_text_model_without_a_head_gets_one_that_is_drawn(siglip, keye, tmp_path):
    siglip[1].text_model.save_pretrained(tmp_path)
    module = siglip_text_tower(tmp_path, keye.visual)
    wanted = siglip[1].text_model.final_layer_norm.weight
    assert torch.equal(module.text.final_layer_norm.weight, wanted) and module.start[1] == -10.0


# --- micro-batches


def pairs_of(vision: KeyeVisionConfig, count: int = 8) -> dict[str, Tensor]:
    """Pairs of one or two frames of several sizes; the third caption stands there twice."""
    generator = torch.Generator().manual_seed(5)
    grids = [(1, 2 + 2 * (i % 3), 4) for i in range(count + count // 2)]
    owners = [min(i, count - 1) if i < count else 2 * (i - count) for i in range(len(grids))]
    order = sorted(range(len(grids)), key=lambda i: owners[i])
    grids, owners = torch.tensor([grids[i] for i in order]), torch.tensor([owners[i] for i in order])
    side = vision.patch_size
    pixels = torch.randint(0, 255, (int(grids.prod(1).sum()), 3, side, side), generator=generator, dtype=torch.uint8)
    captions = torch.randint(5, 60, (count, 12), generator=generator)
    captions[count // 2] = captions[2]
    return {"pixels": pixels, "grids": grids, "owners": owners, "captions": captions}


def part_of(batch: dict[str, Tensor], pairs: range) -> dict[str, Any]:
    """The pairs `pairs` of a batch."""
    rows = [i for i, owner in enumerate(batch["owners"].tolist()) if owner in pairs]
    patches = batch["pixels"].split(batch["grids"].prod(1).tolist())
    return {
        "pixels": torch.cat([patches[i] for i in rows]), "grids": batch["grids"][rows],
        "owners": batch["owners"][rows] - pairs[0], "captions": batch["captions"][pairs[0] : pairs[-1] + 1],
    }  # fmt: skip


def made_stage() -> tuple[Vision, nn.Module]:
    processor = small.processor()
    stage = Vision(VisionRecipe(steps=1, learning_rate=1e-3, pairs=8, text_length=12), processor)
    model = small.model(processor)
    torch.manual_seed(1)
    return stage, stage.prepare(model).train()


def through_the_engine(micro: int, zero: int) -> dict[str, Any]:
    """The loss of a step and on every rank the whole gradient of it, in micro-batches of `micro` pairs."""
    from deepspeed.utils import safe_get_full_grad

    engine.start(threads=1)
    grid, (stage, module) = build_parallel_dims(1), made_stage()
    whole, own = pairs_of(module.visual.config), 8 // grid.world
    firsts = range(grid.rank * own, (grid.rank + 1) * own, micro)
    batches = [part_of(whole, range(first, first + micro)) for first in firsts]
    built = engine.build(module, small.optimizer(1e-3), 1, zero=zero, accumulation=len(batches), precision="fp32")
    stage.begin(built, batches, grid)
    total = torch.zeros(())
    for batch in batches:
        loss = stage.loss(built, batch, grid)
        total += loss.detach()
        built.backward(loss * grid.world * len(batches))
        if batch is batches[-1]:  # DeepSpeed has a gradient from here to the optimizer's step
            gradients = {name: safe_get_full_grad(p).clone() for name, p in module.named_parameters()}
        built.step()
    return {"loss": float(sum_over_ranks(total)), "gradients": gradients}


WAYS = [(4, 2), (2, 2), (1, 2), (2, 3), (2, 0)]  # pairs of a micro-batch, ZeRO


def all_ways() -> list[dict[str, Any]]:
    return [through_the_engine(*way) for way in WAYS]


@pytest.fixture(scope="module")
def one_batch() -> dict[str, Any]:
    """All pairs at once, by torch alone."""
    stage, module = made_stage()
    loss = stage.loss(module, pairs_of(module.visual.config), ALONE)
    loss.backward()
    return {"loss": loss.item(), "gradients": {name: p.grad for name, p in module.named_parameters()}}


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "two processes"])
def in_parts(request) -> list[dict[str, Any]]:
    return run_distributed(all_ways, request.param, 300)[0]


@pytest.mark.parametrize("way", range(len(WAYS)), ids=[f"{micro} at once, ZeRO-{zero}" for micro, zero in WAYS])
def test_micro_batches_are_one_batch(one_batch, in_parts, way):
    found = in_parts[way]
    assert found["loss"] == pytest.approx(one_batch["loss"], rel=1e-6)
    assert found["gradients"].keys() == one_batch["gradients"].keys()
    largest = max(float(value.abs().max()) for value in one_batch["gradients"].values())
    for name, wanted in one_batch["gradients"].items():
        torch.testing.assert_close(
            found["gradients"][name], wanted, atol=1e-6 * largest, rtol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_micro_batches_of_a_stage_divide():
    recipe = VisionRecipe(steps=1, learning_rate=1.0, pairs=48, micro_pairs=4)
    assert [recipe.micro_batches(ranks) for ranks in (1, 2, 12)] == [12, 6, 1]
    assert VisionRecipe(steps=1, learning_rate=1.0, pairs=48).micro_batches(2) == 1
    with pytest.raises(RecipeError, match="micro_pairs = 4 does not divide the 6 pairs of each of 8 ranks"):
        recipe.micro_batches(8)
    with pytest.raises(RecipeError, match="vision.pairs = 48 cannot be shared by 5 ranks"):
        recipe.micro_batches(5)


def test_stage_0_learns_to_tell_stills_apart():
    stage, module = made_stage()
    batches = [part_of(pairs_of(module.visual.config), range(first, first + 4)) for first in (0, 4)]
    optimizer, losses = torch.optim.AdamW(module.parameters(), lr=3e-3), []
    for _ in range(40):
        stage.begin(module, batches, ALONE)
        total = sum(stage.loss(module, batch, ALONE) for batch in batches)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(total.item())
    assert losses[-1] < 0.3 * losses[0]
