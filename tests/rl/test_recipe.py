"""RL recipes: the ready-made ones load, and a mistake is one sentence that names the key."""

from dataclasses import fields
from pathlib import Path

import pytest

import rl
from keye.errors import RecipeError
from keye.field_docs import field_docs
from rl.recipe import Gspo, HeldOut, RlRecipe, check_world, load, places_of
from rl.rollout.config import Rollout
from stages.optimizer import OptimizerConfig
from stages.recipe import StageRecipe

RECIPES = sorted((Path(rl.__file__).parent / "recipes").glob("*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_ready_made_recipes_load_and_keep_the_clip_of_the_paper(path):
    recipe = load(path)
    assert (recipe.gspo.epsilon_low, recipe.gspo.epsilon_high, recipe.gspo.mini_batches) == (3e-4, 4e-4, 4)
    check_world(recipe, 2)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("gspo.stepz=3", "unknown key gspo.stepz; did you mean gspo.steps?"),
        ("gspo.steps=many", "gspo.steps is 'many'"),
        ("gspo.group_size=1", "gspo.group_size must be at least 2"),
        ("gspo.temperature=0", "gspo.temperature must be above 0"),
        ("gspo.truncated='no'", "gspo.truncated must be one of wrong, mask, penalise"),
        ("gspo.overlong_tokens=9999", "gspo.overlong_tokens must be at least 0 and below"),
        ("gspo.importance='on'", "gspo.importance must be one of off, truncated, masked"),
        ("gspo.importance_cap=0.5", "gspo.importance_cap must be at least 1"),
        ("rollout.top_p=0", "rollout.top_p must be above 0"),
    ],
)
def test_a_wrong_key_is_named(override, sentence):
    with pytest.raises(RecipeError, match=sentence.replace("?", r"\?")):
        load(RECIPES[0], [override])


def test_prompts_that_do_not_divide_are_refused():
    recipe = load(RECIPES[0], ["gspo.prompts=32"])
    check_world(recipe, 3)
    with pytest.raises(RecipeError, match="32 in 4 mini-batches .* each of 9 processes: set it to at least 36"):
        check_world(recipe, 9)
    with pytest.raises(RecipeError, match="prompts = 33 must be a multiple of gspo.mini_batches = 4"):
        load(RECIPES[0], ["gspo.prompts=33"])


@pytest.mark.parametrize("world", [1, 2, 3, 5, 8])
def test_mini_batches_hold_the_same_prompts_on_any_number_of_processes(world):
    places = [places_of(rank, world, 32, 4) for rank in range(world)]
    for batch in range(4):
        own = [place for rank in places for place in rank[batch]]
        assert sorted(own) == list(range(8 * batch, 8 * batch + 8))
        assert max(len(rank[batch]) for rank in places) - min(len(rank[batch]) for rank in places) <= 1


@pytest.mark.parametrize(
    ("former", "present"),
    [("gspo.clip=0.5", "gspo.max_grad_norm"), ("gspo.group=4", "gspo.group_size"),
     ("gspo.decode_batch=7", "gspo.decode_batch_size")],
)  # fmt: skip
def test_a_former_key_is_read_with_a_warning(former, present):
    with pytest.warns(FutureWarning, match=f"{former.split('=')[0]} is now called {present}"):
        old = load(RECIPES[0], [former])
    assert old == load(RECIPES[0], [f"{present}={former.split('=')[1]}"]) != load(RECIPES[0])


def test_optimizer_and_checkpoints_have_the_keys_of_the_stages():
    names = [{field.name for field in fields(kind)} for kind in (OptimizerConfig, StageRecipe, Gspo)]
    assert names[0] <= names[1] and names[0] <= names[2]
    assert {"checkpoint_every", "keep_checkpoints", "zero", "steps"} <= names[1] & names[2]


@pytest.mark.parametrize("kind", [Gspo, HeldOut, RlRecipe, Rollout])
def test_every_key_is_documented_below_its_declaration(kind):
    assert set(field_docs(kind)) == {field.name for field in fields(kind)}
