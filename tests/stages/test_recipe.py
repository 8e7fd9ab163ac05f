"""Recipes: a mistake is named with its key and the remedy; a valid recipe survives a round trip through TOML."""

import re
import subprocess
import sys
import warnings
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rl.recipe
from keye.encoder_config import EncoderConfig
from keye.errors import RecipeError
from keye.field_docs import field_docs
from stages import recipe as recipes
from stages import typed_toml
from stages.recipe import SourceRecipe, load
from stages.typed_toml import to_toml

READY_MADE = sorted((Path(recipes.__file__).parent / "recipes").glob("*.toml"))
ONE_STEP = "steps=1,learning_rate=1.0"
SMALL = """
name = "mine"
[[data.sources]]
path = "world.jsonl"
kind = "video"
[alignment]
steps = 3
learning_rate = 1e-3
[vision]
steps = 2
learning_rate = 1e-3
"""


@pytest.fixture
def small(tmp_path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(SMALL)
    return path


@pytest.mark.parametrize("path", READY_MADE, ids=lambda path: path.stem)
def test_ready_made_recipe_loads_and_comes_back_from_its_toml(path, tmp_path):
    recipe = load(path)
    copy = tmp_path / "copy.toml"
    copy.write_text(to_toml(recipe))
    assert recipe.stages and load(copy) == recipe


def test_sources_are_looked_for_beside_the_recipe(small):
    (small.parent / "world.jsonl").write_text("")
    assert load(small).data.sources == (SourceRecipe(str(small.parent / "world.jsonl"), "video"),)


def test_a_recipe_is_read_without_its_model(small):
    """`keye cost` and `keye report` read recipes on machines that do not have the model."""
    assert load(small, ["model.path=/nowhere"]).model.path == "/nowhere"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("alignment.stpes=3", "unknown key alignment.stpes; did you mean alignment.steps?"),
        ("alignmint.steps=3", "unknown key alignmint; did you mean alignment?"),
        ("alignment.rope_scale=8.0", "unknown key alignment.rope_scale"),
        ("zzz=1", "unknown key zzz; use one of name, data, model,"),
        ("model.preset=8b", "mine.toml: model.preset = '8b' is not a preset; use one of tiny, small, keye_8b"),
        ("model.preset=smal", "did you mean small?"),
        ("data.world={counts={cout=1}}", "data.world.counts.cout: there is no such family; did you mean count?"),
        (
            "data.world={counts={count=1},heldout={zzz=1}}",
            "heldout.zzz: there is no such family; use one of",
        ),
        ("data.world={counts={count=-1}}", "data.world.counts.count = -1 is negative"),
        ("processor.encoder.measure=ssmi", "mine.toml: processor.encoder: similarity measure 'ssmi' is not known"),
        ("alignment.encoder.policy=unifrom:4", "alignment.encoder: policy 'unifrom:4' is not known"),
        ("annealing.steps=3", "annealing.learning_rate is missing"),
        ("alignment.steps=three", "alignment.steps is 'three', but must be of type int"),
        ("alignment.steps=2.5", "alignment.steps is 2.5, but must be of type int"),
        ("alignment.steps=true", "alignment.steps is True, but must be of type int"),
        ("alignment.checkpointing=1", "alignment.checkpointing is 1, but must be of type bool"),
        ("alignment.betas=0.9", "alignment.betas is 0.9, but must be a list"),
        ('alignment.betas=["a", "b"]', "alignment.betas[0] is 'a', but must be of type float"),
        ("alignment.mixture=1", "alignment.mixture is 1, but must be a table"),
        ("alignment=1", "alignment is not a table"),
        ("alignment.steps.more=1", "steps is not a table"),
        ("alignment.steps", "write --set table.key=value"),
        ("alignment.steps=0", "alignment.steps must be at least 1"),
        ("alignment.learning_rate=nan", "alignment.learning_rate must be above 0"),
        ("alignment.warmup=-1", "alignment.warmup must not be below 0"),
        (f"alignment={{{ONE_STEP},compile=true,mlp_tiles=2}}", "compile = true takes no mlp_tiles = 2"),
        (
            f"alignment={{{ONE_STEP},compile=true,sequence_parallel=2}}",
            "or alignment.sequence_parallel = 1",
        ),
        (
            f"alignment={{{ONE_STEP},compile=true,zero=3}}",
            "set alignment.checkpointing = true or alignment.compile",
        ),
        ("alignment.zero=4", "alignment.zero must be 0, 1, 2 or 3"),
        ("alignment.mixture.video=0.9", "alignment.mixture adds up to 0.9, but must to 1"),
        ("alignment.mixture.film=1.0", "alignment.mixture may name only"),
        ("vision.sequence_parallel=2", "vision.sequence_parallel must be 1"),
        (
            f"alignment={{{ONE_STEP},sequence_parallel=2,encoder={{aggregation='mean'}}}}",
            "alignment.sequence_parallel must be 1 with an encoder's aggregation",
        ),
        ("processor.encoder.aggregation=median", "processor.encoder: aggregation: pool is 'median'"),
        ("vision.pairs=0", "vision.pairs must be at least 1"),
        ("processor.encoder.treshold=0.5", "did you mean processor.encoder.threshold?"),
        ("processor.encoder.max_tokens=many", "processor.encoder.max_tokens is 'many', but must be of type int"),
        ("processor.encoder.fps=true", "processor.encoder.fps is True, but must be of type float"),
        ("processor.encoder.threshold=2.0", "processor.encoder: threshold"),
        ("alignment.encoder.fps=[1]", "alignment.encoder.fps is [1], but must be of type float"),
        ("alignment.encoder.fast_ration=0.1", "did you mean alignment.encoder.fast_ratio?"),
        ("alignment.encoder.min_tokens_per_frame=4096", "alignment.encoder: min_tokens_per_frame"),
        ("processor.image.maximum=3", "unknown key processor.image.maximum; use one of processor.image.min_tokens, "),
        ("processor.image.max_tokens=x", "processor.image.max_tokens is 'x', but must be of type int"),
        ("data.world={counts={read=1},settings={duratoin=1}}", "did you mean data.world.settings.duration?"),
        ("data.world={counts={read=1},settings={fps=1.5}}", "data.world.settings.fps is 1.5, but must be of type int"),
        ("precision=fp16", "precision must be"),
        ("data.sources=[]", "data.sources is empty"),
    ],
)
def test_mistake_is_named_with_its_key(small, override, said):
    with pytest.raises(RecipeError) as caught:
        load(small, [override])
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("alignment.steps=abc", "alignment.steps is 'abc', but must be of type int"),
        ("alignment.lr=abc", "alignment.learning_rate is 'abc', but must be of type float"),
        ('alignment={steps = "abc"}', "alignment.steps is 'abc', but must be of type int"),
        ("alignment.betas=['a']", "alignment.betas[0] is 'a', but must be of type float"),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_wrong_type_names_the_override_that_gave_it(small, override, message):
    with pytest.raises(RecipeError) as caught:
        load(small, ["alignment.warmup=1", override, "vision.steps=1"])
    assert str(caught.value) == f"--set {override}: {message}"


def test_a_wrong_type_in_the_file_names_the_file(small):
    small.write_text(SMALL.replace("steps = 3", 'steps = "abc"'))
    with pytest.raises(RecipeError, match="mine.toml: alignment.steps is 'abc'"):
        load(small, ["alignment.warmup=1"])


def test_a_recipe_of_the_other_command_is_named(small):
    with pytest.raises(RecipeError, match="this is a GSPO recipe; use keye posttrain"):
        load("rl/recipes/tiny.toml")
    with pytest.raises(RecipeError, match="mine.toml: this is a pre-training recipe; use keye pretrain"):
        rl.recipe.load(small)


def test_a_former_key_is_one_plain_line_of_a_command():
    command = [sys.executable, "scripts/pretrain.py", "stages/recipes/tiny.toml", "--set", "multitask.lr=1e-3"]
    result = subprocess.run([*command, "--print"], capture_output=True, text=True, check=True, timeout=300)
    message = "the key multitask.lr is now called multitask.learning_rate; rename it"
    assert result.stderr == f"warning: --set multitask.lr=1e-3: {message}\n"


def test_override_writes_nested_keys_and_new_tables(small):
    recipe = load(
        small,
        ["alignment.steps=7", "alignment.learning_rate=1", "name=yours", "alignment.mixture={video = 1.0}",
         "processor.encoder.max_tokens=64", "annealing.steps=1", "annealing.learning_rate=1e-4"],
    )  # fmt: skip
    assert (recipe.alignment.steps, recipe.alignment.learning_rate, recipe.name) == (7, 1.0, "yours")
    assert isinstance(recipe.alignment.learning_rate, float) and recipe.alignment.mixture == {"video": 1.0}
    assert recipe.processor.encoder == {"max_tokens": 64}
    assert recipe.stages == ["vision", "alignment", "annealing"] and recipe.annealing.rope_scale == 8.0


def annealed(small: Path, schedule: str, *more: str) -> recipes.Recipe:
    table = [
        "annealing.steps=9",
        "annealing.learning_rate=1e-4",
        "annealing.context=131072",
        "annealing.global_batch_size=16",
    ]
    return load(small, [*table, "annealing.sequence_parallel=8", f"annealing.context_schedule={schedule}", *more])


def test_contexts_in_between_are_phases_of_their_own(small):
    chain = annealed(small, "{ 65536 = 5, 32768 = 2000 }").chain
    assert list(chain) == ["vision", "alignment", "annealing-32768", "annealing-65536", "annealing"]
    phases = list(chain.values())[2:]
    assert [(phase.context, phase.steps) for phase in phases] == [(32768, 2000), (65536, 5), (131072, 9)]
    assert {phase.global_batch_size * phase.context for phase in phases} == {16 * 131072}
    assert [phase.context // phase.sequence_parallel for phase in phases] == [16384] * 3
    assert [phase.rope_scale for phase in phases] == [8.0, 1.0, 1.0]
    assert [phase.schedule for phase in phases] == ["constant", "constant", "cosine"]


def test_without_contexts_in_between_the_chain_is_the_stages(small):
    recipe = load(small)
    assert recipe.chain == {"vision": recipe.vision, "alignment": recipe.alignment}
    assert annealed(small, "{}").chain["annealing"].rope_scale == 8.0


def test_a_context_in_between_is_cut_among_a_divisor_of_the_ranks(small):
    phase = annealed(small, "{ 49152 = 1 }", "annealing.global_batch_size=3").chain["annealing-49152"]
    assert (phase.global_batch_size, phase.sequence_parallel) == (
        8,
        4,
    )  # 8 · 49,152 / 131,072 = 3 ranks, of which 8 is no multiple


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        ("{ 131072 = 5 }", "annealing.context_schedule.131072 must be a context below annealing.context = 131072"),
        ("{ 49152 = 5 }", "annealing.context_schedule.49152 does not divide the 2097152 tokens of a step"),
        ("{ 32768 = 0 }", "annealing.context_schedule.32768 = 0, but it must have at least 1 step"),
        ("{ 32768 = 1.5 }", "annealing.context_schedule.32768 is 1.5, but must be of type int"),
        ("{ long = 5 }", "annealing.context_schedule.long must be a context and its steps"),
        ("{ 032768 = 5 }", "annealing.context_schedule.032768 must be a context and its steps"),
        ("[32768]", "annealing.context_schedule is [32768], but must be a table"),
    ],
)
def test_a_wrong_context_in_between_is_named(small, schedule, said):
    with pytest.raises(RecipeError) as caught:
        annealed(small, schedule)
    assert said in str(caught.value)


FORMER = {
    "alignment.lr": ("alignment.learning_rate", 0.5),
    "alignment.packs": ("alignment.global_batch_size", 8),
    "alignment.alike": ("alignment.balanced_packs", 2),
    "alignment.clip": ("alignment.max_grad_norm", 0.5),
    "alignment.save_every": ("alignment.checkpoint_every", 7),
    "alignment.keep": ("alignment.keep_checkpoints", 3),
    "annealing.through": ("annealing.context_schedule", "{ 512 = 4 }"),
    "data.not_like": ("data.decontaminate_against", '["/evaluation.jsonl"]'),
    "data.not_like_bits": ("data.decontaminate_bits", 5),
}
ANNEALING = "annealing={steps=9, learning_rate=1e-4, context=1024}"


@pytest.mark.parametrize("former", FORMER)
def test_a_former_key_is_read_with_a_warning_that_names_the_present_one(small, former):
    present, value = FORMER[former]
    with pytest.warns(FutureWarning, match=re.escape(f"the key {former} is now called {present}")):
        old = load(small, [ANNEALING, f"{former}={value}"])
    assert old == load(small, [ANNEALING, f"{present}={value}"]) != load(small, [ANNEALING])


def in_words_of_before(text: str) -> str:
    for former, (present, _) in FORMER.items():
        text = re.sub(rf"(?m)^{present.split('.')[1]} = ", f"{former.split('.')[1]} = ", text)
    return text


@pytest.mark.parametrize("path", READY_MADE, ids=lambda path: path.stem)
def test_a_recipe_of_an_earlier_version_is_the_same_recipe(path, tmp_path):
    old = tmp_path / path.name
    old.write_text(in_words_of_before(path.read_text()))
    with pytest.warns(FutureWarning) as caught:
        assert load(old) == load(path)
    messages = {str(warning.message) for warning in caught}
    assert f"{old}: the key multitask.packs is now called multitask.global_batch_size; rename it" in messages


def test_an_override_by_a_former_key_overrides_the_present_one(small):
    with pytest.warns(FutureWarning, match=re.escape("--set alignment.lr=0.5: the key alignment.lr is now called")):
        assert load(small, ["alignment.lr=0.5"]).alignment.learning_rate == 0.5
    with pytest.warns(FutureWarning):
        recipe = load(small, [ANNEALING, "annealing.through={ 256 = 2 }", "annealing.through.512=4"])
    assert recipe.annealing.context_schedule == {"256": 2, "512": 4}


def test_both_names_of_a_key_are_an_error(small):
    small.write_text(SMALL + "lr = 1.0\n")
    with pytest.raises(RecipeError, match="mine.toml: vision.lr is the former name of vision.learning_rate; give only"):
        load(small)


def test_only_one_process_warns(small, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(small, ["alignment.lr=0.5"]).alignment.learning_rate == 0.5


def test_a_whole_number_may_be_written_with_an_exponent(small):
    assert load(small, ["alignment.steps=1e3"]).alignment.steps == 1000


@pytest.mark.parametrize("content", [b"steps = [", b"\xff\xfe\x00"], ids=["torn", "binary"])
def test_file_that_is_not_toml_is_named(tmp_path, content):
    path = tmp_path / "mine.toml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match="mine.toml: not TOML"):
        load(path)


def test_missing_file_and_directory_are_named(tmp_path):
    with pytest.raises(RecipeError, match="nowhere.toml: no such recipe; .* are in ") as error:
        load(tmp_path / "nowhere.toml")
    named = Path(str(error.value).rpartition(" are in ")[2])
    assert named.is_absolute() and (named / "tiny.toml").is_file()  # also where the package is installed
    with pytest.raises(RecipeError, match="cannot be read"):
        load(tmp_path)


@dataclass(frozen=True)
class Tables:
    """Any keys and values."""

    name: str
    table: dict[str, Any]


@settings(max_examples=50, deadline=None)
@given(
    name=st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    key=st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    value=st.one_of(st.integers(-(2**60), 2**60), st.floats(allow_nan=False), st.booleans(), st.text('a"\\\n\x7fé')),
)
def test_any_recipe_comes_back_from_its_toml(tmp_path_factory, name, key, value):
    path, tables = tmp_path_factory.mktemp("recipe") / "mine.toml", Tables(name, {key: value})
    path.write_text(to_toml(tables), encoding="utf-8", newline="")
    assert typed_toml.load(Tables, path, [], "") == tables


def test_the_printed_recipe_is_the_one_that_would_be_trained(tmp_path):
    command = [
        sys.executable,
        "scripts/pretrain.py",
        "stages/recipes/small.toml",
        "--set",
        "multitask.learning_rate=1e-4",
    ]
    printed = subprocess.run([*command, "--print"], capture_output=True, text=True, check=True, timeout=300).stdout
    (tmp_path / "printed.toml").write_text(printed, encoding="utf-8")
    assert load(tmp_path / "printed.toml") == load("stages/recipes/small.toml", ["multitask.learning_rate=1e-4"])


@pytest.mark.parametrize(
    "kind",
    [
        recipes.Recipe, recipes.ModelRecipe, recipes.ProcessorRecipe, recipes.SourceRecipe, recipes.WorldRecipe,
        recipes.DataRecipe, recipes.VisionRecipe, recipes.AnnealingRecipe, EncoderConfig,
    ],
)  # fmt: skip
def test_every_key_is_documented_below_its_declaration(kind):
    assert set(field_docs(kind)) == {field.name for field in fields(kind)}
