"""The demo's frame: what is done is not done again, what changed is, and a failed step says where it stopped."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from keye.errors import KeyeError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("demo_script", ROOT / "scripts" / "demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def walk(demo, run: Path, first: str, second: str) -> list[str]:
    """Two steps, the second after the first; which of them were run."""
    done: list[str] = []
    walked = demo.Demo(run, False, [])
    walked.step("one", "One", lambda: done.append("one"), inputs=first)
    walked.step("two", "Two", lambda: done.append("two"), after=("one",), inputs=second)
    return done


def test_a_step_runs_again_only_when_it_or_what_it_comes_after_changed(demo, tmp_path):
    assert walk(demo, tmp_path, "a", "b") == ["one", "two"]
    assert walk(demo, tmp_path, "a", "b") == []
    assert walk(demo, tmp_path, "a", "c") == ["two"]
    assert walk(demo, tmp_path, "z", "c") == ["one", "two"]


def test_a_step_that_failed_is_not_marked_as_done(demo, tmp_path):
    walked = demo.Demo(tmp_path, False, [])
    with pytest.raises(ZeroDivisionError):
        walked.step("one", "One", lambda: 1 // 0, inputs="a")
    assert walk(demo, tmp_path, "a", "b") == ["one", "two"]


def test_a_stopped_step_finds_what_it_left_unless_it_was_of_other_inputs(demo, tmp_path):
    def attempt(inputs: str) -> bool:
        """Whether the step found what an earlier attempt left; it always stops halfway."""
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
    walked = demo.Demo(tmp_path, False, [])
    with pytest.raises(KeyeError, match="bad ended with code 3, its output is in .*logs/bad.log"):
        walked.call("bad", "-c", "print('halfway'); raise SystemExit(3)")
    assert (tmp_path / "logs" / "bad.log").read_text() == "halfway\n"


def test_stream_gives_back_the_exit_code_and_both_outputs(demo, tmp_path):
    program = "import sys; print('out', flush=True); print('err', file=sys.stderr); sys.exit(5)"
    assert demo.stream([sys.executable, "-c", program], tmp_path / "log") == 5
    assert (tmp_path / "log").read_text() == "out\nerr\n"


def test_closing_table_says_what_was_learnt_and_what_was_not(demo, tmp_path):
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
