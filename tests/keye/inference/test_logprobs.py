"""Log-probabilities of the server's answers."""

import json

import pytest
import torch

from keye.inference.answerer import Answerer
from keye.inference.chat import load_model
from keye.inference.logprobs import token_logprobs
from keye.inference.openai_format import Access
from tests.keye.inference.served import ask, serving, user, words
from tests.keye.inference.talk import tiny_directory


def test_log_probabilities_are_those_of_the_model_for_the_tokens_of_the_answer(tmp_path):
    """Against one forward pass over prompt and answer; the tokens' bytes spell the answer."""
    model, processor = load_model(tiny_directory(tmp_path), "cpu", "float32")
    request = user(words("Which colour?"), max_tokens=8, temperature=0.7, seed=3, logprobs=True)
    with serving(Answerer(model, processor, "tiny", most_tokens=8), Access()) as address:
        status, _, text = ask(address, request)
        assert status == 200
        choice = json.loads(text)["choices"][0]
        assert ask(address, user(words("Which colour?"), logprobs=True, stream=True))[0] == 400
    scored = choice["logprobs"]["content"]
    sample = processor.sample(request["messages"], add_generation_prompt=True)
    by_bytes = {
        bytes(token_logprobs(processor.tokenizer, [(i, 0.0)])["content"][0]["bytes"]): i
        for i in range(len(processor.tokenizer))
    }
    answer = [by_bytes[bytes(entry["bytes"])] for entry in scored]
    ids = torch.tensor([[*sample.input_ids.tolist(), *answer]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, len(sample.input_ids) - 1 : -1].float()
    logits[:, [model.config.image_token_id, model.config.video_token_id]] = float("-inf")
    wanted = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]
    assert [entry["logprob"] for entry in scored] == pytest.approx(wanted.tolist(), abs=1e-4)
    written = b"".join(bytes(entry["bytes"]) for entry in scored).decode(errors="replace")
    assert "".join(choice["message"]["content"].split()) in "".join(written.split())
