"""The recorder captures every collective, forward and backward, and names the first difference between ranks."""

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from stages.distributed.collectives import Collective, all_gather, difference, difference_over_ranks, recorded
from tests.distributed import run_distributed


def exchange(uneven: bool) -> tuple[list[Collective], str | None]:
    rank, x = dist.get_rank(), torch.ones(4, requires_grad=True)
    with recorded() as calls:
        all_gather(x).sum().backward()
        sent = [1, 2] if rank == 0 else [3, 4]
        out = torch.empty(sum([1, 3] if rank == 0 else [2, 4]))
        dist.all_to_all_single(out, torch.ones(sum(sent)), [1, 3] if rank == 0 else [2, 4], sent)
        dist.all_gather_into_tensor(torch.empty(6, dtype=torch.bfloat16), torch.ones(3, dtype=torch.bfloat16))
        if uneven and rank == 1:
            calls.append(Collective("barrier", 2, "", 0))
        dist.barrier()
    dist.barrier()  # no longer recorded
    return calls, difference_over_ranks(calls)


def both() -> list[tuple[list[Collective], str | None]]:
    return [exchange(False), exchange(True)]


def test_every_call_is_recorded_and_the_first_difference_is_named():
    (first, same), (_, other) = run_distributed(both, 2, 120)[1]
    assert first[:4] == [
        Collective("all_gather", 2, "float32", 12),
        Collective("all_reduce", 2, "float32", 8),  # the gradient
        Collective("all_to_all_single", 2, "float32", -1),
        Collective("all_gather_single", 2, "bfloat16", 9),
    ]
    assert first[4].operation == "barrier" and len(first) == 5
    assert same is None
    assert other.startswith("rank 0 issues 5 collectives, rank 1 6; rank 1 continues with barrier over 2 ranks")


def under_a_fake_group() -> list[Collective]:
    dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=64)
    group = dist.new_group(list(range(8)))
    with recorded() as calls:
        dist.all_reduce(torch.ones(5))
        dist.reduce_scatter_tensor(torch.empty(1), torch.ones(8), group=group)
    dist.destroy_process_group()
    return calls


def test_a_fake_process_group_is_recorded():
    [calls] = run_distributed(under_a_fake_group, 1)  # a process of its own: others keep the group of an earlier test
    assert calls == [Collective("all_reduce", 64, "float32", 5), Collective("reduce_scatter_single", 8, "float32", 9)]


def test_orders_and_sizes_that_differ_are_named():
    a, b = Collective("all_reduce", 2, "float32", 4), Collective("all_gather", 2, "float32", 4)
    assert difference([[a, b], [a, b], [a, b]]) is None
    assert "collective 1: rank 0 issues all_gather over 2 ranks (float32, 4 elements), rank 2 issues all_reduce" in (
        difference([[a, b], [a, b], [a, a]]) or ""
    )
