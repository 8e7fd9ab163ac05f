"""Attention to a shared prompt equals attention over the concatenated keys of each sequence."""

import pytest
import torch
import torch.nn.functional as F

from rl.rollout.attention import Members, SharedPrompts, shared_attention

HEADS, KEY_HEADS, DIM = 6, 2, 8


def case(device: str, dtype: torch.dtype) -> tuple:
    """Five rows of three prompts in mixed order, with 4, 1, 3, 2, 4 tokens of their own."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    lengths = torch.tensor([4, 1, 3, 2, 4], device=device)
    q, keys, values = draw(5, HEADS, DIM) * 3, draw(5, KEY_HEADS, 4, DIM), draw(5, KEY_HEADS, 4, DIM)
    # A block of two prompts of 7 and 3 tokens with two rows and one, and a block of one prompt with two.
    two = Members(
        torch.tensor([[3, 0], [2, 0]], device=device),
        torch.tensor([[True, True], [True, False]], device=device).nonzero(as_tuple=True),
        torch.arange(7, device=device) >= torch.tensor([7, 3], device=device)[:, None],
    )
    one = Members(torch.tensor([[1, 4]], device=device), torch.ones(1, 2, device=device).nonzero(as_tuple=True), None)
    blocks = [
        SharedPrompts(members, draw(count, KEY_HEADS, length, DIM), draw(count, KEY_HEADS, length, DIM))
        for members, count, length in ((two, 2, 7), (one, 1, 2))
    ]
    return q, keys, values, lengths, blocks


PROMPT_OF_ROW = {3: (0, 0, 7), 0: (0, 0, 7), 2: (0, 1, 3), 1: (1, 0, 2), 4: (1, 0, 2)}
"""Row → block, place in the block, and length of its prompt."""


def separate(q, keys, values, lengths, blocks) -> torch.Tensor:
    """Every row alone, over [prompt, own] keys, by torch's attention in float64."""
    out = torch.zeros_like(q, dtype=torch.float64)
    for row, (block, place, length) in PROMPT_OF_ROW.items():
        own = int(lengths[row])
        k, v = (
            torch.cat([shared[place, :, :length], x[row, :, :own]], 1).double()[None]
            for shared, x in ((blocks[block].keys, keys), (blocks[block].values, values))
        )
        out[row] = F.scaled_dot_product_attention(q[row].double()[None, :, None], k, v, enable_gqa=True)[0, :, 0]
    return out


def check(device: str, dtype: torch.dtype, bound: float) -> None:
    q, keys, values, lengths, blocks = case(device, dtype)
    padding = torch.arange(4, device=device) >= lengths[:, None]
    out = shared_attention(q, keys, values, padding, blocks)
    assert out.dtype == dtype and out.shape == q.shape
    torch.testing.assert_close(out.double(), separate(q, keys, values, lengths, blocks), atol=bound, rtol=bound)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
def test_shared_attention_of_RHD_equals_separate_sequences(dtype, bound):
    check("cpu", dtype, bound)


@pytest.mark.cuda
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)])
def test_shared_attention_on_a_gpu_equals_separate_sequences(dtype, bound):
    check("cuda", dtype, bound)


def test_large_scores_of_either_part_do_not_overflow():
    q, keys, values, lengths, blocks = case("cpu", torch.float32)
    padding = torch.arange(4) >= lengths[:, None]
    for factor in (100.0, -100.0):
        parts = [SharedPrompts(block.members, block.keys * factor, block.values) for block in blocks]
        out = shared_attention(q, keys, values, padding, parts)
        expected = separate(q, keys, values, lengths, parts)
        torch.testing.assert_close(out.double(), expected, atol=1e-4, rtol=1e-4)
