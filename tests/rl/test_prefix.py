"""PrefixTree: a shared prompt gives what separate sequences give."""

import pytest
import torch
import torch.nn.functional as F

from keye.model.attention import Varlen
from rl.policy import shared_attention
from rl.policy.prefix import PrefixTree
from rl.policy.shared_attention import CpuKernel, PlainKernel


def test_layout_of_a_small_tree():
    tree = PrefixTree([3, 2], [[2, 1], [1, 2]])
    assert tree.length == 11
    assert tree.cu_seqlens().tolist() == [0, 6, 11]
    # row:  p p p a a b | q q c d d
    assert tree.predictors().tolist() == [2, 3, 2, 7, 7, 9]
    assert tree.owner().tolist() == [0, 0, 1, 2, 3, 3]


@pytest.mark.parametrize("kernel", [CpuKernel, PlainKernel])
@pytest.mark.parametrize("queries", [1024, 3])
def test_attention_of_LHD_equals_separate_sequences(kernel, queries, monkeypatch):
    monkeypatch.setattr(shared_attention, "choose", lambda q, groups: kernel())
    monkeypatch.setattr(shared_attention, "QUERIES", queries)
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
    torch.testing.assert_close(shared, separate, atol=1e-6, rtol=1e-6)

    weight = torch.randn_like(shared)
    for ours, theirs in zip(
        torch.autograd.grad((shared * weight).sum(), (q, k, v), retain_graph=True),
        torch.autograd.grad((separate * weight).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_one_long_prompt_in_other_dtypes(dtype):
    """A group of eight after a prompt of 300 tokens, in one call on its keys; scores differ by up to 20."""
    torch.manual_seed(1)
    tree = PrefixTree([300], [[20, 1, 33, 7, 7, 20, 2, 50]])
    wide = [torch.randn(tree.length, heads, 16, dtype=torch.float64) for heads in (6, 2, 2)]
    wide[0] *= 3
    weight = torch.randn_like(wide[0])
    results = []
    for attend, precision in ((tree.attention, dtype), (all_scores(tree), torch.float64)):
        rows = [x.to(dtype).to(precision).requires_grad_() for x in wide]
        out = attend(*rows, tree.cu_seqlens(), True)
        results.append((out, *torch.autograd.grad(out, rows, weight.to(out.dtype))))
    limit = 1e-12 if dtype == torch.float64 else 2e-2
    for ours, exact in zip(*results, strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - exact).norm() < limit * exact.norm()


def all_scores(tree: PrefixTree) -> Varlen:
    """Attention of one prompt's tree by all scores and a mask."""
    first = tree.prompt_lengths[0]
    segment = torch.cat([torch.full((n,), i) for i, n in enumerate([first, *tree.completion_lengths[0]])])
    allowed = ((segment[:, None] == segment) | (segment == 0)).tril()

    def attend(q, k, v, cu_seqlens, causal):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        scores = torch.einsum("lhd,mhd->hlm", q, k) * q.shape[-1] ** -0.5
        return torch.einsum("hlm,mhd->lhd", scores.masked_fill(~allowed, -torch.inf).softmax(-1), v)

    return attend


def test_a_layout_that_does_not_fit_is_refused():
    tree = PrefixTree([2], [[1]])
    rows = torch.randn(4, 1, 4)
    with pytest.raises(ValueError, match="3 tokens was given 4"):
        tree.attention(rows, rows, rows, torch.tensor([0, 4]), True)
