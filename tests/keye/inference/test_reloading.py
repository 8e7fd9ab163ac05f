"""New weights for a running server: from one folder, with the key, between two replies."""

import json
import shutil
import threading
import time

import pytest
import torch

from keye.cli import main
from keye.inference.answerer import Answerer
from keye.inference.chat import Chat, Sampling, load_model
from keye.inference.openai_format import Access
from tests.keye.inference.served import ask, serving, until, user, words
from tests.keye.inference.talk import tiny_directory

KEY = {"Authorization": "Bearer secret"}
QUESTION = "Which colour comes first?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`start`, and the permitted folder `policy` with the version `new` and others that do not fit."""
    path = tmp_path_factory.mktemp("reload")
    tiny_directory(path / "start")
    tiny_directory(path / "policy" / "layers", num_hidden_layers=2)
    model, processor = load_model(path / "start", "cpu", "float32")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.language_model.layers.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    for place in ("policy/new", "policy/cut", "outside"):
        model.save_pretrained(path / place)
        processor.save_pretrained(path / place)
    (path / "policy/linked").symlink_to(path / "outside")
    shutil.copytree(path / "policy/new", path / "policy/inner")
    (path / "policy/inner/model.safetensors").unlink()
    (path / "policy/inner/model.safetensors").symlink_to(path / "outside/model.safetensors")
    weights = path / "policy/cut/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    return path


@pytest.fixture
def served(folder):
    answerer = Answerer(*load_model(folder / "start", "cpu", "float32"), "tiny", batch=4)
    with serving(answerer, Access(), key="secret", reload_from=folder / "policy") as address:
        yield answerer, address


def reload(address, version, headers=KEY):
    status, _, text = ask(address, {"version": version}, headers, path="/v1/reload")
    return status, json.loads(text)


def answer(address, tokens=24):
    status, _, text = ask(address, user(words(QUESTION), max_tokens=tokens), KEY)
    assert status == 200, text
    given = json.loads(text)
    return given["system_fingerprint"], given["choices"][0]["message"]["content"]


def expected(directory, tokens=24):
    return "".join(p.text for p in Chat(*load_model(directory), sampling=Sampling(tokens)).ask(QUESTION))


def test_a_reply_in_progress_keeps_its_weights_and_later_ones_have_the_new_ones(served, folder, monkeypatch):
    answerer, address = served
    forward, order, found = answerer.engine._forward, [], {}

    def slow():
        time.sleep(0.02)
        forward()

    monkeypatch.setattr(answerer.engine, "_forward", slow)

    def work(name, action):
        found[name] = action()
        order.append(name)

    threads = [threading.Thread(target=work, args=("first", lambda: answer(address)))]
    threads[0].start()
    until(lambda: answerer.engine._rows)
    threads.append(threading.Thread(target=work, args=("reload", lambda: reload(address, "new"))))
    threads[1].start()
    until(lambda: answerer.engine._actions or "reload" in found)
    threads.append(threading.Thread(target=work, args=("second", lambda: answer(address))))
    threads[2].start()
    for thread in threads:
        thread.join(60)
    assert order[0] == "first" and found["reload"] == (200, {"version": "new"})
    assert found["first"] == ("start", expected(folder / "start"))
    assert found["second"] == ("new", expected(folder / "policy/new"))
    assert found["first"][1] != found["second"][1]


@pytest.mark.parametrize(
    ("version", "status", "code"),
    [
        ("../outside", 400, "invalid_request"),
        ("", 400, "invalid_request"),
        ("..", 400, "invalid_request"),
        (3, 400, "invalid_request"),
        ("linked", 403, "not_allowed"),
        ("inner", 403, "not_allowed"),
        ("absent", 404, "no_version"),
        ("cut", 409, "damaged"),
        ("layers", 409, "other_model"),
    ],
)
def test_what_may_not_be_loaded_changes_nothing(served, version, status, code):
    answerer, address = served
    before = [parameter.clone() for parameter in answerer.model.parameters()]
    found = reload(address, version)
    assert (found[0], found[1]["error"]["code"]) == (status, code)
    assert answerer.engine.weights == "start"
    assert all(torch.equal(a, b) for a, b in zip(before, answerer.model.parameters(), strict=True))


def test_a_shard_of_an_index_outside_the_folder_is_refused(served, folder):
    names = list(served[0].model.state_dict())
    place = folder / "policy/index"
    shutil.copytree(folder / "policy/new", place, dirs_exist_ok=True)
    (place / "model.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(names, "../../outside/model.safetensors")}
    (place / "model.safetensors.index.json").write_text(json.dumps(index))
    assert reload(served[1], "index")[0] == 403


def test_the_key_is_needed_and_the_route_is_off_by_default(served, folder, monkeypatch, capsys):
    assert reload(served[1], "new", {})[0] == reload(served[1], "new", {"Authorization": "Bearer other"})[0] == 401
    with serving(served[0], Access(), key="secret") as address:
        status, given = reload(address, "new")
        assert status == 404 and given["error"]["code"] == "not_found"
    monkeypatch.delenv("KEYE_API_KEY", raising=False)
    assert main(["serve", str(folder / "start"), "--allow-reload", str(folder)]) != 0
    assert "--allow-reload needs an API key" in capsys.readouterr().err


def test_a_load_that_fails_midway_answers_nothing_until_another_succeeds(served, monkeypatch):
    from keye.checkpoint.shards import Stored

    answerer, address = served
    mapped, count = Stored.mapped, iter(range(1000))

    def failing(stored):
        if next(count) == 5:
            raise OSError("the disk is gone")
        return mapped(stored)

    monkeypatch.setattr(Stored, "mapped", failing)
    assert reload(address, "new")[0] == 500
    status, _, text = ask(address, user(words(QUESTION), max_tokens=2), KEY)
    assert status == 500 and "load them again" in text
    assert reload(address, "new")[0] == 200 and answer(address, 2)[0] == "new"
