"""The steps of the demo: finished steps are skipped, changed steps run again, and a failed step names its log."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from keye.errors import KeyeError
from scripts.bench.demo import seeds_of
from stages.recipe import load
from stages.typed_toml import to_toml

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("demo_script", ROOT / "scripts" / "demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_steps(demo, run: Path, first: str, second: str) -> list[str]:
    """Run two dependent steps and return the names of those that ran."""
    done: list[str] = []
    steps = demo.Demo(run, False, [])
    steps.step("one", "One", lambda: done.append("one"), inputs=first)
    steps.step("two", "Two", lambda: done.append("two"), after=("one",), inputs=second)
    return done


def test_a_step_runs_again_only_if_it_or_a_previous_step_changed(demo, tmp_path):
    assert run_steps(demo, tmp_path, "a", "b") == ["one", "two"]
    assert run_steps(demo, tmp_path, "a", "b") == []
    assert run_steps(demo, tmp_path, "a", "c") == ["two"]
    assert run_steps(demo, tmp_path, "z", "c") == ["one", "two"]


def test_a_step_that_failed_is_not_marked_as_done(demo, tmp_path):
    steps = demo.Demo(tmp_path, False, [])
    with pytest.raises(ZeroDivisionError):
        steps.step("one", "One", lambda: 1 // 0, inputs="a")
    assert run_steps(demo, tmp_path, "a", "b") == ["one", "two"]


def test_an_interrupted_step_finds_its_output_unless_the_inputs_changed(demo, tmp_path):
    def attempt(inputs: str) -> bool:
        """Whether the step found the output of an earlier attempt. It is always interrupted."""
        left, found = tmp_path / "gspo" / "checkpoint", []

        def action() -> None:
            found.append(left.exists())
            left.parent.mkdir(exist_ok=True)
            left.touch()
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            demo.Demo(tmp_path, False, []).step("gspo", "GSPO", action, inputs=inputs, leaves=("gspo",))
        return found[0]

    assert [attempt("a"), attempt("a"), attempt("b")] == [False, True, False]


def test_output_is_kept_and_a_failure_names_the_log(demo, tmp_path):
    steps = demo.Demo(tmp_path, False, [])
    with pytest.raises(KeyeError, match="bad ended with code 3, its output is in .*logs/bad.log"):
        steps.call("bad", "-c", "print('halfway'); raise SystemExit(3)")
    assert (tmp_path / "logs" / "bad.log").read_text() == "halfway\n"


def test_stream_returns_the_exit_code_and_copies_both_outputs(demo, tmp_path):
    program = "import sys; print('out', flush=True); print('err', file=sys.stderr); sys.exit(5)"
    assert demo.stream([sys.executable, "-c", program], tmp_path / "log") == 5
    assert (tmp_path / "log").read_text() == "out\nerr\n"


def test_closing_table_shows_which_families_were_learnt(demo, tmp_path):
    (tmp_path / "evaluation").mkdir()
    families = {"count": (0.9, 0.2), "motion": (0.27, 0.25)}
    for name, which in (("annealing", 0), ("annealing_blind", 1), ("annealing_zeroed", 1)):
        report = {
            family: {"n": 100, "accuracy": shares[which], "stderr": 0.04, "chance": 0.25, "majority": 0.3}
            for family, shares in families.items()
        }
        (tmp_path / "evaluation" / f"{name}.json").write_text(json.dumps({"families": report}))
    table = demo.closing_table(tmp_path).splitlines()
    assert table[1].split()[0] == "count" and table[1].endswith("yes")
    assert table[2].split()[0] == "motion" and table[2].endswith("no")
    assert "1 of 2 families" in table[4]


@pytest.mark.parametrize(("seed", "chosen"), [(7, False), (1, True)])
def test_the_document_states_the_seeds_of_the_runs_recipe(tmp_path, seed, chosen):
    recipe = load(ROOT / "stages/recipes/tiny.toml", [f"data.world.seed={seed}", "seed=5"])
    (tmp_path / "recipe.toml").write_text(to_toml(recipe))
    line = seeds_of(tmp_path)
    assert line.startswith(f"- Seeds: recipes 5, world {seed}. ") and ("this one among them" in line) == chosen
