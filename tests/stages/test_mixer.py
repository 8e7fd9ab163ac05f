"""Recipes with another mixer of the tower: the model that is drawn, and what is refused before anything is loaded."""

from pathlib import Path

import pytest

from keye.errors import RecipeError
from keye.model.keye import KeyeForConditionalGeneration
from keye.processor.tokenizer import train_tokenizer
from stages.recipe import load
from stages.run import prepare_start

TINY = Path(__file__).parents[2] / "stages" / "recipes" / "tiny.toml"
MIXER = 'model.vision.mixer="hyperzzw"'


def test_a_recipe_draws_its_model_with_the_mixer(tmp_path) -> None:
    train_tokenizer(["red disc"] * 9, 300).save_pretrained(tmp_path / "tokenizer")
    prepare_start("vision", load(TINY, [MIXER]), tmp_path)
    model = KeyeForConditionalGeneration.from_pretrained(tmp_path / "start")
    assert model.config.vision_config.mixer == "hyperzzw"
    assert any(".mixer.slow." in name for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (['model.vision.mixer="hyperzz"'], "did you mean hyperzzw"),
        ([MIXER, "processor.image.max_tokens=2048"], r"annealing.sequence_parallel = 2.*1024 or less"),
        ([MIXER, "multitask.compile=true"], "set multitask.compile = false"),
        ([MIXER, 'model.path="runs/demo/model"'], "remove one of them"),
    ],
)
def test_what_the_mixer_cannot_do_is_refused(changes, message) -> None:
    with pytest.raises(RecipeError, match=message):
        load(TINY, changes)
