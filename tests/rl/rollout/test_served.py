"""Rollouts by a real server in this process: the plan arrives, tokens are those of the engine here, failures wait."""

import socket
import threading

import pytest
import torch

from keye.errors import KeyeError
from keye.inference.answerer import Answerer
from keye.inference.openai_format import Access
from rl.policy.scoring import score
from rl.rollout import InProcessRollout
from rl.rollout.messages import messages_of
from rl.rollout.served import Served, ServedRollout
from tests.keye.inference.served import serving, until


@pytest.fixture
def server(model, processor):
    model.eval()
    answerer = Answerer(model, processor, "tiny")
    with serving(answerer, Access()) as (host, port):
        yield Served(f"http://{host}:{port}/v1", "tiny", patience=5.0)


def test_greedy_tokens_and_log_probs_are_those_of_the_engine_in_process(server, model, processor, prompts):
    served = ServedRollout(server, processor).generate(prompts, 2, 0.0, 8)
    local = InProcessRollout(model, processor).generate(prompts, 2, 0.0, 8)
    for one, other in zip(served, local, strict=True):
        assert [row.tolist() for row in one.completions] == [row.tolist() for row in other.completions]
        assert one.finished == other.finished and one.texts == other.texts and one.sample is other.sample
        for a, b in zip(one.log_probs, other.log_probs, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


def test_sampled_log_probs_are_those_of_training_and_follow_the_keys(server, model, processor, prompts):
    engine = ServedRollout(server, processor)
    first, again = (engine.generate(prompts[:1], 3, 1.0, 5, [(4,)]) for _ in range(2))
    assert [c.tolist() for c in first[0].completions] == [c.tolist() for c in again[0].completions]
    assert len({tuple(c.tolist()) for c in first[0].completions}) == 3
    scored = score(model, first, 1.0).log_probs.detach()
    torch.testing.assert_close(scored, torch.cat(first[0].log_probs), atol=1e-4, rtol=0)


def test_a_server_that_loses_frames_is_an_error(server, processor, prompts, monkeypatch):
    def without_last_frame(sample, processor):
        messages = messages_of(sample, processor)
        for part in messages[-1]["content"]:
            if part["type"] == "video_plan":
                part.update(type="text", text="a video")
        return messages

    monkeypatch.setattr("rl.rollout.served.messages_of", without_last_frame)
    with pytest.raises(KeyeError, match="with 0 visual ones, but the plan has .* frames were lost"):
        ServedRollout(server, processor).generate(prompts[:1], 1, 0.0, 2)


def test_a_plan_without_one_of_its_frames_is_refused(server, processor, prompts, monkeypatch):
    def shortened(sample, processor):
        messages = messages_of(sample, processor)
        part = next(p for p in messages[-1]["content"] if p["type"] == "video_plan")
        part["video_plan"]["frames"].pop()
        return messages

    monkeypatch.setattr("rl.rollout.served.messages_of", shortened)
    with pytest.raises(KeyeError, match="refused a rollout: .*a video_plan has 2 frames and its plan 3 entries"):
        ServedRollout(server, processor).generate(prompts[:1], 1, 0.0, 2)


def test_a_server_that_is_down_is_waited_for_and_named(model, processor, prompts):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said: list[str] = []
    url = f"http://127.0.0.1:{port}/v1"
    with pytest.raises(KeyeError, match="did not answer for 0.3 s"):
        ServedRollout(Served(url, "tiny", patience=0.3), processor, said.append).generate(prompts[2:], 1, 0.0, 2)
    found: list = []
    engine = ServedRollout(Served(url, "tiny", patience=60.0), processor, said.append)
    asking = threading.Thread(target=lambda: found.extend(engine.generate(prompts[2:], 1, 0.0, 2)))
    asking.start()
    until(lambda: len(said) == 2)
    model.eval()
    with serving(Answerer(model, processor, "tiny"), Access(), port=port):
        asking.join(60)
    assert len(found) == 1 and "does not answer" in said[1] and "answers again" in said[-1]


def test_other_temperatures_are_refused(processor, prompts):
    with pytest.raises(KeyeError, match="at temperature 0.7"):
        ServedRollout(Served("http://127.0.0.1:9/v1"), processor).generate(prompts, 1, 0.7, 2)
