"""The ready-made pre-training recipes load and say what the report says."""

from pathlib import Path

import pytest
import torch

import stages
from keye import KeyeConfig, KeyeForConditionalGeneration, SlowFastEncoder
from keye.errors import ManifestError
from keye.world.families import FAMILIES
from stages.data.sources.formats import open_parts
from stages.recipe import Recipe, load
from stages.typed_toml import to_toml

FOLDER = Path(stages.__file__).parent / "recipes"
RECIPES = {path.stem: path for path in sorted(FOLDER.glob("*.toml"))}
LANGUAGE = ("alignment", "multitask", "annealing")


@pytest.fixture(params=RECIPES)
def recipe(request: pytest.FixtureRequest) -> Recipe:
    return load(RECIPES[request.param])


def test_three_sizes_ship():
    assert {"tiny", "small", "keye_8b"} <= set(RECIPES)


def test_the_four_stages_with_context_times_sixteen_and_rope_base_times_eight(recipe: Recipe):
    assert recipe.stages == ["vision", "alignment", "multitask", "annealing"]
    assert recipe.alignment.context == recipe.multitask.context
    assert recipe.annealing.context == 16 * recipe.multitask.context
    assert recipe.annealing.rope_scale == 8


def test_zero_2_and_then_zero_1(recipe: Recipe):
    assert [getattr(recipe, name).zero for name in recipe.stages] == [2, 2, 2, 1]


def test_mixtures_add_up_and_the_annealing_has_the_reports(recipe: Recipe):
    for name in recipe.stages:
        assert sum(getattr(recipe, name).mixture.values()) == pytest.approx(1)
    assert recipe.annealing.mixture == {"video": 0.24, "image": 0.5, "text": 0.26}


def test_every_kind_of_a_mixture_has_a_source(recipe: Recipe):
    for name in recipe.stages:
        serving = {s.kind for s in recipe.data.sources if name in s.stages or (not s.stages and name != "vision")}
        assert {kind for kind, share in getattr(recipe, name).mixture.items() if share} <= serving


def test_the_encoder_of_every_stage_can_be_built_and_its_clips_fit_the_context(recipe: Recipe):
    for name in LANGUAGE:
        stage = getattr(recipe, name)
        encoder = SlowFastEncoder(**{**recipe.processor.encoder, **stage.encoder})
        # Besides its visual tokens a frame costs its time: two marks round it, one before, five digits and a point.
        frames = encoder.max_tokens // encoder.min_tokens_per_frame
        if recipe.data.world is not None:
            frames = min(frames, 2 * encoder.fps * recipe.data.world.settings["duration"])  # `find` clips last twice
        assert encoder.max_tokens + 9 * frames < stage.context


@pytest.mark.parametrize(("name", "longest"), [("tiny", 2), ("small", 1)])
def test_the_budget_of_the_worlds_clips_does_not_bind(name: str, longest: int):
    """So that `slow_multiple` changes none of their plans; in `small` it binds for clips of `find` that are half slow.

    longest: clips last so many times `duration`; those of `find` last twice as long as others.
    """
    recipe = load(RECIPES[name])
    for stage in LANGUAGE:
        encoder = SlowFastEncoder(**{**recipe.processor.encoder, **getattr(recipe, stage).encoder})
        frames = longest * encoder.fps * recipe.data.world.settings["duration"] + 1
        assert frames * encoder.max_tokens_per_frame <= encoder.max_tokens


def test_a_world_asks_only_for_families_that_there_are(recipe: Recipe):
    if recipe.data.world is not None:
        world = recipe.data.world
        named = {*world.counts, *world.heldout, *world.settings["difficulty"]}
        assert named | {family for source in recipe.data.sources for family in source.families} <= set(FAMILIES)


def test_the_resolved_recipe_reads_back_equal(recipe: Recipe, tmp_path: Path):
    (tmp_path / "recipe.toml").write_text(to_toml(recipe))
    assert load(tmp_path / "recipe.toml") == recipe


def test_keye_8b_is_the_reports():
    recipe = load(RECIPES["keye_8b"])
    assert (recipe.multitask.context, recipe.annealing.context) == (8192, 131_072)
    assert recipe.annealing.sequence_parallel == 8 and recipe.precision == "bf16"
    assert all(getattr(recipe, name).checkpointing for name in recipe.stages)
    assert SlowFastEncoder(**recipe.processor.encoder).settings == SlowFastEncoder.report().settings
    assert recipe.processor.image["max_tokens"] == 20_480
    for world in (8, 16, 32, 64, 128):
        for name in LANGUAGE:
            stage = getattr(recipe, name)
            assert stage.global_batch_size % (world // stage.sequence_parallel) == 0
    tokens = {getattr(recipe, name).global_batch_size * getattr(recipe, name).context for name in LANGUAGE}
    assert tokens == {256 * 8192}


def test_keye_8b_names_the_manifest_that_is_missing():
    video = next(s for s in load(RECIPES["keye_8b"]).data.sources if s.path.endswith("data/video.jsonl"))
    with pytest.raises(ManifestError, match=r"data/video\.jsonl: no such manifest"):
        open_parts(video, video.path)


def test_the_small_model_is_about_a_hundred_times_the_tiny_one():
    recipe = load(RECIPES["small"])
    with torch.device("meta"):
        config = KeyeConfig.preset(recipe.model.preset, vocab_size=recipe.model.vocab_size)
        parameters = sum(p.numel() for p in KeyeForConditionalGeneration(config).parameters())
    assert 120e6 < parameters < 160e6
