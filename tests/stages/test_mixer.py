"""Recipes with parts of the tower: the model that is drawn, and what is refused before anything is trained."""

from pathlib import Path

import pytest
import torch.distributed as dist

from keye.errors import RecipeError
from keye.model.keye import KeyeForConditionalGeneration
from keye.processor.processor import KeyeProcessor
from keye.processor.tokenizer import train_tokenizer
from rl.recipe import Gspo
from stages.distributed.weights import open_start
from stages.opening import open_processor
from stages.recipe import load
from stages.run import check, prepare_start

TINY = Path(__file__).parents[2] / "stages" / "recipes" / "tiny.toml"
MIXER = 'model.vision.mixer="hyperzzw"'
MOTION = "model.vision.motion={size=32,blocks=[1,1]}"
ALONE = "annealing.sequence_parallel=1"
TIMED = 'processor.encoder.aggregation="none"'
TWICE = 'encoder.policy="two_stream:slow=3,fast_tokens=4"'


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
        ([MOTION, TIMED, ALONE, f"processor.{TWICE}"], "policy two_stream shows slow frames twice"),
        ([MOTION, TIMED, ALONE, f"multitask.{TWICE}"], "multitask: .*two_stream"),
    ],
)
def test_what_the_parts_cannot_do_is_refused(changes, message) -> None:
    with pytest.raises(RecipeError, match=message):
        load(TINY, changes)


def drawn(folder: Path, *changes: str) -> Path:
    """The directory of an untrained model with parts of the tower, and its processor."""
    tokenizer = train_tokenizer(["red disc"] * 9, 300)
    tokenizer.save_pretrained(folder / "tokenizer")
    recipe = load(TINY, [*changes, ALONE])
    prepare_start("vision", recipe, folder)
    KeyeProcessor(tokenizer, encoder=recipe.processor.encoder).save_pretrained(folder / "start")
    return folder / "start"


@pytest.mark.parametrize(
    ("parts", "changes", "message"),
    [
        ([MIXER], ["multitask.compile=true", ALONE], "set multitask.compile = false"),
        ([MIXER], ["processor.image.max_tokens=2048"], r"annealing.sequence_parallel = 2.*1024 or less"),
        ([MOTION, TIMED], [ALONE], "motion needs the type and time"),
        ([MOTION, TIMED], [TIMED, ALONE, f"annealing.{TWICE}"], "annealing: .*two_stream"),
    ],
)
def test_the_parts_of_a_trained_model_are_checked_before_the_first_stage(
    tmp_path, monkeypatch, parts, changes, message
) -> None:
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    recipe = load(TINY, [f'model.path="{drawn(tmp_path, *parts)}"', *changes])
    with pytest.raises(RecipeError, match=message):
        check(recipe, tmp_path / "run", None)


def test_phases_of_post_training_check_the_model_that_they_start_from(tmp_path) -> None:
    start = open_start(drawn(tmp_path, MOTION, TIMED))
    assert open_processor("gspo", Gspo(steps=1, learning_rate=1e-3), start).encoder["aggregation"] == "none"
    with pytest.raises(RecipeError, match=r"gspo.sequence_parallel must be 1"):
        open_processor("gspo", Gspo(steps=1, learning_rate=1e-3, sequence_parallel=2), start)
