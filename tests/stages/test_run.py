"""A complete run: all stages from one recipe; finished stages are skipped unless the recipe has changed."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import stages.recipe
from keye.errors import CheckpointError, KeyeError
from keye.model.keye import KeyeForConditionalGeneration
from stages.preparation import prepare_tokenizer, prepare_world
from stages.recipe import load
from stages.run import check, prepare_start, pretrain, start_of, write_report
from tests.distributed import run_distributed
from tests.stages import small

RECIPE = """
name = "test"
[model]
tokenizer = "TOKENIZER"
[processor.encoder]
max_tokens = 16
min_tokens_per_frame = 1
max_tokens_per_frame = 4
[processor.image]
min_tokens = 1
max_tokens = 4
[data.world.settings]
size = [56, 84]
duration = 3.0
[data.world.counts]
count = 4
image_read = 4
text = 4
[[data.sources]]
path = "{run}/world/train.jsonl"
kind = "image"
stages = ["vision"]
[[data.sources]]
path = "{run}/world/train.jsonl"
kind = "video"
[[data.sources]]
path = "{run}/world/train.jsonl"
kind = "text"
[vision]
steps = 2
learning_rate = 1e-3
pairs = 2
text_width = 32
text_layers = 1
[alignment]
steps = 2
learning_rate = 1e-3
context = 128
[annealing]
steps = 1
learning_rate = 1e-4
context = 256
global_batch_size = 1
zero = 1
sequence_parallel = SEQUENCE
"""
STAGES = ("vision", "alignment", "annealing")


def go(recipe: Path, run: Path, overrides: list[str], only: str | None) -> None:
    pretrain(load(recipe, overrides), run, only)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "test.toml"
    small.processor().tokenizer.save_pretrained(path.parent / "tokenizer")
    path.write_text(RECIPE.replace("SEQUENCE", "1").replace("TOKENIZER", str(path.parent / "tokenizer")))
    return path


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "test"
    run_distributed(go, 1, 300, recipe, folder, [], None)
    return folder


@pytest.fixture
def alone(monkeypatch) -> None:
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)


def written(run: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for stage in STAGES for path in (run / stage).rglob("*")}


def test_each_stage_leaves_a_model_metrics_and_its_recipe(run):
    for stage in STAGES:
        lines = [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]
        done = json.loads((run / stage / "stage.json").read_text())
        assert [line["step"] for line in lines] == list(range(1, done["steps"] + 1))
        assert done["skipped"] == 0 and done["recipe"]["steps"] == done["steps"]
        model = KeyeForConditionalGeneration.from_pretrained(run / stage / "model")
        theta = model.config.text_config.rope_parameters["rope_theta"]
        assert theta == (8e6 if stage == "annealing" else 1e6)
    assert load(run / "recipe.toml").stages == list(STAGES)
    assert json.loads((run / "environment.json").read_text())["processes"] == 1


def test_a_finished_stage_keeps_its_model_and_no_checkpoints(run):
    for stage in STAGES:
        assert (run / stage / "model" / "model.safetensors").exists() and not (run / stage / "checkpoints").exists()
    assert not (run / "start").exists()


def test_run_that_ended_after_its_first_model_was_drawn_goes_on_as_if_it_had_not(run, recipe, tmp_path):
    loaded, folder = load(recipe), tmp_path / "ended"
    prepare_world(loaded, folder)
    prepare_tokenizer(loaded, folder)
    prepare_start("vision", loaded, folder)
    assert (folder / "start" / "model.safetensors").exists() and not (folder / "vision").exists()
    run_distributed(go, 1, 300, recipe, folder, [], "vision")
    first, second = (
        [json.loads(line) for line in (one / "vision" / "metrics.jsonl").read_text().splitlines()]
        for one in (run, folder)
    )
    for key in ("loss", "grad_norm", "tokens"):
        assert [line[key] for line in first] == [line[key] for line in second], key
    before, after = (load_file(one / "vision" / "model" / "model.safetensors") for one in (run, folder))
    assert [name for name, value in before.items() if not torch.equal(after[name], value)] == []


def test_only_what_a_stage_trains_changes(run):
    before, after = (load_file(run / stage / "model" / "model.safetensors") for stage in ("vision", "alignment"))
    changed = {name for name, value in after.items() if not torch.equal(before[name], value)}
    assert changed and all(name.startswith("model.projector") for name in changed)


def test_finished_stages_are_passed_over(run, recipe, capfd):
    before = written(run)
    run_distributed(go, 1, 300, recipe, run, [], None)
    assert written(run) == before
    assert capfd.readouterr().out.count("finished before, skipped") == 3


def test_finished_stage_with_another_recipe_is_named_with_the_mend(run, recipe):
    before, text = written(run), (run / "recipe.toml").read_text()
    with pytest.raises(KeyeError) as caught:
        run_distributed(go, 1, 300, recipe, run, ["alignment.steps=3"], None)
    said = str(caught.value)
    assert said.startswith("alignment was finished with steps = 2, but the recipe says 3; remove ")
    assert str(run / "alignment") in said and "another --out" in said
    assert written(run) == before and (run / "recipe.toml").read_text() == text


def test_stage_that_was_finished_with_former_keys_is_of_the_same_recipe(alone, run, recipe, tmp_path):
    again = tmp_path / "run"
    shutil.copytree(run, again)
    former = {
        "learning_rate": "lr", "global_batch_size": "packs", "balanced_packs": "alike", "max_grad_norm": "clip",
        "checkpoint_every": "save_every", "keep_checkpoints": "keep", "context_schedule": "through",
    }  # fmt: skip
    for stage in STAGES:
        path = again / stage / "stage.json"
        done = json.loads(path.read_text())
        renamed = {former.get(key, key): value for key, value in done["recipe"].items()}
        assert {"lr", "packs", "save_every"} <= renamed.keys()
        path.write_text(json.dumps({**done, "recipe": renamed}))
    check(load(recipe), again, None)
    with pytest.raises(KeyeError, match=r"vision was finished with learning_rate = 0\.001, but the recipe says 1\.0"):
        check(load(recipe, ["vision.learning_rate=1.0"]), again, None)


def test_another_world_than_the_one_that_was_drawn_is_named(run, recipe):
    before = written(run)
    with pytest.raises(KeyeError, match=r"world was drawn with seed = 0, but data\.world says 1; take another --out"):
        run_distributed(go, 1, 300, recipe, run, ["data.world.seed=1"], None)
    assert written(run) == before


def test_only_the_families_that_differ_of_another_world_are_named(run, recipe):
    with pytest.raises(KeyeError) as caught:
        prepare_world(load(recipe, ["data.world.counts.count=5"]), run)
    assert "was drawn with counts = {'count': 4}, but data.world says {'count': 5}; take another --out" in str(
        caught.value
    )
    assert f"or remove {run}, with its trained stages, to start again" in str(caught.value)


@pytest.mark.parametrize("path", ["models/missing", "/nowhere"])
def test_a_model_path_that_is_missing_is_named_before_the_world_is_drawn(alone, recipe, tmp_path, path):
    with pytest.raises(KeyeError, match=f'model.path = "{path}" is not a model directory; create one with'):
        check(load(recipe, [f"model.path={path}"]), tmp_path / "run", None)


def test_a_run_that_cannot_be_written_is_named(recipe):
    with pytest.raises(KeyeError, match="the run cannot be written to /dev/null/x "):
        run_distributed(go, 1, 300, recipe, Path("/dev/null/x"), [], None)


def test_stage_after_one_that_was_trained_again_is_named(alone, run, recipe, tmp_path):
    again = tmp_path / "run"
    shutil.copytree(run, again)
    check(load(recipe), again, None)
    done = json.loads((again / "alignment" / "stage.json").read_text())
    (again / "alignment" / "stage.json").write_text(json.dumps({**done, "made": "again"}))
    with pytest.raises(KeyeError, match="annealing was trained from other weights than .*alignment has now; remove "):
        check(load(recipe), again, None)
    check(load(recipe), again, "alignment")
    shutil.rmtree(again / "alignment")  # to be trained again, which the annealing would not follow
    with pytest.raises(KeyeError, match="annealing was trained from other weights than"):
        check(load(recipe), again, None)


@pytest.mark.parametrize("content", ['{"steps": 2, "rec', "[]", ""])
def test_a_damaged_record_of_a_stage_or_a_world_is_named(alone, run, recipe, tmp_path, content):
    again = tmp_path / "run"
    shutil.copytree(run, again)
    (again / "alignment" / "stage.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"alignment/stage\.json: not .*; remove .*alignment to train"):
        check(load(recipe), again, None)
    (again / "world" / "world.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"world\.json: not .*; remove .*world to draw the world again"):
        prepare_world(load(recipe), again)


def test_a_report_that_cannot_be_written_does_not_end_the_run(tmp_path, capsys):
    (tmp_path / "report.html").mkdir()
    write_report(tmp_path)
    assert "the report was not written: the report cannot be written to" in capsys.readouterr().out


def test_a_stage_that_followed_another_is_not_the_first_of_a_run(alone, run, recipe):
    with pytest.raises(KeyeError, match="alignment was trained from other weights than the recipe's model; remove "):
        check(load(recipe, ["start=alignment"]), run, None)


def test_stage_before_must_be_there(alone, recipe, tmp_path):
    with pytest.raises(KeyeError, match="run the stage alignment before annealing, or begin with"):
        check(load(recipe), tmp_path / "run", "annealing")
    check(load(recipe), tmp_path / "run", "vision")


def test_start_begins_with_the_recipes_own_model_without_the_stages_before(alone, run, recipe, tmp_path):
    folder, pretrained = tmp_path / "run", run / "vision" / "model"
    own = [f"model.path={pretrained}", "start=alignment"]
    begun = load(recipe, own)
    assert list(begun.chain) == ["alignment", "annealing"] and begun.stages == list(STAGES)
    run_distributed(go, 1, 300, recipe, folder, own, "alignment")
    before, after = (load_file(path / "model.safetensors") for path in (pretrained, folder / "alignment" / "model"))
    frozen = {name: value for name, value in before.items() if not name.startswith("model.projector")}
    assert all(torch.equal(after[name], value) for name, value in frozen.items())
    check(begun, folder, None)
    check(begun, folder, "annealing")
    assert not (folder / "vision").exists()
    # Without the key the run would go back to stage 0, and the alignment would not follow from it.
    with pytest.raises(KeyeError, match="alignment was trained without vision; give --set start=alignment as before"):
        check(load(recipe, own[:1]), folder, None)
    with pytest.raises(KeyeError, match="run the stage vision before alignment, or .* by --set start=alignment"):
        check(load(recipe), tmp_path / "other", "alignment")


def test_command_of_the_8b_recipes_header_begins_without_stage_0(alone, tmp_path, monkeypatch):
    """The line as it stands there, beside a model and the manifests of the stages that it trains."""
    path = Path(stages.recipe.__file__).parent / "recipes" / "keye_8b.toml"
    line = next(line for line in path.read_text().splitlines() if "--stage alignment" in line)
    words = line.partition("keye_8b.toml")[2].split()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "models/keye-8b-start").mkdir(parents=True)
    (tmp_path / "models/keye-8b-start/config.json").write_text("{}")
    for name in ("caption", "ocr_vqa", "grounding_counting", "interleaved", "video"):
        (tmp_path / "data" / f"{name}.jsonl").write_text("{}\n")
    loaded = load(path, [word for flag, word in zip(words, words[1:], strict=False) if flag == "--set"])
    sources = tuple(dataclasses.replace(s, path=f"data/{Path(s.path).name}") for s in loaded.data.sources)
    loaded = dataclasses.replace(loaded, data=dataclasses.replace(loaded.data, sources=sources))
    only = words[words.index("--stage") + 1]
    monkeypatch.setattr(dist, "get_world_size", lambda: 8)
    check(loaded, tmp_path / "run", only)
    assert start_of(only, loaded, tmp_path / "run") == Path("models/keye-8b-start")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("annealing.encoder.max_tokens_per_frame=0", "max_tokens_per_frame is 0"),
        (
            "annealing.encoder.maximum=3",
            "unknown key annealing.encoder.maximum; use one of annealing.encoder.threshold",
        ),
        ("processor.image.maximum=3", "unknown key processor.image.maximum"),
        (
            "annealing.sequence_parallel=2",
            "annealing.sequence_parallel = 2 needs a multiple of 2 processes, and 1 was started; use torchrun",
        ),
        ("annealing.mixture={image = 0.5, text = 0.5}", "annealing.mixture names image"),
        ('data.sources=[{path = "gone.jsonl", kind = "text"}]', "gone.jsonl: no such manifest"),
    ],
)
def test_what_would_stop_a_later_stage_is_said_before_the_first(alone, recipe, tmp_path, override, said):
    with pytest.raises(KeyeError, match=said):
        check(load(recipe, [override]), tmp_path / "run", None)


def test_stage_that_the_recipe_has_not_is_named(recipe, tmp_path):
    with pytest.raises(KeyeError, match="the recipe has no stage multitask; it has vision, alignment, annealing"):
        pretrain(load(recipe), tmp_path / "run", "multitask")


def test_contexts_in_between_are_trained_one_after_the_other(run, recipe, tmp_path, capfd):
    again = tmp_path / "run"
    shutil.copytree(run, again)
    shutil.rmtree(again / "annealing")
    overrides = ["annealing.context_schedule={ 128 = 2 }", "annealing.keep_finished=true"]
    run_distributed(go, 1, 300, recipe, again, overrides, "annealing")
    steps = {name: json.loads((again / name / "stage.json").read_text()) for name in ("annealing-128", "annealing")}
    assert [done["steps"] for done in steps.values()] == [2, 1]
    assert steps["annealing"]["start"] == steps["annealing-128"]["made"]
    for name in steps:  # raised once, in the first
        config = KeyeForConditionalGeneration.from_pretrained(again / name / "model").config.text_config
        assert config.rope_parameters["rope_theta"] == 8e6
        assert [path.name for path in (again / name / "checkpoints").glob("step-*")] == [f"step-{steps[name]['steps']}"]
    assert "annealing-128: " in capfd.readouterr().out


@pytest.mark.slow
def test_two_processes_run_all_stages(recipe, tmp_path):
    path = tmp_path / "two.toml"
    path.write_text(recipe.read_text().replace("sequence_parallel = 1", "sequence_parallel = 2"))
    run_distributed(go, 2, 240, path, tmp_path / "run", [], None)
    assert all((tmp_path / "run" / stage / "stage.json").exists() for stage in STAGES)
