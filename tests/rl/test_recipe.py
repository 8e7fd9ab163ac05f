"""RL recipes: the ready-made ones load, and a mistake is one sentence that names the key."""

from pathlib import Path

import pytest

import rl
from keye.errors import RecipeError
from rl.recipe import check_world, load, places_of

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
    ],
)
def test_a_wrong_key_is_named(override, sentence):
    with pytest.raises(RecipeError, match=sentence.replace("?", r"\?")):
        load(RECIPES[0], [override])


def test_prompts_that_cannot_be_dealt_are_refused():
    recipe = load(RECIPES[0], ["gspo.prompts=32"])
    check_world(recipe, 3)
    with pytest.raises(RecipeError, match="32 in 4 mini-batches .* each of 9 processes: set it to at least 36"):
        check_world(recipe, 9)
    with pytest.raises(RecipeError, match="prompts = 33 must be a multiple of gspo.mini_batches = 4"):
        load(RECIPES[0], ["gspo.prompts=33"])


@pytest.mark.parametrize("world", [1, 2, 3, 5, 8])
def test_mini_batches_hold_the_same_prompts_on_any_number_of_processes(world):
    dealt = [places_of(rank, world, 32, 4) for rank in range(world)]
    for batch in range(4):
        places = [place for rank in dealt for place in rank[batch]]
        assert sorted(places) == list(range(8 * batch, 8 * batch + 8))
        assert max(len(rank[batch]) for rank in dealt) - min(len(rank[batch]) for rank in dealt) <= 1
