"""A run goes on from what it was begun with, file by file; what it is asked afterwards is compared with its start."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch.distributed as dist

from keye.errors import CheckpointError, KeyeError, RecipeError
from rl.recipe import load
from rl.rewards import Judgement, register
from rl.run.identity import claim, identity
from rl.trainer import GspoTrainer
from stages.distributed import engine
from tests.distributed import run_distributed
from tests.rl.test_trainer import GSPO, RECIPE, make_run

FILES = (
    "world/train.jsonl",
    "world/heldout.jsonl",
    "annealing/model/tokenizer.json",
    "annealing/model/tokenizer_config.json",
    "annealing/model/chat_template.jinja",
    "annealing/model/preprocessor_config.json",
    "annealing/model/config.json",
    "annealing/model/model.safetensors",
)


@register("variety")
class Variety:
    """Different letters of an answer: unlike for almost any two answers, so that a step moves the weights."""

    in_process = True

    def __call__(self, judgement: Judgement) -> float:
        return len(set(judgement.text)) + len(judgement.text) / 100


def recipe_of(steps: int, rewards: str = "format", **changes: object):
    return dataclasses.replace(RECIPE, gspo=dataclasses.replace(GSPO, steps=steps, **changes), rewards={rewards: 1.0})


def train(run: Path, recipe) -> GspoTrainer:
    engine.start(threads=1)
    trainer = GspoTrainer(recipe, run)
    trainer.train()
    return trainer


def refusal(run: Path, recipe) -> str:
    with pytest.raises(KeyeError) as caught:
        train(run, recipe)
    return f"{type(caught.value).__name__}: {caught.value}"


def changed(path: Path) -> bytes:
    """Other contents of the same size: a digit or letter in the middle of the file is another one."""
    whole = path.read_bytes()
    at = next(i for i in range(len(whole) // 2, len(whole)) if chr(whole[i]).isalnum())
    return whole[:at] + (b"7" if whole[at : at + 1] != b"7" else b"8") + whole[at + 1 :]


def with_each_file_changed(run: Path) -> dict[str, str]:
    train(run, recipe_of(1))
    said = {}
    for name in FILES:
        before = (run / name).read_bytes()
        (run / name).write_bytes(changed(run / name))
        said[name] = refusal(run, recipe_of(2))
        (run / name).write_bytes(before)
    train(run, recipe_of(2))
    return said


def test_a_file_that_changed_since_the_run_began_is_named_with_the_remedy(tmp_path):
    run = make_run(tmp_path)
    [said] = run_distributed(with_each_file_changed, 1, 240, run)
    for name, text in said.items():
        assert text.startswith("CheckpointError") and str(run / name) in text, text
        assert f"remove {run / 'gspo'}" in text, text
    rows = (run / "gspo/metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2]


def with_torn_records(run: Path) -> list[str]:
    train(run, recipe_of(1))
    record, said = run / "gspo/run.json", []
    whole = record.read_text()
    for text in (whole[:40], "", "{}", "[]", '{"recipe": 3, "files": []}', '{"start": "ab", "recipe": {}}'):
        record.write_text(text)
        said.append(refusal(run, recipe_of(2)))
    record.write_text(whole)
    # A line that a killed process left unfinished.
    with (run / "gspo/metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "lo')
    train(run, recipe_of(2))
    return said


def test_a_torn_record_of_the_run_is_an_error_with_a_remedy(tmp_path):
    run = make_run(tmp_path)
    [said] = run_distributed(with_torn_records, 1, 240, run)
    for text in said:
        assert text.startswith("CheckpointError") and "run.json" in text and "remove" in text, text
    rows = (run / "gspo/metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2]


def with_a_record_of_before(run: Path) -> str:
    """The recorded recipe has the former names of keys, and lacks keys that recipes did not have then."""
    train(run, recipe_of(1))
    record = run / "gspo/run.json"
    whole = json.loads(record.read_text())
    former = {"gspo.group_size": "gspo.group", "gspo.decode_batch_size": "gspo.decode_batch"}
    former["gspo.max_grad_norm"] = "gspo.clip"
    recipe = {former.get(key, key): value for key, value in whole["recipe"].items()}
    for key in ("gspo.schedule", "gspo.keep_checkpoints", "trackers"):
        del recipe[key]
    record.write_text(json.dumps({**whole, "recipe": recipe}))
    other = refusal(run, recipe_of(2, group_size=4))
    train(run, recipe_of(2))
    return other


def test_a_run_with_former_keys_is_resumed(tmp_path):
    run = make_run(tmp_path)
    [other] = run_distributed(with_a_record_of_before, 1, 240, run)
    assert "gspo.group_size = 3, but the recipe says 4" in other
    rows = (run / "gspo/metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2]


def without_its_first_measure(run: Path) -> list[str]:
    recipe = [recipe_of(steps, "variety", learning_rate=0.1) for steps in (1, 2, 3)]
    train(run, recipe[0])
    path = run / "gspo/before.jsonl"
    texts = [path.read_text(), (run / "gspo/after.jsonl").read_text()]
    path.unlink()
    train(run, recipe[1])
    texts.append(path.read_text())
    path.write_text(texts[0][:50])
    train(run, recipe[2])
    return [*texts, path.read_text()]


def test_a_first_measure_that_is_lost_is_taken_again_with_the_start_model(tmp_path):
    [(first, tuned, again, torn)] = run_distributed(without_its_first_measure, 1, 240, make_run(tmp_path))
    assert first != tuned  # the weights have moved
    assert again == first and torn == first


def node_without_the_first_measure(run: Path) -> int:
    """Rank 1 sees a copy of the run without before.jsonl, as on a shared file system that is late."""
    train(run, recipe_of(1))
    other = run.with_name("node1")
    if dist.get_rank() == 1:
        shutil.copytree(run, other)
        (other / "gspo/before.jsonl").unlink()
    dist.barrier()
    return train(other if dist.get_rank() else run, recipe_of(2)).step


def test_the_first_rank_says_whether_there_is_a_first_measure(tmp_path):
    assert run_distributed(node_without_the_first_measure, 2, 90, make_run(tmp_path / "node0")) == [2, 2]


def nodes_that_differ(run: Path) -> list[str]:
    """Each rank has a copy of its own; on rank 1 one thing differs."""
    rank, said = dist.get_rank(), []
    own = run if rank == 0 else run.with_name("node1")
    if rank == 1:
        shutil.copytree(run, own)
    for name in ("world/train.jsonl", "annealing/model/tokenizer.json"):
        before = (own / name).read_bytes()
        if rank == 1:
            (own / name).write_bytes(changed(own / name))
        said.append(refusal(own, recipe_of(1)))
        (own / name).write_bytes(before)
    said.append(refusal(own, recipe_of(1, learning_rate=1e-3 * (rank + 1))))
    if rank == 1:
        shutil.rmtree(own / "annealing")
    said.append(refusal(own, recipe_of(1)))
    return said


def test_what_differs_between_ranks_is_named_on_all_of_them(tmp_path):
    said = run_distributed(nodes_that_differ, 2, 90, make_run(tmp_path / "node0"))
    assert said[0] == said[1]
    manifest, tokenizer, rate, gone = said[0]
    assert "world/train.jsonl" in manifest and "rank 1" in manifest
    assert "annealing/model/tokenizer.json" in tokenizer and "rank 1" in tokenizer
    assert "gspo.learning_rate" in rate and "0.002" in rate
    assert "node1/annealing/model" in gone


def wrong_places(run: Path) -> list[str]:
    train(run, recipe_of(2))
    return [refusal(run / "annealing", recipe_of(1)), refusal(run, recipe_of(1)), refusal(run, recipe_of(3, start="x"))]


def test_wrong_folders_and_fewer_steps_are_said_plainly(tmp_path):
    [(stage, fewer, missing)] = run_distributed(wrong_places, 1, 120, make_run(tmp_path / "run"))
    assert f"--out {tmp_path / 'run'}" in stage
    assert "2 steps" in fewer and "gspo.steps = 1" in fewer
    assert "annealing" in missing and "gspo.start" in missing
    with pytest.raises(RecipeError, match="gspo.start"):
        load(Path(__file__).parents[2] / "rl/recipes/tiny.toml", ["gspo.start=gspo"])


def one_bad_line(run: Path) -> dict:
    for name in ("train", "heldout"):
        if dist.get_rank() == 0:
            with (run / f"world/{name}.jsonl").open("a") as file:
                file.write('{"answer": 3, "messages": [{"role": "user", "content": "?"}]}\n')
    dist.barrier()
    train(run, recipe_of(1))
    return json.loads((run / "gspo/metrics.jsonl").read_text())


def test_a_line_that_is_left_out_is_counted_once_on_any_number_of_processes(tmp_path):
    run = make_run(tmp_path)
    rows = run_distributed(one_bad_line, 2, 120, run)
    assert rows[0]["rejected"] == 2
    rejected = json.loads((run / "gspo/eval.json").read_text())["rejected"]
    assert set(rejected) == {f"{run}/world/train.jsonl:10", f"{run}/world/heldout.jsonl:6"}
    assert "answer" in next(iter(rejected.values()))


@pytest.mark.parametrize("schedule, refused", [("constant", False), ("cosine", True)])
def test_the_number_of_steps_may_change_only_with_a_constant_learning_rate(tmp_path, schedule, refused):
    run = make_run(tmp_path)
    before, now = (identity(run, recipe_of(steps, schedule=schedule), {}) for steps in (2, 3))
    out = run / "gspo"
    claim(out, run, before)
    (out / "checkpoints/step-2").mkdir(parents=True)
    if refused:
        with pytest.raises(CheckpointError, match="gspo.steps = 2, but the recipe says 3; gspo.schedule = 'cosine'"):
            claim(out, run, now)
    else:
        claim(out, run, now)


def test_a_finished_run_without_its_checkpoints_is_not_begun_again(tmp_path):
    run = make_run(tmp_path)
    out, now = run / "gspo", identity(run, recipe_of(2), {})
    claim(out, run, now)
    (out / "eval.json").write_text("{}")
    with pytest.raises(CheckpointError, match=rf"eval.json is of a finished run, .*remove {out} to train again"):
        claim(out, run, now)
    (out / "checkpoints/step-2").mkdir(parents=True)
    claim(out, run, now)
