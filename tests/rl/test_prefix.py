"""PrefixTree: a shared prompt gives what separate sequences give."""

import pytest
import torch
import torch.nn.functional as F

from rl.prefix import PrefixTree


def test_layout_of_a_small_tree():
    tree = PrefixTree([3, 2], [[2, 1], [1, 2]])
    assert tree.length == 11
    assert tree.cu_seqlens().tolist() == [0, 6, 11]
    # row:  p p p a a b | q q c d d
    assert tree.predictors().tolist() == [2, 3, 2, 7, 7, 9]
    assert tree.owner().tolist() == [0, 0, 1, 2, 3, 3]


def test_attention_of_LHD_equals_separate_sequences():
    torch.manual_seed(0)
    tree = PrefixTree([5, 3], [[4, 1, 2], [3, 3]])
    q = torch.randn(tree.length, 4, 8, requires_grad=True)
    k, v = (torch.randn(tree.length, 2, 8, requires_grad=True) for _ in range(2))
    shared = tree.attention(q, k, v, tree.cu_seqlens(), True)

    separate = torch.zeros_like(shared)
    for start, prompt, lengths in ((0, 5, [4, 1, 2]), (12, 3, [3, 3])):
        begin = start + prompt
        for length in lengths:
            places = torch.tensor([*range(start, start + prompt), *range(begin, begin + length)])
            rows = [x[places].transpose(0, 1)[None] for x in (q, k, v)]
            alone = F.scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=True)[0].transpose(0, 1)
            separate = separate.index_put((places,), alone)
            begin += length
    torch.testing.assert_close(shared, separate)

    weight = torch.randn_like(shared)
    for ours, theirs in zip(
        torch.autograd.grad((shared * weight).sum(), (q, k, v), retain_graph=True),
        torch.autograd.grad((separate * weight).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_a_layout_that_does_not_fit_is_refused():
    tree = PrefixTree([2], [[1]])
    rows = torch.randn(4, 1, 4)
    with pytest.raises(ValueError, match="3 tokens was given 4"):
        tree.attention(rows, rows, rows, torch.tensor([0, 4]), True)
