"""`keye reasoning` as a process: killed and repeated, with a cost ceiling, and with wrong input."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from keye.errors import KeyeError
from rl.commands.reasoning import _parser, _policy, main
from rl.endpoint import CostCeiling
from tests.rl.endpoint.fake_server import served
from tests.rl.reasoning.questions import number_of, rows, spelled, write_questions

ROOT = Path(__file__).resolve().parents[3]


def start(url, *words):
    """The command as a process of its own."""
    environment = {**os.environ, "KEYE_GENERATOR_URL": url, "KEYE_GENERATOR_MODEL": "big", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "scripts/reasoning.py", *map(str, words)], cwd=ROOT, env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.fixture
def call(monkeypatch):
    """Runs the command in this process; returns its exit code."""

    def run(url, *words):
        monkeypatch.setenv("KEYE_GENERATOR_URL", url)
        monkeypatch.setenv("KEYE_GENERATOR_MODEL", "big")
        monkeypatch.setattr(sys, "argv", ["keye reasoning", *map(str, words)])
        return main()

    return run


def thinking(request, _):
    time.sleep(0.01 * (request["seed"] % 3))
    text = f"<think>Number {number_of(request)}.\nSample {request['seed']}.</think><answer>blue</answer>"
    return spelled(text, (-0.5, -0.25 * request["seed"]))


def test_a_killed_step_writes_the_same_file_when_it_is_repeated_and_asks_nothing_twice(tmp_path, call):
    source = write_questions(tmp_path, 24, clip=False)
    answered, lock, enough = [], threading.Lock(), threading.Event()

    def counting(request, handler):
        answer = thinking(request, handler)
        with lock:
            answered.append(1)
            if len(answered) == 20:
                enough.set()
        return answer

    words = ("--paths", 3, "--concurrency", 2)
    with served(thinking) as fake:
        assert call(fake.url, "generate", source, tmp_path / "whole" / "paths.jsonl", *words) == 0
    with served(counting) as fake:
        out = tmp_path / "killed" / "paths.jsonl"
        first = start(fake.url, "generate", source, out, *words)
        assert enough.wait(200)
        first.send_signal(signal.SIGKILL)
        first.wait()
        assert not out.exists()
        with (out.parent / "paths.jsonl.partial").open("ab") as file:
            file.write(b'{"lines": [{"id": "cut')  # as if killed while writing
        assert call(fake.url, "generate", source, out, *words) == 0
    assert out.read_bytes() == (tmp_path / "whole" / "paths.jsonl").read_bytes()
    assert len(answered) <= 24 * 3 + 2 and len(rows(out)) == 24


def test_the_ceiling_stops_with_a_sentence_and_a_higher_one_continues(tmp_path, call):
    source, out = write_questions(tmp_path, 6, clip=False), tmp_path / "paths.jsonl"
    words = ("generate", source, out, "--paths", 2, "--tokens", 1000, "--completion-price", 1000, "--concurrency", 1)
    with served(thinking) as fake:
        with pytest.raises(CostCeiling, match="of the cost ceiling 1.02 is spent"):
            call(fake.url, *words, "--max-cost", 1.02)  # 1 is reserved for each, 0.005 is used
        done = len(fake.requests)
        assert 0 < done < 12 and not out.exists()
        assert call(fake.url, *words, "--max-cost", 10) == 0
        assert len(fake.requests) == 12 and len(rows(out)) == 6


@pytest.mark.parametrize("text", ["1:2", "1:1,2:1,3:1,4:1,5:x", "1:1,2:1,3:1,4:1,5:-1", "1:1,1:1,2:1,3:1,4:1,5:1", ""])
def test_a_policy_that_is_none_is_refused(text):
    with pytest.raises(KeyeError, match="--repeat"):
        _policy(text)


def test_the_output_is_not_the_input(tmp_path, monkeypatch):
    source = write_questions(tmp_path, 1, clip=False)
    monkeypatch.setattr(sys, "argv", ["keye reasoning", "grade", str(source), str(source)])
    with pytest.raises(KeyeError, match="also the input"):
        main()


@pytest.mark.parametrize("step", ["enhance", "generate", "grade", "review", "score"])
def test_the_help_of_each_step_has_examples_that_its_parser_accepts(step, capsys):
    with pytest.raises(SystemExit) as ended:
        _parser().parse_args([step, "--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0 and "examples:" in text
    commands = [line.split("keye reasoning ", 1)[1] for line in text.splitlines() if "keye reasoning " in line]
    assert len(commands) >= 3
    for command in commands:
        assert _parser().parse_args(command.split()).step == step
