"""Interventions: each is compared with plain forward passes of the same model on changed inputs or a changed cache."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from keye.errors import KeyeError
from keye.evaluation.evaluate import generate_replies
from keye.evaluation.trace import Cut, Patch, Row, Tracer, lens
from keye.evaluation.trace.knockout import attention_weights
from tests.keye.evaluation.trace.parts import (
    FAMILIES,
    keye_parts,
    keye_prompt,
    text_model,
    text_prompt,
    write_clip,
)

ANSWER = [7, 3]


@pytest.fixture(scope="module", params=FAMILIES)
def text(request):
    return Tracer(text_model(request.param))


@pytest.fixture(scope="module")
def qwen():
    return Tracer(text_model("qwen3"))


@pytest.fixture(scope="module")
def keye(tmp_path_factory):
    """(tracer, processor, sample, prompt) of a question about an image and two clips."""
    folder = tmp_path_factory.mktemp("clips")
    write_clip(folder / "a.mp4")
    write_clip(folder / "b.mp4", (220, 40, 40, 160), 1)
    Image.new("RGB", (56, 56), (200, 30, 90)).save(folder / "c.png")
    model, processor = keye_parts()
    sample, prompt = keye_prompt(model, processor, folder, "a.mp4", "c.png", "b.mp4")
    return Tracer(model), processor, sample, prompt


def plain(tracer, prompt, answer):
    """Log-probabilities `[A]` of the answer by one forward pass of the model."""
    ids = torch.cat([prompt.ids, torch.tensor(answer[:-1], dtype=torch.long)])
    more = torch.arange(1, len(answer))
    positions = torch.cat([prompt.positions, prompt.positions[:, -1:] + more], dim=1)
    inputs = {"visual_features": prompt.features} if prompt.features is not None else {}
    inputs["position_ids"] = positions[:, None] if len(positions) == 3 else positions
    with torch.no_grad():
        logits = tracer.model(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None], **inputs).logits[0]
    return logits.float().log_softmax(-1)[len(prompt) - 1 :].gather(1, torch.tensor(answer)[:, None])[:, 0]


def test_a_run_without_interventions_is_the_model(text):
    prompt = text_prompt()
    torch.testing.assert_close(text.run(prompt, ANSWER).log_probs[0], plain(text, prompt, ANSWER))


def test_a_cut_in_every_block_equals_a_prompt_without_the_tokens(text):
    prompt, places = text_prompt(), (2, 3, 7)
    run = text.run(prompt, ANSWER, [Row(), Row((Cut(places),))])
    expected = plain(text, prompt.without(places, None, None), ANSWER)
    if "GPT2" in type(text.model).__name__:  # its own positions
        assert prompt.without(places, None, None).positions.tolist() == [[0, 1, 4, 5, 6, 8, 9, 10, 11]]
    torch.testing.assert_close(run.log_probs[1], expected, atol=2e-5, rtol=1e-4)
    assert (run.score[0] - run.score[1]).abs() > 1e-3  # the tokens matter


@given(places=st.sets(st.integers(0, 10), min_size=1, max_size=9), length=st.integers(1, 3))
def test_any_cut_equals_deletion(qwen, places, length):
    prompt = text_prompt()
    answer = [5, 9, 2][:length]
    run = qwen.run(prompt, answer, [Row((Cut(tuple(sorted(places))),))])
    torch.testing.assert_close(
        run.log_probs[0], plain(qwen, prompt.without(sorted(places), None, None), answer), atol=5e-5, rtol=1e-4
    )


def test_a_cut_for_the_answer_equals_a_cache_without_the_tokens(qwen):
    prompt, places = text_prompt(), [1, 4, 5]
    run = qwen.run(prompt, [8], [Row((Cut(tuple(places), readers="answer"),))], cached=False)
    keep = [place for place in range(11) if place not in places]
    with torch.no_grad():
        cache = qwen.model(input_ids=prompt.ids[None, :-1], use_cache=True).past_key_values
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, keep], layer.values[:, :, keep]
        logits = qwen.model(
            input_ids=prompt.ids[None, -1:], position_ids=torch.tensor([[11]]), past_key_values=cache,
            attention_mask=torch.ones(1, len(keep) + 1, dtype=torch.long),
        ).logits[0, -1]  # fmt: skip
    torch.testing.assert_close(run.logits[0, 0], logits, atol=2e-5, rtol=1e-4)


def test_the_cache_and_the_size_of_batches_change_nothing(text, keye):
    for tracer, prompt in ((text, text_prompt()), (keye[0], keye[3])):
        rows = [Row(), *(Row((Cut((place, place + 1), layers, "answer"),))
                         for place, layers in ((0, None), (3, (1,)), (5, (0, 2)), (2, (2,))))]  # fmt: skip
        fresh = tracer.run(prompt, ANSWER, rows, cached=False)
        small = Tracer(tracer.model, batch_tokens=2 * (len(prompt) + 1))
        for other in (tracer.run(prompt, ANSWER, rows), small.run(prompt, ANSWER, rows),
                      small.run(prompt, ANSWER, rows, cached=False)):  # fmt: skip
            torch.testing.assert_close(other.logits, fresh.logits, atol=2e-5, rtol=1e-4)


def test_windows_add_up(qwen):
    prompt = text_prompt()
    cuts = [None, (0, 1, 2), (), (0,), (1, 2)]
    nats = qwen.run(prompt, ANSWER, [Row(), *(Row((Cut((2, 3), layers),)) for layers in cuts)]).score.tolist()
    assert nats[1] == nats[2] and nats[3] == nats[0] and len({*nats[3:]}) == 3
    both = qwen.run(prompt, ANSWER, [Row((Cut((2, 3), (0,)), Cut((2, 3), (1, 2))))]).score
    assert float(both[0]) == pytest.approx(nats[1], abs=1e-5)


def test_a_run_patched_into_itself_changes_nothing(text, keye):
    for tracer, prompt in ((text, text_prompt()), (keye[0], keye[3])):
        states = tracer.states(prompt)
        for layer in range(tracer.anatomy.depth):
            for places in ((len(prompt) - 1,), (0, 2), tuple(range(len(prompt)))):
                row = Row(patches=(Patch(layer, places, states[layer + 1, list(places)]),))
                before, after = tracer.run(prompt, ANSWER, cached=False), tracer.run(prompt, ANSWER, [row])
                assert torch.equal(before.logits, after.logits)


def test_all_states_of_another_run_give_its_output(text):
    prompt, other = text_prompt(), text_prompt(seed=1)
    states, every = text.states(other), tuple(range(len(prompt)))
    for layer in range(text.anatomy.depth):
        run = text.run(prompt, [7], [Row(patches=(Patch(layer, every, states[layer + 1]),))])
        torch.testing.assert_close(run.logits, text.run(other, [7]).logits, atol=2e-5, rtol=1e-4)


def test_a_patch_reaches_only_later_tokens(qwen):
    prompt, other = text_prompt(), text_prompt(seed=1)
    states = qwen.states(other)
    row = Row(patches=(Patch(0, (5,), states[1, [5]]),))
    before = qwen.run(prompt, [7], record=range(12)).states[0]
    after = qwen.run(prompt, [7], [row], record=range(12)).states[0]
    changed = (before != after).any(-1)
    assert not changed[:, :5].any() and changed[1:, 5].all() and changed[2:, 6:].all() and not changed[1, 6:].any()


def test_the_lens_after_the_last_block_is_the_output(text, keye):
    for tracer, prompt in ((text, text_prompt()), (keye[0], keye[3])):
        states = tracer.run(prompt, [7], record=[len(prompt) - 1]).states[0, -1, 0]
        output = tracer.run(prompt, [7]).logits[0, 0]
        torch.testing.assert_close(tracer.anatomy.read_out(states), output, atol=2e-5, rtol=1e-4)
        found = lens(tracer, prompt, [7])
        assert found.top[-1] == int(output.argmax()) and found.kl[-1] == pytest.approx(0, abs=1e-5)
        assert len(found.top) == tracer.anatomy.depth + 1


def test_without_visual_tokens_a_keye_model_equals_the_stream_without_them(keye):
    tracer, processor, sample, prompt = keye
    visual = prompt.group("all visual tokens")
    cut = tracer.run(prompt, ANSWER, [Row((Cut(visual.places),))])
    config = tracer.model.config
    blind = prompt.without(visual.places, config.image_token_id, config.video_token_id)
    assert blind.features is None and len(blind) == len(prompt) - sample.visual_tokens
    torch.testing.assert_close(cut.log_probs[0], plain(tracer, blind, ANSWER), atol=2e-5, rtol=1e-4)
    noise = dataclasses.replace(prompt, features=torch.randn_like(prompt.features))
    assert torch.equal(tracer.run(noise, ANSWER, [Row((Cut(visual.places),))]).logits, cut.logits)
    assert not torch.allclose(tracer.run(noise, ANSWER).logits, tracer.run(prompt, ANSWER).logits)


def test_without_a_frame_a_keye_model_equals_the_stream_without_it(keye):
    tracer, _, _, prompt = keye
    config = tracer.model.config
    for name in ("frame 2", "image 1", "frame 8"):
        places = prompt.group(name).places
        without = prompt.without(places, config.image_token_id, config.video_token_id)
        run = tracer.run(prompt, ANSWER, [Row((Cut(places),))])
        torch.testing.assert_close(run.log_probs[0], plain(tracer, without, ANSWER), atol=2e-5, rtol=1e-4)


def test_the_answer_is_that_of_generate(keye):
    tracer, processor, sample, prompt = keye
    reply = generate_replies(tracer.model, processor, [sample], max_new_tokens=5)[0]
    ids = tracer.answer(prompt, [processor.tokenizer.eos_token_id], most=5)
    assert processor.tokenizer.decode(ids, skip_special_tokens=True).strip() == reply.text
    runs = tracer.run(prompt, ids)
    assert runs.logits[0].argmax(-1).tolist() == ids


def test_attention_weights_are_those_of_the_eager_model(text, keye):
    prompt = text_prompt()
    found = text.run(prompt, ANSWER, attentions=True).attentions[0]
    model = text_model(text.model.config.model_type)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        ids = torch.cat([prompt.ids, torch.tensor([7])])[None]
        expected = torch.stack([layer[0] for layer in model(input_ids=ids, output_attentions=True).attentions])
    torch.testing.assert_close(found, expected[:, :, -2:], atol=1e-5, rtol=1e-4)
    tracer, _, _, prompt = keye
    parts = [g for g in prompt.groups if g.kind in ("frame", "image", "timestamps", "question", "template")]
    assert sum(attention_weights(tracer, prompt, [7], parts)) == pytest.approx(1, abs=1e-5)
    assert tracer.anatomy.decoder_config._attn_implementation == "keye"


def test_the_model_is_unchanged_after_runs_and_errors(qwen):
    prompt = text_prompt()
    before = plain(qwen, prompt, ANSWER)

    def broken(*_):
        raise RuntimeError("broken")

    handle = qwen.anatomy.blocks[1].register_forward_hook(broken)
    with pytest.raises(RuntimeError, match="broken"):
        qwen.run(prompt, ANSWER, [Row((Cut((1,)),))], attentions=True)
    handle.remove()
    assert torch.equal(plain(qwen, prompt, ANSWER), before)
    assert qwen.model.config._attn_implementation == "sdpa"
    modules = (*qwen.anatomy.attentions, *qwen.anatomy.blocks)  # transformers leaves forward hooks of its own
    assert not any(module._forward_pre_hooks for module in modules)


def test_errors_name_the_remedy(qwen):
    prompt = text_prompt()
    with pytest.raises(KeyeError, match="at least one token"):
        qwen.run(prompt, [])
    with pytest.raises(KeyeError, match="outside of the prompt's 12 tokens"):
        qwen.run(prompt, [1], [Row((Cut((12,)),))])
    with pytest.raises(KeyeError, match="one state for each place"):
        qwen.run(prompt, [1], [Row(patches=(Patch(0, (1, 2), torch.zeros(1, 32)),))])
    with pytest.raises(KeyeError, match="no cache fits"):
        qwen.run(prompt, [1], [Row((Cut((1,)),))], cached=True)
    with pytest.raises(KeyeError, match="no group 'frame 9'"):
        prompt.group("frame 9")
    with pytest.raises(KeyeError, match="no causal language model"):
        Tracer(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("kind", ["image_token_id", "video_token_id"])
@pytest.mark.parametrize("cached", [True, False])
def test_a_placeholder_in_an_answer_is_a_word(keye, kind, cached):
    tracer, _, _, prompt = keye
    model, written = tracer.model, getattr(tracer.model.config, kind)
    ids = torch.cat([prompt.ids, torch.tensor([7, written, 5])])
    steps = torch.arange(1, 4)
    positions = torch.cat([prompt.positions, prompt.positions[:, -1:] + steps], dim=1)
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
        visual = torch.isin(prompt.ids, torch.tensor([model.config.image_token_id, model.config.video_token_id]))
        order = torch.cat([(prompt.ids == token).nonzero()[:, 0] for token in
                           (model.config.image_token_id, model.config.video_token_id)])  # fmt: skip
        assert len(order) == int(visual.sum()) == len(prompt.features)
        embeds[order] = prompt.features
        states = model.model.language_model(
            inputs_embeds=embeds[None], attention_mask=torch.ones_like(ids)[None], position_ids=positions[:, None]
        ).last_hidden_state
        expected = model.lm_head(states[0]).log_softmax(-1)
    answer = [7, written, 5, 9]
    found = tracer.run(prompt, answer, cached=cached).log_probs[0]
    at = torch.arange(len(prompt) - 1, len(prompt) + 3)
    torch.testing.assert_close(found, expected[at, torch.tensor(answer)], atol=2e-5, rtol=1e-4)
