"""A pack divided among processes has the same loss and gradients: Ulysses, shared frames, the grid."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from keye.errors import RecipeError
from keye.model import attention, flops
from keye.model.attention import varlen
from keye.model.config import KeyeConfig
from keye.model.rope import stream_positions
from keye.processor.processor import Sample
from stages.data.collate import pack
from stages.data.packing.balance import rank_operations
from stages.distributed.activation_memory import apply_memory_options
from stages.distributed.collectives import all_gather
from stages.distributed.parallel import (
    ParallelDims,
    Piece,
    build_parallel_dims,
    key_heads,
    own_pixels,
    route_features,
    shard,
    share_frames,
    sum_over_ranks,
    ulysses,
    vision_shares,
)
from tests.distributed import run_distributed
from tests.stages import small

IMAGE, VIDEO = 1, 2


def attention_inputs(heads: int, kv_heads: int, length: int = 48) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q `[L, H, D]`, k and v `[L, Hkv, D]` and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(length, count, 8) for count in (heads, kv_heads, kv_heads, heads)]
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def attend(heads: int, kv_heads: int, bounds: list[int], causal: bool) -> list[Tensor]:
    """Output and gradients of q, k, v, gathered from all ranks."""
    grid = build_parallel_dims(dist.get_world_size())
    whole = attention_inputs(heads, kv_heads)
    *parts, upstream = (x.chunk(grid.sequence)[grid.sequence_rank].clone() for x in whole)
    for x in parts:
        x.requires_grad_()
    out = ulysses(grid.sequence_group)(*parts, torch.tensor(bounds, dtype=torch.int32), causal)
    out.backward(upstream)
    return [all_gather(x, grid.sequence_group).flatten(0, 1) for x in (out.detach(), *(x.grad for x in parts))]


CASES = [
    (4, 4, [0, 48], True),
    (4, 2, [0, 11, 12, 30, 48], True),  # packed documents, one of a single token, one across the boundary at 24
    (4, 1, [0, 20, 48], True),  # fewer KV heads than ranks
    (12, 6, [0, 24, 48], True),  # on 2 ranks three KV heads each, on 4 two that the three queries share unevenly
    (12, 3, [0, 7, 48], True),  # on 4 ranks two share a KV head, on 2 each has two, unevenly
    (12, 2, [0, 1, 48], True),
    (4, 2, [0, 5, 48], False),
]


def attend_all() -> list[list[Tensor]]:
    return [attend(*case) for case in CASES]


@pytest.fixture(scope="module", params=[2, 4])
def attended(request: pytest.FixtureRequest) -> list[list[Tensor]]:
    return run_distributed(attend_all, request.param, 360)[1]


@pytest.mark.parametrize("case", range(len(CASES)), ids=[f"H{h}_Hkv{kv}_{len(b) - 1}docs" for h, kv, b, _ in CASES])
def test_ulysses_LHD_equals_one_process(attended, case):
    heads, kv_heads, bounds, causal = CASES[case]
    *parts, upstream = attention_inputs(heads, kv_heads)
    for x in parts:
        x.requires_grad_()
    out = varlen(*parts, torch.tensor(bounds, dtype=torch.int32), causal)
    out.backward(upstream)
    for got, wanted in zip(attended[case], [out.detach(), *(x.grad for x in parts)], strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_a_rank_receives_the_key_heads_that_its_queries_read():
    assert key_heads(8, 8, 4) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert key_heads(8, 2, 4) == [[0], [0], [1], [1]]
    assert key_heads(6, 3, 2) == [[0, 1], [1, 2]]
    assert key_heads(12, 4, 6) == [[0], [0, 1], [1], [2], [2, 3], [3]]


def odd_heads() -> None:
    grid = build_parallel_dims(2)
    q = torch.zeros(4, 3, 8)
    ulysses(grid.sequence_group)(q, q, q, torch.tensor([0, 8]), True)


def test_heads_not_divisible_by_the_ranks_are_named():
    with pytest.raises(RecipeError, match="sequence_parallel = 2 does not divide the model's 3 heads"):
        run_distributed(odd_heads, 2, 360)


Sizes = list[tuple[int, int]]


def sample(generator: torch.Generator, stills: Sizes, frames: Sizes, words: int) -> Sample:
    """Stills, then frames, each followed by words; sizes are (rows, columns) of tokens."""
    ids: list[int] = []
    for token, sizes in ((IMAGE, stills), (VIDEO, frames)):
        for rows, columns in sizes:
            ids += torch.randint(3, 64, (2,), generator=generator).tolist() + [token] * (rows * columns)
    ids += torch.randint(3, 64, (words,), generator=generator).tolist()
    input_ids = torch.tensor(ids)
    grids = [torch.tensor([[1, 2 * h, 2 * w] for h, w in sizes]).reshape(-1, 3) for sizes in (stills, frames)]
    pixels = [torch.randn(int(grid.prod(1).sum()), 3, 14, 14, generator=generator) for grid in grids]
    blocks = [(token, grid[:, 1:] // 2) for token, grid in zip((IMAGE, VIDEO), grids, strict=True) if len(grid)]
    return Sample(
        input_ids=input_ids,
        labels=torch.where(input_ids > 2, input_ids, -100),
        position_ids=stream_positions(input_ids, blocks),
        pixel_values=pixels[0] if stills else None,
        image_grid_thw=grids[0] if stills else None,
        pixel_values_videos=pixels[1] if frames else None,
        video_grid_thw=grids[1] if frames else None,
    )


def packs() -> dict[str, list[Sample]]:
    g = torch.Generator().manual_seed(1)
    return {
        "stills and frames": [
            sample(g, [(1, 2)], [], 9),
            sample(g, [], [(3, 2), (1, 1), (1, 1), (2, 2)], 7),
            sample(g, [], [], 6),
            sample(g, [(2, 1)], [(2, 3), (1, 2)], 4),
        ],
        "one frame for two ranks": [sample(g, [], [(2, 2)], 12)],
        "all frames at the end": [sample(g, [], [], 60), sample(g, [], [(2, 2), (2, 2), (1, 3)], 3)],
        "text alone": [sample(g, [], [], 15), sample(g, [], [], 6)],
    }


def only_mine(row: dict[str, Tensor], grid: ParallelDims) -> dict[str, Tensor]:
    """A pack of the loader: with the pixels of this rank's stills and frames only."""
    grids = [row[name] for name in ("image_grid_thw", "video_grid_thw") if name in row]
    if not grids:
        return row
    mine = own_pixels(row, vision_shares(torch.cat(grids), grid.sequence)[grid.sequence_rank])
    bare = {name: value for name, value in row.items() if not name.startswith("pixel_values")}
    return bare if mine is None else {**bare, "pixel_values_mine": mine}


def model_gradients(sequence: int) -> dict[str, tuple[float, dict[str, Tensor]]]:
    """Pack → summed loss and the gradient of every parameter, summed over the ranks."""
    grid = build_parallel_dims(sequence)
    found = {}
    for name, samples in packs().items():
        model = small.model(num_key_value_heads=2).train()
        row = pack(samples, 4)
        if sequence == 4:
            row = only_mine(row, grid)
        loss = model(**shard(row, grid, IMAGE, VIDEO), num_items_in_batch=1.0).loss
        loss.backward()
        missing = [key for key, p in model.named_parameters() if p.grad is None]
        assert not missing, f"every rank touches every parameter, but {missing}"
        gradients = {key: sum_over_ranks(p.grad) for key, p in model.named_parameters()}
        found[name] = (float(sum_over_ranks(loss)), gradients)
    return found


@pytest.fixture(scope="module", params=[2, 4])
def cut(request: pytest.FixtureRequest) -> dict[str, tuple[float, dict[str, Tensor]]]:
    return run_distributed(model_gradients, request.param, 360, request.param)[0]


@pytest.mark.parametrize("name", list(packs()))
def test_model_on_two_and_four_ranks_equals_one(cut, name):
    loss, gradients = model_gradients(1)[name]
    got_loss, got = cut[name]
    assert got_loss == pytest.approx(loss, rel=1e-5)
    assert got.keys() == gradients.keys()
    for key, wanted in gradients.items():
        # Gradients are of a sum over tens of tokens: compared at the scale of each parameter.
        scale = max(float(wanted.abs().max()), 1e-3)
        torch.testing.assert_close(got[key] / scale, wanted / scale, atol=1e-5, rtol=0, msg=lambda m, k=key: k + m)
    visual = [float(value.abs().max()) for key, value in gradients.items() if key.startswith("model.visual")]
    assert (max(visual) > 1e-3) == (name != "text alone")


def large_frame(sequence: int) -> dict[bool, tuple[float, dict[str, Tensor]]]:
    """Recomputed or not → loss and gradients of a pack whose large frames are divided among the ranks."""
    grid, found = build_parallel_dims(sequence), {}
    g = torch.Generator().manual_seed(3)
    samples = [sample(g, [(1, 2)], [], 5), sample(g, [(33, 32)], [(2, 2)] * 2, 7), sample(g, [], [(35, 40)], 4)]
    row = pack(samples, sequence)
    for recomputed in (False, True):
        model = small.model(num_attention_heads=6, num_key_value_heads=3).train()
        apply_memory_options(model, checkpointing=recomputed)
        inputs = shard(row if sequence == 1 else only_mine(row, grid), grid, IMAGE, VIDEO)
        assert sequence == 1 or len(inputs["frame_parts"]) == 2
        loss = model(**inputs, num_items_in_batch=1.0).loss
        loss.backward()
        gradients = {key: sum_over_ranks(p.grad) for key, p in model.named_parameters()}
        found[recomputed] = float(sum_over_ranks(loss)), gradients
    return found


@pytest.fixture(scope="module")
def large_alone() -> dict[bool, tuple[float, dict[str, Tensor]]]:
    return large_frame(1)


@pytest.mark.parametrize("ranks", [2, 3])  # the tower's 4 heads are not divided by 3
def test_frames_divided_among_ranks_have_the_loss_and_gradients_of_one_process(large_alone, ranks):
    got = run_distributed(large_frame, ranks, 360, ranks)[0]
    for recomputed, (loss, gradients) in large_alone.items():
        assert got[recomputed][0] == pytest.approx(loss, rel=1e-5)
        for key, wanted in gradients.items():
            scale = max(float(wanted.abs().max()), 1e-3)
            torch.testing.assert_close(
                got[recomputed][1][key] / scale, wanted / scale, atol=1e-5, rtol=0, msg=lambda m, k=key: k + m
            )


def test_one_rank_gets_the_pack_itself():
    row = pack(packs()["stills and frames"], 1)
    inputs = shard(row, build_parallel_dims(1), IMAGE, VIDEO)
    assert inputs.keys() == row.keys() and all(inputs[name] is row[name] for name in row)


def test_every_visual_token_reaches_the_rank_of_its_placeholder():
    # Stills of 1 and 2 tokens, frames of 3 and 1; the shares are not in the order of the ranks that take them.
    # The second rank has token 3 of the first frame, the first rank 4 and 5; parts come first in the features.
    grids = torch.tensor([[1, 2, 2], [1, 2, 4], [1, 2, 6], [1, 2, 2]])
    takers = torch.tensor([0, 2, 0, 0, 1, 1, 2])
    shares = [[Piece(1, 0, 2), Piece(2, 1, 2), Piece(3, 0, 1)], [Piece(0, 0, 1), Piece(2, 0, 1)], []]
    features = torch.arange(7.0)  # visual token j is the number j
    held = [torch.tensor([4.0, 5.0, 1.0, 2.0, 6.0]), torch.tensor([3.0, 0.0]), features[:0]]
    routes = [route_features(grids, shares, takers, rank) for rank in range(3)]
    sent = [list(mine[route.send].split(route.sent)) for mine, route in zip(held, routes, strict=True)]
    for rank, route in enumerate(routes):
        came = [parts[rank] for parts in sent]
        assert [len(part) for part in came] == route.got
        assert torch.cat(came)[route.order].tolist() == features[takers == rank].tolist()


def test_vision_shares_count_patches_and_their_squares():
    # 64 × 64 patches cost 4,096 + 2,467; the four frames of 1,024 patches 1,024 + 154 each.
    grids = torch.tensor([[1, 32, 32]] * 2 + [[1, 64, 64]] + [[1, 32, 32]] * 2)
    assert vision_shares(grids, 2) == [[Piece(2, 0, 1024)], [Piece(i, 0, 256) for i in (0, 1, 3, 4)]]


def test_large_frames_are_divided_only_if_complete_ones_are_uneven():
    large, small_one = [1, 128, 64], [1, 32, 32]
    whole = vision_shares(torch.tensor([large] * 4), 4)
    assert whole == [[Piece(frame, 0, 2048)] for frame in range(4)]
    cut = vision_shares(torch.tensor([large] * 5 + [small_one] * 8), 4)
    assert [[piece.frame for piece in share if piece.tokens == 512] for share in cut] == [[0]] * 4
    assert sorted(piece.first for share in cut for piece in share if piece.frame == 0) == [0, 512, 1024, 1536]


# Heights and widths in patches: a still of 20,480 tokens among video frames, two large ones, one alone, a strip.
LARGE = {
    "a still of 20,480 tokens in a pack of 131,072": ([(256, 320)] + [(28, 44)] * 340, 131_072),
    "two large stills": ([(256, 320), (200, 180)] + [(16, 24)] * 900, 131_072),
    "one large still alone": ([(256, 320)], 32_768),
    "a strip": ([(2, 40_000)] + [(10, 10)] * 30, 32_768),
}


@pytest.mark.parametrize("name", LARGE)
def test_costs_of_a_sequence_group_are_within_five_per_cent_of_their_mean(name):
    frames, tokens = LARGE[name]
    config = KeyeConfig.preset("keye_8b")
    shares = vision_shares(torch.tensor([(1, *frame) for frame in frames]), 8)
    costs = [rank_operations(config, share, frames, [tokens], 0, 8) for share in shares]
    assert max(costs) / (sum(costs) / 8) < 1.05
    assert sum(costs) == pytest.approx(flops.training_step(config, frames, [tokens], 0), rel=1e-4)


@given(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=12), st.integers(1, 8))
def test_every_token_is_encoded_by_one_rank(sizes, ranks):
    grids = torch.tensor([(1, 2 * height, 2 * width) for height, width in sizes])
    shares = vision_shares(grids, ranks)
    tokens = [(p.frame, token) for share in shares for p in share for token in range(p.first, p.first + p.tokens)]
    assert sorted(tokens) == [(i, token) for i, (height, width) in enumerate(sizes) for token in range(height * width)]
    assert all(share == sorted(share) for share in shares)


def test_frames_are_assigned_largest_first():
    assert share_frames([5.0, 1.0, 4.0, 2.0], 2) == [[0, 1], [2, 3]]
    assert share_frames([1.0, 1.0, 1.0], 2) == [[0, 2], [1]]
    assert share_frames([3.0], 2) == [[0], []]


@given(st.lists(st.floats(0.1, 100), max_size=40), st.integers(1, 8))
def test_loads_differ_by_at_most_one_frame(costs, ranks):
    shares = share_frames(costs, ranks)
    assert sorted(sum(shares, [])) == list(range(len(costs))) and all(share == sorted(share) for share in shares)
    loads = [sum(costs[i] for i in share) for share in shares]
    assert max(loads) - min(loads) <= max(costs, default=0) + 1e-6


def places() -> tuple[int, int, int, list[int]]:
    grid = build_parallel_dims(2)
    return grid.data_rank, grid.sequence_rank, grid.data_size, dist.get_process_group_ranks(grid.sequence_group)


@pytest.mark.slow
def test_grid_of_four_has_two_sequence_groups():
    first, second = [0, 1], [2, 3]
    assert run_distributed(places, 4, 180) == [(0, 0, 2, first), (0, 1, 2, first), (1, 0, 2, second), (1, 1, 2, second)]


def test_sequence_parallel_that_does_not_divide_the_processes_is_named():
    with pytest.raises(RecipeError, match="sequence_parallel = 2 needs a multiple of 2 processes, and 1 was started"):
        build_parallel_dims(2)
    assert build_parallel_dims(1).sequence_group is None


def backends_used() -> list[str]:
    """Backends that computed attention on this rank: in the decoder over the whole pack, in the tower over parts."""
    used, run = [], attention.run

    def noted(name: str, *args: object) -> Tensor:
        used.append(name)
        return run(name, *args)

    attention.run = noted
    grid, row = build_parallel_dims(2), pack(packs()["stills and frames"], 4)
    small.model().language_model(
        inputs_embeds=torch.randn(1, row["input_ids"].shape[1] // 2, 128),
        position_ids=shard(row, grid, IMAGE, VIDEO)["position_ids"],
        attention_mask=torch.empty(0, 0, 0, 0),
        use_cache=False,
        cu_seqlens=row["cu_seqlens"],
        varlen_fn=shard(row, grid, IMAGE, VIDEO, "plain")["varlen"],
    )
    return used


def test_sequence_parallel_attention_uses_the_backend_of_the_config():
    assert run_distributed(backends_used, 2, 120)[0] == ["plain"] * 2


def shared_key_gradient() -> float:
    """Gradient of the one key head that four ranks' query heads read: 256 of the first, 1 of each other."""
    grid, upstream = build_parallel_dims(4), torch.ones(2, 4, 8, dtype=torch.bfloat16)
    upstream[:, 0] = 256
    q, k, v = (torch.zeros(2, heads, 8, dtype=torch.bfloat16, requires_grad=True) for heads in (4, 1, 1))
    given = ulysses(grid.sequence_group, lambda q, k, v, cu_seqlens, causal: q * 0 + k + v * 0)
    given(q, k, v, torch.tensor([0, 8]), True).backward(upstream)
    return float(k.grad.max())


def test_gradients_of_a_shared_key_head_are_summed_in_fp32():
    assert run_distributed(shared_key_gradient, 4, 120) == [float(torch.tensor(259.0).bfloat16())] * 4
