"""The cost of a recipe: parameters, operations, time and money by hand, and its table."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from keye.errors import KeyeError, RecipeError
from keye.model import flops
from keye.model.config import KeyeConfig
from keye.model.keye import KeyeForConditionalGeneration
from scripts.bench.stages.cost import BASE, pack_of
from stages.cost import estimate as cost
from stages.cost import report as cost_report
from stages.cost.estimate import (
    Assumptions,
    Kind,
    StageCost,
    Work,
    config_of,
    estimate,
    parameters_of,
    step_flops,
    work_of,
)
from stages.cost.gpus import GPUS, Gpu, gpu_named
from stages.cost.work import mixture_read
from stages.data.packing.mixture import Mixture
from stages.distributed.activation_memory import apply_memory_options
from stages.distributed.parallel import ParallelDims
from stages.recipe import Recipe, load
from stages.stage import choose_sources
from stages.vision import Vision
from tests.stages import small

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "stages" / "recipes"
GPU = Gpu("test", 80e9, 1e15, 1e12, 2.0)


@pytest.fixture
def keye_8b() -> Recipe:
    return load(RECIPES / "keye_8b.toml")


def test_parameters_are_the_models():
    config = KeyeConfig.preset("tiny", vocab_size=512)
    counted = parameters_of(config)
    model = KeyeForConditionalGeneration(config)
    assert sum(counted.values()) == sum(p.numel() for p in model.parameters())
    assert counted["projector"] == sum(p.numel() for p in model.projector.parameters())


def contrastive(**changes: object) -> tuple[Recipe, StageCost]:
    """A recipe of stage 0 on one device in fp32, with stills of 100 tokens, and its cost."""
    recipe = load(RECIPES / "tiny.toml", ["precision=fp32"])
    settings = replace(recipe.vision, pairs=8, zero=0, mixture={"image": 1.0}, **changes)
    image = Kind(104.0, 100 / 104, 400.0, 0.1)
    recipe = replace(recipe, vision=settings, alignment=None, multitask=None, annealing=None)
    return recipe, estimate(recipe, GPU, 1, Assumptions(kinds={"image": image}))[0]


def contrast_of(recipe: Recipe) -> tuple[Vision, torch.nn.Module, dict[str, torch.Tensor]]:
    """The module of stage 0 and a batch of the same number of pairs."""
    torch.manual_seed(0)
    processor = small.processor()
    processor.tokenizer.add_tokens([f"more{i}" for i in range(recipe.model.vocab_size - len(processor.tokenizer))])
    stage = Vision(recipe.vision, processor)
    model = KeyeForConditionalGeneration(KeyeConfig.preset("tiny", vocab_size=recipe.model.vocab_size))
    pairs = recipe.vision.pairs
    batch = {
        "pixels": torch.zeros(400 * pairs, 3, 14, 14, dtype=torch.uint8), "grids": torch.tensor([[1, 20, 20]] * pairs),
        "owners": torch.arange(pairs), "captions": torch.randint(5, 60, (pairs, recipe.vision.text_length)),
    }  # fmt: skip
    return stage, stage.prepare(model).train(), batch


def test_stage_0_is_counted_as_it_is_built():
    recipe, cost = contrastive()
    _, module, batch = contrast_of(recipe)
    assert cost.parameters == sum(p.numel() for p in module.parameters())
    passed = {x.untyped_storage().data_ptr() for x in [*module.parameters(), *batch.values()]}
    held: dict[int, torch.Tensor] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in passed:
            held[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        module(**batch)
    kept = sum(x.untyped_storage().nbytes() for x in held.values())
    assert cost.memory.activations == pytest.approx(kept, rel=0.06)


def test_micro_batches_take_the_memory_of_a_part_and_another_forward_pass():
    recipe, whole = contrastive()
    _, parts = contrastive(micro_pairs=2)
    assert parts.memory.activations == pytest.approx(whole.memory.activations / 4)
    assert parts.memory.pixels == whole.memory.pixels and parts.parameters == whole.parameters
    stage, module, batch = contrast_of(recipe)
    module.requires_grad_(False)  # torch's counter expects a graph, which the first pass does not have
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        one = {"owners": torch.arange(2), "grids": batch["grids"][:2]}
        batches = [
            {**one, "pixels": pixels, "captions": captions}
            for pixels, captions in zip(batch["pixels"].split(800), batch["captions"].split(2), strict=True)
        ]
        stage.begin(module, batches, ParallelDims(0, 1, 1, None))
    assert parts.flops_done - whole.flops_done == pytest.approx(counter.get_total_flops(), rel=0.05)
    assert parts.flops == whole.flops


def test_stage_0_has_no_context_that_limits_its_stills():
    recipe = load(RECIPES / "tiny.toml", ["processor.image.min_tokens=3888", "processor.image.max_tokens=20480"])
    assert cost.kinds_of(recipe, recipe.vision)["image"].patches == 4 * 3888
    assert cost.kinds_of(recipe, recipe.multitask)["image"].patches == 4 * 512


def test_text_towers_parameters_are_siglips(tmp_path):
    from transformers import SiglipTextConfig, SiglipTextModel

    config = SiglipTextConfig(
        vocab_size=400, hidden_size=32, intermediate_size=100, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=16, projection_size=96,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    recipe = load(RECIPES / "tiny.toml", [f"vision.text_model={tmp_path}"])
    tower = cost._text_tower(recipe.vision, config_of(recipe))
    assert tower.parameters == sum(p.numel() for p in SiglipTextModel(config).parameters())


def test_operations_of_a_step():
    config, work = BASE.config(), Work([512] * 4, [(8, 8)] * 64, 512)
    forward = flops.forward(config, work.frames, work.documents, work.labels).total
    settings = BASE.recipe()
    model, done = step_flops(config, "multitask", work, settings)
    assert model == 3 * forward
    assert done == model + flops.head(config.text_config, 512).total  # the loss alone is computed twice
    aligned, _ = step_flops(config, "alignment", work, settings)
    assert forward < aligned < model


@pytest.mark.parametrize(
    "changes", [{"checkpointing": True}, {"mlp_tiles": 4}, {"checkpointing": True, "mlp_tiles": 4}], ids=str
)
def test_recomputed_operations_are_those_that_torch_counts(changes):
    case = replace(BASE, width=128, tower=2, layers=2, tokens=256, documents=2)
    estimated, counted = [], []
    for settings in (case.recipe(), replace(case.recipe(), **changes)):
        model = KeyeForConditionalGeneration(case.config()).train()
        apply_memory_options(model, settings.checkpointing, settings.offload, settings.mlp_tiles)
        with FlopCounterMode(display=False) as counter:
            model(**pack_of(case), num_items_in_batch=64.0).loss.backward()
        counted.append(counter.get_total_flops())
        estimated.append(step_flops(case.config(), "multitask", case.work(), settings)[1])
    assert estimated[1] - estimated[0] == counted[1] - counted[0] > 0


def test_attention_is_recomputed_only_with_offload():
    settings, (config, work) = replace(BASE.recipe(), checkpointing=True), (BASE.config(), BASE.work())
    kept, moved = (step_flops(config, "multitask", work, replace(settings, offload=way))[1] for way in (False, True))
    quadratic = flops.decoder(config.text_config, work.documents) + flops.tower(config.vision_config, work.frames)
    assert moved - kept == quadratic.quadratic


def test_a_step_has_the_mixtures_tokens(keye_8b: Recipe):
    settings = keye_8b.multitask
    kinds = {"video": Kind(3000, 0.8, 400, 0.1), "image": Kind(700, 0.5, 900, 0.5), "text": Kind(1000, 0, 4, 1.0)}
    work = work_of(settings, kinds)
    tokens = settings.global_batch_size * settings.context
    assert sum(work.documents) == pytest.approx(tokens, rel=0.01)
    assert work.patches == pytest.approx(4 * tokens * (0.24 * 0.8 + 0.5 * 0.5), rel=0.01)
    assert work.labels == pytest.approx(tokens * (0.24 * 0.1 + 0.5 * 0.5 + 0.26), rel=0.01)


def test_time_and_money_follow_from_the_operations(keye_8b: Recipe):
    phase = next(c for c in estimate(keye_8b, GPU, 64, Assumptions(utilisation=0.5)) if c.name == "multitask")
    update = 7 * 4 * phase.trained / 64 / GPU.bandwidth
    assert phase.seconds == pytest.approx(phase.flops_done / (64 * 0.5e15) + update)
    assert phase.days == pytest.approx(phase.seconds * 100_000 / 86_400)
    assert phase.dollars == pytest.approx(phase.days * 24 * 64 * 2.0)
    assert phase.mfu == pytest.approx(phase.flops / phase.seconds / 64e15) and phase.mfu < 0.5
    assert phase.flops == pytest.approx(6 * 8e9 * 256 * 8192, rel=0.25)  # six a parameter and token, and attention


def test_a_stage_that_does_not_fit_gets_a_remedy_that_fits(keye_8b: Recipe):
    small = replace(GPU, memory=40e9)
    plain = replace(keye_8b.multitask, checkpointing=False)
    recipe = replace(keye_8b, multitask=plain)
    made = {c.name: c for c in estimate(recipe, small, 64)}["multitask"]
    assert not made.fits and made.remedy.startswith("--set multitask.checkpointing=true")
    words = [word for word in made.remedy.split() if word != "--set"]
    changed = load(RECIPES / "keye_8b.toml", ["multitask.checkpointing=false", *words])
    assert {c.name: c for c in estimate(changed, small, 64)}["multitask"].fits
    hopeless = {c.name: c for c in estimate(recipe, replace(GPU, memory=1e9), 64)}["multitask"]
    assert "no setting" in hopeless.remedy


@pytest.mark.parametrize("gpus", [8, 64, 128])
def test_the_reports_recipe_fits_80_gb(keye_8b: Recipe, gpus: int):
    costs = estimate(keye_8b, gpu_named("h100"), gpus)
    assert [c.name for c in costs] == list(keye_8b.chain) and all(c.fits for c in costs)


def test_eight_gpus_get_a_remedy(keye_8b: Recipe):
    recipe = replace(keye_8b, vision=replace(keye_8b.vision, micro_pairs=0))
    costs = [c for c in estimate(recipe, gpu_named("h100"), 8) if not c.fits]
    assert costs and all(c.remedy.startswith("--set") for c in costs)
    changes = [word for c in costs for word in c.remedy.split() if word != "--set"]
    assert all(c.fits for c in estimate(load(RECIPES / "keye_8b.toml", changes), gpu_named("h100"), 8))


def test_intermediate_contexts_cost_the_same_memory(keye_8b: Recipe):
    recipe = replace(keye_8b, annealing=replace(keye_8b.annealing, context_schedule={"32768": 10}))
    costs = {c.name: c for c in estimate(recipe, GPU, 64)}
    assert costs["annealing-32768"].memory.peak == pytest.approx(costs["annealing"].memory.peak, rel=0.05)
    assert costs["annealing-32768"].flops < costs["annealing"].flops  # attention over shorter documents


def test_gpus_that_cannot_share_the_packs_are_named(keye_8b: Recipe):
    with pytest.raises(RecipeError, match="alignment: 256 packs, each on 1 ranks, cannot be divided by 48 GPUs"):
        estimate(replace(keye_8b, vision=None), GPU, 48)
    sequence = replace(keye_8b, vision=None, alignment=replace(keye_8b.alignment, sequence_parallel=2))
    advice = "give --gpus a multiple of 2 that divides 512, or change alignment.sequence_parallel or alignment.global_"
    with pytest.raises(RecipeError, match=advice):
        estimate(sequence, GPU, 1)
    for gpus in (2, 512):
        estimate(replace(sequence, multitask=None, annealing=None), GPU, gpus)
    with pytest.raises(RecipeError, match="vision.pairs = 8192 cannot be shared by 48 ranks evenly"):
        estimate(keye_8b, GPU, 48)
    with pytest.raises(KeyeError, match="--gpu h300 is not known; use one of "):
        gpu_named("h300")


def test_a_models_directory_gives_its_config(tmp_path: Path, keye_8b: Recipe):
    KeyeConfig.preset("tiny", vocab_size=300).save_pretrained(tmp_path)
    recipe = replace(keye_8b, model=replace(keye_8b.model, path=str(tmp_path)))
    assert config_of(recipe).text_config.vocab_size == 300
    assert config_of(keye_8b).text_config.vocab_size == 151_936  # missing: the preset
    assert config_of(load(RECIPES / "tiny.toml")).text_config.vocab_size == 1024


def test_table_picture_and_json(keye_8b: Recipe, tmp_path: Path):
    costs = estimate(keye_8b, GPUS["h200"], 64)
    text = cost_report.table(costs)
    assert all(name in text for name in keye_8b.chain) and "weights" in text
    table = json.loads(json.dumps(cost_report.as_json(keye_8b, GPUS["h200"], 64, Assumptions(), costs)))
    assert table["phases"][2]["memory"]["peak"] == pytest.approx(sum(table["phases"][2]["memory"]["parts"].values()))
    cost_report.draw(tmp_path / "cost.png", GPUS["h200"], costs, "title")
    assert (tmp_path / "cost.png").stat().st_size > 5000


@pytest.mark.parametrize(("value", "message"), [(8.64e9, "8.64 G"), (12, "12"), (1.5e12, "1.5 T"), (40_100, "40.1 k")])
def test_amounts(value: float, message: str):
    assert cost_report.amount(value) == message


def test_script(tmp_path: Path):
    def script(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / "scripts/cost.py"), str(RECIPES / "tiny.toml"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)

    done = script("--gpus", "2", "--gpu", "4090", "--price", "0.4", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["gpu"]["price"] == 0.4
    wrong = script("--mfu", "3")
    assert wrong.returncode == 2 and "--mfu 3 is not a share" in wrong.stderr and "Traceback" not in wrong.stderr


def test_largest_frame_is_the_largest_that_the_recipe_allows(keye_8b: Recipe):
    frames = {name: cost.largest_frame(keye_8b, getattr(keye_8b, name)) for name in keye_8b.stages}
    assert frames == {"vision": 4 * 20_480, "alignment": 4 * 8192, "multitask": 4 * 8192, "annealing": 4 * 20_480 // 8}


def test_tokens_of_a_first_lesson_are_those_of_the_mixture_that_trains():
    """330,000 and 250,000 tokens of stills come before the shares of 85, 12 and 3 % in the tiny recipe's stage 2."""
    recipe = load(RECIPES / "tiny.toml")
    total = recipe.multitask.steps * recipe.multitask.global_batch_size * recipe.multitask.context
    read = mixture_read("multitask", recipe, total)
    lesson = 580_000
    assert read["image"] == pytest.approx((lesson + (total - lesson) * 0.12) / total)
    assert read["video"] == pytest.approx((total - lesson) * 0.85 / total) and sum(read.values()) == pytest.approx(1)
    # Independent: the mixture of the trainer draws samples of 100 tokens until it has the same number.
    chosen = choose_sources("multitask", recipe)
    sources = [
        (SimpleNamespace(name=f"{n}", recipe=s, draw_many=np.arange), share) for n, (s, share) in enumerate(chosen)
    ]
    mixture = Mixture(sources, {source.name: source.recipe.first_tokens for source, _ in sources})
    mixture.sources |= {
        name: SimpleNamespace(**vars(s), results=lambda *_: None) for name, s in mixture.sources.items()
    }
    drawn = 0
    while drawn < total:
        block = mixture.draw(64, 64, 100.0, lambda _: 1.0)
        mixture.learn(block.source, np.full(len(block.source), 100), {})
        drawn += 100 * len(block.source)
    for kind, share in read.items():
        given = sum(mixture.tokens[s.name] for s, _ in sources if s.recipe.kind == kind)
        assert given / drawn == pytest.approx(share, abs=0.002)
    # It costs what the kinds cost: stills have other patches than clips.
    without = replace(
        recipe, data=replace(recipe.data, sources=tuple(replace(s, first_tokens=0) for s in recipe.data.sources))
    )
    costs = [next(c for c in estimate(r, GPU, 2) if c.name == "multitask") for r in (recipe, without)]
    shares = replace(recipe.multitask, mixture=read)
    assert (
        costs[0].flops
        == step_flops(config_of(recipe), "multitask", work_of(shares, cost.kinds_of(recipe, shares)), shares)[0]
    )
    assert costs[0].flops != costs[1].flops


def test_a_first_lesson_longer_than_its_stage_is_all_that_it_reads():
    recipe = load(RECIPES / "tiny.toml", ["multitask.steps=100"])
    assert mixture_read("multitask", recipe, 100 * 4096) == {"video": 0.0, "image": pytest.approx(1.0), "text": 0.0}
