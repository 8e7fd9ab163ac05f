"""The reward `math` against known equalities, in a process that executes nothing a model wrote."""

import importlib.util
import sys
import threading
import time

import pytest

from keye.errors import KeyeError
from rl.rewards import Math, rewards_from
from rl.rewards.mathematics import expression
from tests.rl.rewards import faulty
from tests.rl.rewards.cases import judged, question

NEEDED = pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="needs the extra rewards")

EQUAL = [
    ("1/2", r"\frac{1}{2}"),
    ("0.5", "1/2"),
    (r"$\frac12$", "0.5"),
    (r"So \boxed{\frac{1}{2}}.", "0.5"),
    ("x+1", "1+x"),
    ("(x+1)^2", "x^2+2x+1"),
    ("2*sqrt(3)", r"2\sqrt{3}"),
    ("The answer is $3$.", "3"),
    ("x=3", "3"),
    (r"$\{1,2\}$", r"\{2,1\}"),
    ("(1,2)", "(1,2)"),
    ("pi/2", r"\frac{\pi}{2}"),
    ("1,000", "1000"),
    (r"\sin(x)^2+\cos(x)^2", "1"),
    ("2^{10}", "1024"),
    (r"\int_0^1 x dx", "1/2"),
    (r"\sum_{k=1}^{10} k", "55"),
    ("10^{-3}", "0.001"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
]
DIFFERENT = [
    ("4", "3"),
    ("$3$ or $4$", "3"),
    (r"\boxed{3} \boxed{4}", "3"),
    ("not $3$", "3"),
    (r"\infty", "3"),
    (r"\frac{0}{0}", "3"),
    ("nan", "3"),
    ("x", "3"),
    ("(1,2)", "(2,1)"),
    ("-3", "3"),
    (r"\{1,2,3,4\}", "3"),
    ("0.3333", "1/3"),
]


@pytest.fixture(scope="module")
def rewards():
    found = rewards_from({"math": {"time_limit": 2.0}})
    yield found
    found.workers.close()


@NEEDED
def test_equal_expressions_earn_and_others_do_not(rewards):
    earned = rewards.all([judged(question(truth), text) for text, truth in EQUAL + DIFFERENT])
    assert [one.total for one in earned] == [1.0] * len(EQUAL) + [0.0] * len(DIFFERENT)
    assert not any(one.failures for one in earned)
    assert "no mathematical expression" in rewards(judged(question("a long text"), "3")).failures["math"]


@NEEDED
def test_a_bomb_costs_its_time_limit_in_any_thread(rewards):
    prompt, found = question("3"), []
    texts = ["3", r"10^{10^{10}}", r"9^{9^{9^{9}}}", "3"]
    thread = threading.Thread(target=lambda: found.extend(rewards.all([judged(prompt, text) for text in texts])))
    began = time.monotonic()
    thread.start()  # math-verify's own limit is a signal, which this thread could not receive
    thread.join(60)
    assert [one.total for one in found] == [1, 0, 0, 1] and time.monotonic() - began < 30
    assert [one.failures.get("math", "") for one in found][1] == "it took longer than 2 s"


@NEEDED
def test_its_process_refuses_to_execute_text_and_to_touch_anything():
    assert faulty.Escape is not None
    rewards = rewards_from({"escape": 1.0})
    tries = ["eval", "exec", "sympify", "write", "os.open", "system", "popen", "fork", "remove", "connect"]
    earned = rewards.all([judged(question("3"), text) for text in tries])
    rewards_for_number = rewards(judged(question("3"), "number"))
    rewards.workers.close()
    assert {name for name, one in zip(tries, earned, strict=True) if one.total} == set()
    causes = [one.failures["escape"] for one in earned]
    assert all("refused" in cause or "no decimal number" in cause for cause in causes), causes
    assert rewards_for_number.total == 1.0


@NEEDED
def test_it_does_not_run_outside_its_process():
    with pytest.raises(RuntimeError, match="rewards_from"):
        Math()(judged(question("3"), "3"))


def test_without_the_library_it_names_the_extra(monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "meta_path", [])
    for name in ("math_verify", "antlr4"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(KeyeError, match=r"math_verify is not installed; run: pip install 'keye\[rewards\]'"):
        rewards_from({"math": 1.0})


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"so \boxed{a_{1}}, that is \boxed{a_{1}}", "a_{1}"),
        (r"\boxed{1} or \boxed{2}", None),
        (r"\boxed{1", None),
        ("The answer is $x$", "x"),
        ("perhaps $x$", None),
        ("sqrt(2)/2", r"\sqrt{2}/2"),
        ("three", None),
        ("2**(x+1)", "2^{x+1}"),
        ("", None),
        ("1" * 401, None),
    ],
)
def test_the_only_expression_of_an_answer(text, found):
    assert expression(text) == found
