"""CAS, DSS, markers, lens, semantic maps and commitments: literal values worked by hand, and plain forward passes."""

import math

import numpy as np
import pytest
import torch

from keye.errors import KeyeError
from keye.evaluation.trace import (
    Cut,
    Effect,
    Prompt,
    Row,
    TokenGroup,
    Tracer,
    commitment_by_cut,
    knock_out,
    patch,
    shares,
    windows_of,
)  # fmt: skip
from keye.evaluation.trace.coherence import (
    Markers,
    alignment,
    cas,
    cas_markers,
    cas_of,
    dss,
    dss_markers,
    dss_of,
    pathway_strength,
    piece_ids,
)  # fmt: skip
from keye.evaluation.trace.knockout import first_of_the_tail
from keye.evaluation.trace.lens import lens_of
from keye.evaluation.trace.semantic import Vocabulary, semantic_map
from tests.keye.evaluation.trace.parts import keye_parts, keye_prompt, text_model, text_prompt, write_clip


@pytest.fixture(scope="module")
def keye(tmp_path_factory):
    """(model, processor, tracer, prompts): three prompts of the same stream with other pixels."""
    folder = tmp_path_factory.mktemp("clips")
    write_clip(folder / "a.mp4", (30, 30, 200, 200))
    model, processor = keye_parts()
    _, prompt = keye_prompt(model, processor, folder, "a.mp4", text="Which colour came first, red or blue?")
    torch.manual_seed(0)
    others = [Prompt(prompt.ids, prompt.positions, torch.randn_like(prompt.features), 0, prompt.groups)
              for _ in range(2)]  # fmt: skip
    return processor, Tracer(model), prompt, others


def test_alignment_and_cas_by_hand():
    unembedding = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])
    states = torch.tensor([[3.0, 4, 0], [0, 0, 2]])
    # One word of token 0; one of tokens 1 and 2, whose mean is (0, 1/2, 1/2).
    found = alignment(states, unembedding, [[0], [1, 2]])
    half = math.sqrt(0.5)
    torch.testing.assert_close(found, torch.tensor([[0.6, 0.8 * half], [0, half]]))
    scores = cas(torch.tensor([[0.6, -0.2], [0.1, 0.1]]), torch.tensor([[-0.2], [0.6]]))
    torch.testing.assert_close(scores, torch.tensor([0.8, 0.25]))


def test_cas_markers_by_hand():
    falling = [0.90, 0.91, 0.88, 0.87, 0.85, 0.79, 0.52, 0.49, 0.60, 0.49, 0.48, 0.30, 0.2]
    # 0.88 and 0.87 are both more than 0.02 below 0.91; 0.79 is the first below 0.8; three below 0.5 begin at 9.
    assert cas_markers(falling) == Markers(2, 5, 9)
    # One layer that falls and returns is no onset; 0.02 is not more than 0.02.
    assert cas_markers([0.9, 0.8, 0.9, 0.88, 0.9]) == Markers(None, None, None)
    assert cas_markers([0.5, 0.4, 0.3, 0.6]) == Markers(1, 0, None)
    assert cas_markers([0.4, 0.4, 0.4]) == Markers(None, 0, 0)


def test_dss_by_hand():
    # States of three words in one layer: correlation of (1,2,3) and (2,4,6) is 1, of (2,4,6) and (3,1,2) is −0.5.
    right = torch.tensor([[[1.0, 2, 3], [2, 4, 6], [3, 1, 2]]])
    assert float(pathway_strength(right)) == pytest.approx(1.5)
    wrong = torch.tensor([[[1.0, 0, 0], [0, 1, 0]]])  # correlation −0.5
    assert float(dss([right], [wrong])) == pytest.approx(0.75)
    assert float(dss([right], [wrong, right])) == pytest.approx(1.5 / 3.5)
    states = torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(0))
    for layer, strength in enumerate(pathway_strength(states)):
        rows = np.corrcoef(states[layer].numpy())
        assert float(strength) == pytest.approx(sum(abs(rows[i, i + 1]) for i in range(4)), abs=1e-5)
    assert dss_markers([0.7, 0.59, 0.61, 0.49, 0.45, 0.55]) == Markers(1, 3, 4)
    assert dss_markers([0.7, 0.65]) == Markers(None, None, 1)
    with pytest.raises(KeyeError, match="at least two words"):
        pathway_strength(states[:, :1])


def test_cas_and_dss_of_a_run_use_its_states(keye):
    processor, tracer, prompt, _ = keye
    tokenizer = processor.tokenizer
    states = tracer.states(prompt)
    red, blue = (piece_ids(tokenizer, word, True) for word in ("red", "blue"))
    head = tracer.model.lm_head.weight.detach()
    layers = [[abs(float(torch.cosine_similarity(h, head[list(ids)].mean(0), dim=0))) for ids in (red, blue)]
              for h in states[1:, -1]]  # fmt: skip
    found = cas_of(tracer, prompt, tokenizer, ["red"], ["blue"])
    assert found.tolist() == pytest.approx([a / (a + b) for a, b in layers], abs=1e-5)
    places = {word: prompt.group(word).places[-1] for word in ("red", "blue", "first", "colour")}
    one = [abs(np.corrcoef(s[places["red"]], s[places["first"]])[0, 1]) for s in states[1:].numpy()]
    two = [abs(np.corrcoef(s[places["blue"]], s[places["colour"]])[0, 1]) for s in states[1:].numpy()]
    scores = dss_of(tracer, prompt, [["red", "first"]], [["Blue", "colour"]])
    assert scores.tolist() == pytest.approx([a / (a + b) for a, b in zip(one, two, strict=True)], abs=1e-5)
    with pytest.raises(KeyeError, match="does not contain the word 'purple'"):
        dss_of(tracer, prompt, [["red", "purple"]], [["red", "blue"]])


def test_the_lens_settles_where_the_last_word_no_longer_changes():
    logits = torch.tensor([[0.0, 5, 0], [5, 0, 0], [0, 5, 0], [0, 9, 0], [0, 9.1, 0]])
    found = lens_of(logits, 1)
    assert found.top == (1, 0, 1, 1, 1) and found.settled == 2
    p = math.exp(5) / (math.exp(5) + 2)
    assert found.top_probability[0] == pytest.approx(p) and found.answer_log_prob[2] == pytest.approx(math.log(p))
    assert lens_of(torch.tensor([[0.0, 1], [0, 3]]), 1).settled == 1  # the same word, but KL above 0.1


def test_commitment_by_cut_is_the_block_from_which_on_the_answer_stays(keye):
    assert [first_of_the_tail(x) for x in ([True, False, True, True], [False], [True], [])] == [2, 1, 0, 0]
    _, tracer, prompt, others = keye
    for one in (prompt, *others):
        top = int(tracer.run(one, [0]).logits[0, 0].argmax())
        held = []
        for start in range(4):
            cut = Cut(tuple(range(len(one) - 1)), tuple(range(start, 4)), "answer")
            held.append(int(tracer.run(one, [0], [Row((cut,))], cached=False).logits[0, 0].argmax()) == top)
        assert commitment_by_cut(tracer, one) == first_of_the_tail(held)


def test_effects_are_differences_of_plain_runs(keye):
    _, tracer, prompt, _ = keye
    assert windows_of(4) == [(0,), (1,), (2,), (3,)] and windows_of(3, 2) == [(0, 1), (1, 2)]
    assert len(windows_of(32)) == 29 and windows_of(3, 9) == [(0, 1, 2)]
    groups = [prompt.group("frame 1"), prompt.group("question")]
    effects = knock_out(tracer, prompt, [7, 3], groups, windows_of(3))
    base = tracer.run(prompt, [7, 3])
    for effect in effects:
        places = effect.group.places
        run = tracer.run(prompt, [7, 3], [Row((Cut(places),))])
        assert effect.nats == pytest.approx(float(base.score - run.score), abs=1e-5)
        p, q = base.logits[0, 0].softmax(-1), run.logits[0, 0].softmax(-1)
        assert effect.kl == pytest.approx(float((p * (p / q).log()).sum()), abs=1e-5)
        assert effect.flips == ((int(p.argmax()) == 7) != (int(q.argmax()) == 7)) and len(effect.windows) == 3
        own = tracer.run(prompt, [7, 3], [Row((Cut(places, readers="answer"),))])
        assert effect.answer_nats == pytest.approx(float(base.score - own.score), abs=1e-5)


def test_flips_follow_the_first_token_of_the_answer(keye):
    _, tracer, prompt, _ = keye
    groups = [group for group in prompt.groups if group.kind in ("frame", "word", "question", "visual")]
    rows = [Row(), *(Row((Cut(group.places),)) for group in groups)]
    top = tracer.run(prompt, [0], rows).logits[:, 0].argmax(-1).tolist()
    other = next(token for token in top if token != top[0])  # the answer of some cut
    for first in (top[0], other):
        flips = [effect.flips for effect in knock_out(tracer, prompt, [first, 3], groups, attention=False)]
        assert flips == [(token == first) != (top[0] == first) for token in top[1:]] and any(flips)


def test_shares_count_positive_effects():
    def effect(kind, nats):
        return Effect(TokenGroup(kind, kind, (0,)), nats, 0, False, nats)

    found = shares([effect("slow", 3.0), effect("fast", 1.0), effect("question", 9.0)])
    assert found == {"slow": 0.75, "fast": 0.25}
    assert shares([effect("slow", 2.0), effect("fast", -1.0)]) == {"slow": 1.0, "fast": 0.0}
    assert math.isnan(shares([effect("slow", -2.0)])["slow"])


def test_patching_between_two_clips(keye):
    _, tracer, right, (wrong, _) = keye
    answers = [tracer.answer(right, most=1), tracer.answer(wrong, most=1)]
    assert answers[0] != answers[1]
    every = TokenGroup("all", "visual", tuple(range(len(right))))
    found = patch(tracer, right, wrong, (answers[0], answers[1]), [every, right.group("question")])
    assert found.right > 0 > found.wrong
    assert found.restored[0] == pytest.approx([1.0] * 4, abs=1e-4)  # every state of the right run
    assert found.restored[1][-1] == 0  # a question's last state is read by nobody
    assert found.handed_over <= 3  # the last state of the last token is the output
    assert found.committed <= 3  # after the last block nothing is read
    itself = patch(tracer, right, right, (answers[0], answers[1]), [every])
    assert all(math.isnan(value) for value in itself.restored[0]) and itself.right == pytest.approx(itself.wrong)
    with pytest.raises(KeyeError, match="same answer"):
        patch(tracer, right, wrong, (answers[0], answers[0]))
    with pytest.raises(KeyeError, match="different positions"):
        patch(tracer, right, wrong.without((3,), 5, 6), (answers[0], answers[1]))


def test_a_vocabulary_sums_tokens_that_spell_the_same_word(keye):
    processor, tracer, prompt, _ = keye
    tokenizer = processor.tokenizer
    vocabulary = Vocabulary(tokenizer, len(tokenizer) + 3)
    values = torch.randn(2, len(tokenizer) + 3, generator=torch.Generator().manual_seed(1))
    sums = vocabulary.summed(values)
    expected = {}
    for token in range(len(tokenizer)):
        word = tokenizer.decode([token], skip_special_tokens=True).strip().lower()
        if any(c.isalnum() for c in word):
            expected[word] = expected.get(word, 0) + values[1, token].item()
    assert {w: pytest.approx(float(v), abs=1e-5) for w, v in zip(vocabulary.words, sums[1], strict=True)} == expected
    assert len(vocabulary.tokens(vocabulary.words.index("a"))) >= 2  # "a" and " a" at least


def test_a_semantic_map_has_the_falls_of_probabilities(keye):
    processor, tracer, prompt, _ = keye
    tokenizer = processor.tokenizer
    found = semantic_map(tracer, prompt, tokenizer, 1, nodes=6, edges=12)
    assert len(found.nodes) == 6 and len(found.edges) == 12
    scores = [node.score for node in found.nodes]
    assert scores == sorted(scores, reverse=True)
    weights = [edge.weight for edge in found.edges]
    assert weights == sorted(weights, reverse=True)
    visual = {p for g in prompt.groups if g.kind == "frame" for p in g.places}
    stop = tokenizer(".", add_special_tokens=False)["input_ids"][0]
    for edge in found.edges[:4]:
        tokens = [t for t in range(len(tokenizer)) if tokenizer.decode([t]).strip().lower() == edge.target]
        before = tracer.run(prompt, [0]).logits[0, 0].softmax(-1)[tokens].sum()
        if edge.place in visual:
            frame = prompt.group(edge.at)
            assert edge.place in frame.places
            after = tracer.run(prompt, [0], [Row((Cut(frame.places),))]).logits[0, 0].softmax(-1)[tokens].sum()
        else:
            after = tracer.run(prompt.replaced(edge.place, stop), [0]).logits[0, 0].softmax(-1)[tokens].sum()
        assert edge.weight == pytest.approx(float(before - after), abs=1e-6)
    with pytest.raises(KeyeError, match="block 5, does not exist"):
        semantic_map(tracer, prompt, tokenizer, 4)


def test_a_text_model_commits_at_a_block(keye):
    tracer = Tracer(text_model("llama"))
    assert 0 <= commitment_by_cut(tracer, text_prompt()) <= 3
