"""SigLIP's loss: its value by hand, and two ranks' parts add up to the loss and the gradients of one process."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stages import losses
from stages.distributed.collectives import all_gather
from stages.distributed.parallel import sum_over_ranks
from stages.losses import siglip_loss
from tests.distributed import run_distributed

PAIRS, WIDTH = 6, 8


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def test_value_of_two_pairs_by_hand():
    vision = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    text = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    captions = torch.tensor([[5, 0], [6, 0]])
    loss = siglip_loss(vision, text, captions, torch.tensor([2.0]).log(), torch.tensor([-1.0]))
    # Logits 2 v·t − 1: [[1, −1], [0.2, 0.6]]; the diagonal are positives.
    wanted = -(log_sigmoid(1) + log_sigmoid(1) + log_sigmoid(-0.2) + log_sigmoid(0.6)) / 2
    assert loss.item() == pytest.approx(wanted, abs=1e-6)


def test_equal_captions_are_positives_of_one_another():
    vision = text = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    scale, bias = torch.zeros(1), torch.zeros(1)
    same = siglip_loss(vision, text, torch.tensor([[5], [5]]), scale, bias)
    other = siglip_loss(vision, text, torch.tensor([[5], [6]]), scale, bias)
    assert same.item() == pytest.approx(-4 * log_sigmoid(1) / 2, abs=1e-6)
    assert other.item() == pytest.approx(-2 * (log_sigmoid(1) + log_sigmoid(-1)) / 2, abs=1e-6)


def loss_of(first: int, last: int) -> tuple[Tensor, list[Tensor]]:
    """PairPacker `first` to `last` → this rank's loss, and the leaves: vision, text, scale, bias."""
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(PAIRS, WIDTH, generator=generator)[first:last] for _ in range(2)]
    leaves += [torch.tensor([1.5]), torch.tensor([-2.0])]
    for leaf in leaves:
        leaf.requires_grad_()
    captions = torch.tensor([[1], [2], [3], [1], [2], [4]])[first:last]  # some captions stand on both ranks
    vision, text = (F.normalize(x, dim=-1) for x in leaves[:2])
    return siglip_loss(vision, text, captions, *leaves[2:]), leaves


def part(limit: int) -> list[Tensor]:
    losses.LOGITS = limit
    half = PAIRS // dist.get_world_size()
    loss, leaves = loss_of(dist.get_rank() * half, (dist.get_rank() + 1) * half)
    loss.backward()
    vision, text, scale, bias = (leaf.grad for leaf in leaves)
    joined = [all_gather(x).flatten(0, 1) for x in (vision, text)]
    return [sum_over_ranks(loss), *joined, sum_over_ranks(scale), sum_over_ranks(bias)]


def joined_loss() -> list[Tensor]:
    """Loss and gradients of the joined batch, written out: every visual against every caption, in one matrix."""
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(PAIRS, WIDTH, generator=generator) for _ in range(2)]
    leaves += [torch.tensor([1.5]), torch.tensor([-2.0])]
    for leaf in leaves:
        leaf.requires_grad_()
    vision, text = (x / x.norm(dim=1, keepdim=True) for x in leaves[:2])
    logits = vision @ text.T * leaves[2].exp() + leaves[3]
    captions = [1, 2, 3, 1, 2, 4]
    signs = torch.tensor([[1.0 if a == b else -1.0 for b in captions] for a in captions])
    loss = torch.log1p((-signs * logits).exp()).sum() / PAIRS
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("limit", [1, 13, 1 << 22], ids=["row by row", "two rows at once", "all at once"])
def test_chunks_of_logits_are_the_joined_batch(monkeypatch, limit):
    monkeypatch.setattr(losses, "LOGITS", limit)
    loss, leaves = loss_of(0, PAIRS)
    loss.backward()
    for got, wanted in zip([loss.detach(), *(leaf.grad for leaf in leaves)], joined_loss(), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-5)


class Largest(TorchDispatchMode):
    """Notes the most numbers that one tensor held."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        self.numbers = max(self.numbers, out.numel() if isinstance(out, Tensor) else 0)
        return out


def test_logits_of_all_pairs_are_never_made(monkeypatch):
    monkeypatch.setattr(losses, "LOGITS", 1 << 10)
    vectors = torch.randn(256, 2, requires_grad=True)
    with Largest() as largest:
        siglip_loss(vectors, vectors, torch.arange(256)[:, None], torch.zeros(1), torch.zeros(1)).backward()
    assert largest.numbers == 1 << 10


def test_two_ranks_equal_one():
    both = run_distributed(part, 2, 360, 13)
    for rank in both:
        for got, wanted in zip(rank, joined_loss(), strict=True):
            torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-5)
