"""Draws follow the distribution, cut as requested."""

import numpy as np
import torch
from scipy.stats import chisquare

from rl.rollout.engine import number_of, stream_of
from rl.rollout.sampling import TokenSampler

LOGITS = torch.tensor([1.0, 0.0, 2.0, -1.0, 0.5, 3.0])


def draws(sampler: TokenSampler, temperature: float, count: int = 20000) -> tuple:
    uniform = torch.from_numpy(np.random.default_rng(0).random(count))
    return sampler(LOGITS.expand(count, -1), temperature, uniform)


def test_frequencies_are_those_of_the_tempered_softmax_without_banned_tokens():
    drawn = draws(TokenSampler(banned=(5,)), 0.7)
    expected = np.exp(LOGITS[:5].double().numpy() / 0.7)
    expected /= expected.sum()
    counts = np.bincount(drawn.tokens.numpy(), minlength=6)
    assert counts[5] == 0
    assert chisquare(counts[:5], expected * counts.sum()).pvalue > 1e-3
    torch.testing.assert_close(drawn.log_probs.double().exp(), torch.from_numpy(expected)[drawn.tokens])
    torch.testing.assert_close(drawn.sampler_log_probs, drawn.log_probs)


def test_cuts_keep_the_most_likely_tokens_and_normalise_the_samplers_log_probs():
    full = LOGITS.double().softmax(-1)  # by falling probability: 5 0.60, 2 0.22, 0 0.08, 4 0.05, 1 0.03, 3 0.01
    for options, kept in (({"top_k": 3}, [5, 2, 0]), ({"top_p": 0.81}, [5, 2]), ({"top_p": 0.7, "top_k": 1}, [5])):
        sampler = TokenSampler(**options)
        drawn = draws(sampler, 1.0, 3000)
        assert sampler.cuts and set(drawn.tokens.tolist()) == set(kept)
        torch.testing.assert_close(drawn.log_probs.double(), full[drawn.tokens].log())
        torch.testing.assert_close(drawn.sampler_log_probs.double(), (full / full[kept].sum())[drawn.tokens].log())


def test_extreme_random_numbers_give_tokens_with_a_probability():
    uniform = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    drawn = TokenSampler(banned=(0, 5))(LOGITS.expand(2, -1), 1.0, uniform)
    assert drawn.tokens.tolist() == [1, 4]
    assert TokenSampler(banned=(5,))(LOGITS.expand(2, -1), 0, uniform).tokens.tolist() == [2, 2]


def test_streams_differ_by_every_number_of_their_key():
    firsts = {stream_of(key, place).random() for key in ((0, 0), (0, 1), (1, 0), (-1, 0)) for place in (0, 1)}
    assert len(firsts) == 8
    assert stream_of((3, 1), 2).random(5).tolist() == stream_of((3, 1), 2).random(5).tolist()
    assert number_of("a") != number_of("b") and 0 <= number_of("a") < 2**64
