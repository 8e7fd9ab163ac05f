"""Served answers follow the weights that the run gives to the servers, and no others; two ranks train with them."""

import copy
import dataclasses
import json
import threading

import pytest
import torch

from keye.errors import KeyeError, RecipeError
from keye.inference.answerer import Answerer
from keye.inference.chat import load_model
from keye.inference.openai_format import Access
from keye.inference.reloading import Reloading
from rl.questions.heldout import Answered
from rl.questions.prompts import load_prompts
from rl.recipe import load
from rl.rollout import InProcessRollout
from rl.rollout.config import Rollout
from rl.rollout.served import Served, ServedRollout
from tests.distributed import free_port, run_distributed
from tests.keye.inference.served import serving
from tests.rl.test_trainer import GSPO, RECIPE, make_run, train


def changed(model):
    """A copy with other weights."""
    other, numbers = copy.deepcopy(model), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=numbers)
    return other.eval()


def serve(model, processor, folder=None, port=0, **more):
    """A server with a copy of the model, so that it has weights of its own."""
    answerer = Answerer(copy.deepcopy(model).eval(), processor, "tiny", **more)
    return serving(answerer, Access(), key="secret", reload_from=folder, port=port)


def connected(address, processor, log=None, **more):
    server = Served(f"http://{address[0]}:{address[1]}/v1", "tiny", "secret", patience=20.0, appears=0.2)
    return ServedRollout(server, processor, log, **more)


def tokens(engine, samples, temperature=0.0, count=1, keys=None):
    return [[c.tolist() for c in group.completions] for group in engine.generate(samples, count, temperature, 8, keys)]


def test_answers_follow_the_weights_also_of_a_server_that_is_started_again(model, processor, prompts, tmp_path):
    other, said = changed(model), []
    other.save_pretrained(tmp_path / "mine-1")
    wanted = tokens(InProcessRollout(other, processor), prompts)
    first, port = tokens(InProcessRollout(model.eval(), processor), prompts), free_port()
    assert wanted != first
    with serve(model, processor, tmp_path, port) as address:
        engine = connected(address, processor, said.append)
        assert tokens(engine, prompts) == first
        engine.expect("mine-1")
        engine.load("mine-1")
        assert tokens(engine, prompts) == wanted and not said
    with serve(model, processor, tmp_path, port):
        assert tokens(engine, prompts) == wanted
    assert any("was started again" in text for text in said)


def test_answers_of_other_weights_are_refused(model, processor, prompts, tmp_path, monkeypatch):
    for version in ("mine-1", "other-1"):
        changed(model).save_pretrained(tmp_path / version)
    with serve(model, processor, tmp_path) as address:
        engine = connected(address, processor)
        engine.expect("mine-1")
        engine.load("mine-1")
        connected(address, processor).load("other-1")
        with pytest.raises(KeyeError, match="the weights other-1, not with mine-1: another run uses it"):
            engine.generate(prompts, 2, 1.0, 4)
    monkeypatch.setattr(Reloading, "__call__", lambda self, version: None)  # a server that does not load
    with serve(model, processor, tmp_path) as address:
        engine = connected(address, processor)
        engine.expect("mine-1")
        with pytest.raises(KeyeError, match="the weights start, not with mine-1: it does not load new ones"):
            engine.generate(prompts[2:], 1, 1.0, 4)


def test_a_server_that_cannot_load_is_named_with_the_remedy(model, processor, tmp_path):
    with serve(model, processor) as address, pytest.raises(KeyeError, match="keye serve --allow-reload"):
        connected(address, processor).load("mine-1")
    with (
        serve(model, processor, tmp_path) as address,
        pytest.raises(KeyeError, match="does not see the weights mine-1"),
    ):
        connected(address, processor).load("mine-1")


def test_the_whole_distribution_is_sampled_and_answers_end_as_in_process(model, processor, prompts):
    model.generation_config.top_k = 1  # the server's default for other clients
    with serve(model, processor) as address:
        rows = tokens(connected(address, processor), prompts[:1], 1.0, 4, [(1,)])[0]
        assert len({tuple(row) for row in rows}) > 1
        local = InProcessRollout(model.eval(), processor).generate(prompts[:1], 1, 0.0, 8)[0].completions[0].tolist()
        end = next(token for token in local[2:] if token not in local[:2])
        engine = connected(address, processor, ends=[end])
        group = engine.generate(prompts[:1], 1, 0.0, 8)[0]
    wanted = InProcessRollout(model, processor, stop_tokens=[end]).generate(prompts[:1], 1, 0.0, 8)[0]
    assert group.completions[0].tolist() == wanted.completions[0].tolist() and group.finished == [True]


def test_an_answer_that_the_server_cuts_is_an_error(model, processor, prompts):
    with serve(model, processor, most_tokens=2) as address:
        with pytest.raises(KeyeError, match="after 2 of 8 tokens; start keye serve with --max-new-tokens 8"):
            connected(address, processor).generate(prompts[:1], 1, 0.0, 8)


def test_prompts_are_spread_over_the_servers(model, processor, prompts):
    with serve(model, processor) as one, serve(changed(model), processor) as other:
        servers = [connected(address, processor).connections[0].server for address in (one, other)]
        found = tokens(ServedRollout(servers, processor, first=1), prompts)
    engines = [InProcessRollout(m, processor) for m in (changed(model), model.eval())]
    assert found == [tokens(engines[place % 2], [sample])[0] for place, sample in enumerate(prompts)]


def test_what_a_served_recipe_cannot_have_is_refused_before_the_run(monkeypatch):
    given = ['rollout.engine="served"', "rollout.top_k=5"]
    with pytest.raises(RecipeError, match="needs top_p = 1 and top_k = 0"):
        load("rl/recipes/tiny.toml", given)
    with pytest.raises(RecipeError, match=r"set heldout\.temperature to 1"):
        load("rl/recipes/tiny.toml", [*given[:1], "heldout.temperature=0.7"])
    monkeypatch.delenv("KEYE_ROLLOUT_URL", raising=False)
    with pytest.raises(RecipeError, match=r"rollout\.urls or the variable KEYE_ROLLOUT_URL"):
        Rollout(engine="served").servers()
    monkeypatch.setenv("KEYE_ROLLOUT_URL", "http://a/v1, http://b/v1")
    monkeypatch.setenv("KEYE_ROLLOUT_KEY", "secret")
    found = [(one.url, one.api_key) for one in Rollout(engine="served").servers()]
    assert found == [("http://a/v1", "secret"), ("http://b/v1", "secret")]
    assert Rollout(engine="served", urls=("http://c/v1",), model="m").servers()[0].model == "m"


def test_two_ranks_train_with_a_server_that_is_started_again_in_the_middle(tmp_path, monkeypatch):
    """The sampler agrees with the trainer in every step, and the last answers are those of the trained model."""
    run, port, loaded, restart = make_run(tmp_path), free_port(), [], threading.Event()
    start = load_model(run / "annealing/model", "cpu", "float32")
    first = Reloading._load

    def counted(reloading, version, folder):
        first(reloading, version, folder)
        loaded.append(version.rpartition("-")[2])
        if loaded == ["0", "1"]:
            restart.set()

    def serve_twice():
        for event in (restart, done):
            with serve(*start, run / "gspo/policy", port, batch=4, waiting=60):
                event.wait(200)

    monkeypatch.setattr(Reloading, "_load", counted)
    monkeypatch.setenv("KEYE_ROLLOUT_URL", f"http://127.0.0.1:{port}/v1")
    monkeypatch.setenv("KEYE_ROLLOUT_KEY", "secret")
    done = threading.Event()
    server = threading.Thread(target=serve_twice)
    server.start()
    options = {"steps": 3, "max_new_tokens": 8, "truncated": "penalise", "learning_rate": 1e-2}
    stops = Rollout(engine="served", stop_tokens=tuple("0123456789"))
    recipe = dataclasses.replace(RECIPE, gspo=dataclasses.replace(GSPO, **options), rollout=stops)
    try:
        run_distributed(train, 2, 300, run, recipe)
    finally:
        restart.set()
        done.set()
        server.join(30)
    rows = [json.loads(line) for line in (run / "gspo/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3] and rows[1]["grad_norm"] > 0
    assert all(row["sampler_difference_max"] < 1e-4 for row in rows), [row["sampler_difference_max"] for row in rows]
    # The second server loads "1" again only if the first one ends before it has answered the second step.
    assert loaded[:2] == ["0", "1"] and {"2", "3"} <= set(loaded[2:]) <= {"1", "2", "3"}
    assert not list(run.glob("gspo/policy/*"))
    trained = load_model(run / "gspo/model", "cpu", "float32")
    answers = [Answered(**json.loads(line)) for line in (run / "gspo/after.jsonl").read_text().splitlines()]
    assert len(answers) == 4
    questions = {prompt.id: prompt for prompt in load_prompts(run / "world/heldout.jsonl").prompts}
    samples = [trained[1].sample(questions[one.id].messages, add_generation_prompt=True) for one in answers]
    for model, same in ((trained, True), (start, False)):
        ends = [trained[1].tokenizer.convert_tokens_to_ids(digit) for digit in "0123456789"]
        groups = InProcessRollout(*model, stop_tokens=ends).generate(samples, 1, 0.0, 8)
        assert ([group.texts[0] for group in groups] == [one.text for one in answers]) is same
