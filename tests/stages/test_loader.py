"""Any number of ranks makes the same packs in the same steps; errors reach all ranks."""

import random
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from keye.errors import KeyeError, VideoError
from keye.processor.processor import Sample
from keye.slowfast.pixels import normalised
from stages.data.collate import pack, with_share
from stages.data.items import Cache, Item
from stages.data.loader import BatchStream, Loader
from stages.data.packing.balance import Cost, assign_rounds
from stages.data.packing.mixture import Mixture
from stages.data.packing.packer import BalancedPacker
from stages.data.packing.planner import Planner
from stages.data.quarantine import Quarantine
from stages.data.sources.source import Source
from stages.distributed.parallel import ParallelDims, Piece, build_parallel_dims
from stages.multitask import Multitask
from stages.recipe import SourceRecipe, StageRecipe
from tests.distributed import run_distributed
from tests.stages import small

RECIPE = StageRecipe(steps=4, learning_rate=1e-3, context=256, global_batch_size=4)
ALONE = ParallelDims(0, 1, 1, None)


def loader_of(manifest: Path, grid: ParallelDims, workers: int = 2) -> Loader:
    made = small.processor()
    cache, quarantine = Cache(1 << 24), Quarantine()
    sources = [
        (Source(SourceRecipe(str(manifest), kind), made, 0, cache, quarantine, limit=RECIPE.context), share)
        for kind, share in (("video", 0.6), ("image", 0.2), ("text", 0.2))
    ]
    return Multitask(RECIPE, made).loader(Mixture(sources), grid, small.model(made), workers)


def steps_of(loader: Loader, grid: ParallelDims, count: int) -> list[list[dict[str, Any]]]:
    """The batches of this rank, step by step."""
    return [[loader.next() for _ in range(RECIPE.global_batch_size // grid.data_size)] for _ in range(count)]


def fed(manifest: Path, sequence: int, count: int, state: dict[str, Any] | None = None) -> tuple[Any, Any]:
    grid = build_parallel_dims(sequence)
    loader = loader_of(manifest, grid)
    if state is not None:
        loader.load_state_dict(state)
    found = steps_of(loader, grid, count)
    after = loader.state_dict()
    loader.close()
    return found, after


def all_ways(manifest: Path) -> list[tuple[Any, Any]]:
    """Data-parallel, data-parallel in two runs, and as a sequence group."""
    begun = fed(manifest, 1, 2)
    return [fed(manifest, 1, 4), begun, fed(manifest, 1, 2, begun[1]), fed(manifest, 2, 4)]


def key(batch: dict[str, Any]) -> tuple[float, ...]:
    """Tokens and pixels of a pack: the small world has the same question for several clips."""
    pixels = [batch[name] for name in ("pixel_values", "pixel_values_videos") if name in batch]
    weights = [float((p.double().flatten() * torch.arange(p.numel()).remainder(251)).sum()) for p in pixels]
    return *batch["input_ids"][0].tolist(), *weights


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    return small.world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def alone(manifest) -> tuple[Any, Any]:
    return fed(manifest, 1, 4)


@pytest.fixture(scope="module")
def two(manifest) -> list[list[tuple[Any, Any]]]:
    return run_distributed(all_ways, 2, 360, manifest)


def test_two_ranks_make_the_packs_of_one_in_the_same_steps(alone, two):
    for step, wanted in enumerate(alone[0]):
        got = [batch for rank in two for batch in rank[0][0][step]]
        assert sorted(map(key, got)) == sorted(map(key, wanted))
        mine = {key(batch): batch for batch in got}
        for batch in wanted:
            same(mine[key(batch)], batch)


def same(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]) if isinstance(value, Tensor) else value == two[name], name


def test_state_of_rank_0_is_the_same_for_every_number_of_ranks(alone, two):
    assert two[0][0][1] == two[0][3][1] == alone[1]
    assert two[1][0][1] == {"planner": {}}  # only rank 0 has the planner's state


class Counting:
    """Counts the collectives of the loader's thread: calls into torch.distributed."""

    def __init__(self) -> None:
        self.calls = 0
        for name in ("all_gather", "broadcast", "gather", "all_reduce", "all_to_all_single"):
            setattr(dist, name, self.counted(getattr(dist, name)))
            if hasattr(dist.distributed_c10d, name):
                setattr(dist.distributed_c10d, name, getattr(dist, name))

    def counted(self, call: Any) -> Any:
        def counting(*args: Any, **more: Any) -> Any:
            self.calls += 1
            return call(*args, **more)

        return counting


def one_planner() -> tuple[int, int, int, int]:
    """Collectives of six steps of many short samples, the number of samples, and those drawn and encoded here."""
    draw = random.Random(5)
    source = small.Lengths("f", "text", [draw.randint(2, 6) for _ in range(499)])
    loader = numbers(source, build_parallel_dims(1), packs=2, context=2048)
    samples = sum(len(loader.next()["indices"]) for _ in range(8))
    counting = Counting()
    before = sum(len(loader.next()["indices"]) for _ in range(6))
    calls = counting.calls
    dist.barrier()
    loader.close()
    return calls, samples + before, source.at, len(source.seen)


def test_one_rank_plans_for_all_with_few_exchanges_per_step():
    (calls, samples, drawn, seen), (_, more, none, other) = run_distributed(one_planner, 2, 360)
    assert samples + more > 14 * 900
    assert drawn and not none  # the other rank draws nothing
    assert abs(seen - other) <= 0.1 * seen  # but encodes equally many
    assert calls < 6 * 40  # six steps of about a thousand samples


def test_resume_on_another_number_of_ranks_keeps_the_order(manifest, alone, two):
    first, second = two[0][1], two[0][2]
    assert second[1] == alone[1]
    resumed, state = fed(manifest, 1, 2, first[1])  # started on two ranks, resumed on one
    assert state == alone[1]
    for got, wanted in zip(resumed, alone[0][2:], strict=True):
        assert [key(batch) for batch in got] == [key(batch) for batch in wanted]


def test_rank_of_a_sequence_group_has_all_tokens_but_only_its_pixels(alone, two):
    for step, wanted in enumerate(alone[0]):
        for batch, parts in zip(wanted, zip(two[0][3][0][step], two[1][3][0][step], strict=True), strict=True):
            count = batch["input_ids"].shape[1]
            for part in parts:
                assert torch.equal(part["input_ids"][:, :count], batch["input_ids"])
                assert not {"pixel_values", "pixel_values_videos"} & part.keys()
                for name in ("image_grid_thw", "video_grid_thw"):
                    assert name not in batch or torch.equal(part[name], batch[name])
            whole = [batch[name] for name in ("pixel_values", "pixel_values_videos") if name in batch]
            pieces = [part["pixel_values_mine"] for part in parts if "pixel_values_mine" in part]
            assert sum(map(len, pieces)) == sum(map(len, whole))
            assert sorted(map(total, torch.cat(pieces))) == sorted(map(total, torch.cat(whole)))


def test_part_of_a_large_still_is_sent_as_the_patches_of_its_tokens():
    # A still of 2 × 3 tokens; tokens 1 to 3 are its top middle, top right and bottom left squares.
    pixels = torch.arange(24.0).reshape(24, 1, 1, 1).expand(24, 3, 14, 14)
    ids = torch.full((6,), 5)
    sample = Sample(ids, ids, ids.expand(3, -1), pixels, torch.tensor([[1, 4, 6]]))
    sent = with_share(Item(sample, "s", 0, "image", ""), ([Piece(0, 1, 3)], [])).sample
    assert sent.pixel_values[:, 0, 0, 0].tolist() == [2, 3, 8, 9, 4, 5, 10, 11, 12, 13, 18, 19]


def total(patch: Tensor) -> float:
    return float(normalised(patch).double().sum())


# --- bad samples and errors


class Faulty(small.Lengths):
    """Its owner gets an error at sample 7."""

    def items(self, index: int) -> list[Item]:
        if index == 7:
            raise VideoError("clip 7 is gone")
        return super().items(index)


def numbers(source: small.Lengths, grid: ParallelDims, packs: int = 2, context: int = 40) -> Loader:
    cost = Cost(small.model().config)
    planner = Planner(Mixture([(source, 1.0)]), BalancedPacker(context, packs, cost.per_token))

    def assemble(items: list[Item]) -> dict[str, Any]:
        return pack([item.sample for item in items]) | {"indices": [item.index for item in items]}

    return Loader(BatchStream(planner, cost, assign_rounds, assemble, grid), grid)


class Unsendable(small.Lengths):
    """The items of rank 1 have a caption that tensors and plain values cannot express."""

    def items(self, index: int) -> list[Item]:
        items = super().items(index)
        return [replace(item, caption=Fraction(1, 2)) for item in items] if index % 2 else items


def meets_an_error(kind: type[small.Lengths]) -> tuple[str, str]:
    loader = numbers(kind("f", "text", [10, 7, 3]), build_parallel_dims(1))
    try:
        for _ in range(20):
            loader.next()
    except KeyeError as error:
        message = type(error).__name__, str(error)
    loader.close()
    return message


def test_error_on_one_rank_is_the_same_on_all():
    assert run_distributed(meets_an_error, 2, 360, Faulty) == [("VideoError", "clip 7 is gone")] * 2


def test_an_item_that_cannot_be_sent_is_an_error_of_all_ranks():
    one, two = run_distributed(meets_an_error, 2, 360, Unsendable)
    assert one == two and one[0] == "KeyeError" and "Fraction" in one[1]


def reads_other_data(copies: list[list[int]]) -> tuple[str, str]:
    grid = build_parallel_dims(1)
    loader = numbers(small.Lengths("copy", "text", copies[grid.rank]), grid)
    try:
        loader.next()
    except KeyeError as error:
        message = type(error).__name__, str(error)
    loader.close()
    return message


def test_ranks_that_read_different_data_are_named_before_the_first_step():
    first, second = run_distributed(reads_other_data, 2, 360, [[10, 7, 3], [10, 7, 3, 5]])
    assert first == second and first[0] == "ManifestError"
    assert "copy: the ranks read different data: rank 0" in first[1] and "rows 3" in first[1] and "rows 4" in first[1]


class Lossy(dict):
    """Has lost sample 6."""

    def get(self, ref: tuple[int, int, int]) -> Item | None:
        return None if ref[1] == 6 else super().get(ref)


def loses_a_sample() -> tuple[str, str]:
    loader = numbers(small.Lengths("f", "text", [10, 7, 3]), build_parallel_dims(1))
    loader.stream.kept = Lossy()
    try:
        for _ in range(20):
            loader.next()
    except KeyeError as error:
        message = type(error).__name__, str(error)
    loader.close()
    return message


def test_planned_samples_must_arrive():
    first, second = run_distributed(loses_a_sample, 2, 360)
    assert first == second and first[1].endswith("sample 6 of f did not come from rank 0")


class Books(small.Lengths):
    """Every sample is a document with its length as the number of parts, of 7 tokens each."""

    def items(self, index: int) -> list[Item]:
        self.seen.append(index)
        count = self.lengths[index % len(self.lengths)]
        return [Item(small.text_sample(7, 3 + 7 * i), self.name, index, "text", "", i) for i in range(count)]


def test_parts_of_split_documents_are_trained_on_once_also_after_a_resume():
    def read(state: dict[str, Any] | None, steps: int) -> tuple[list[Any], dict[str, Any], Books]:
        source = Books("b", "text", [1, 9, 4])
        loader = numbers(source, ALONE)
        if state is not None:
            loader.load_state_dict(state)
        found = [loader.next() for _ in range(2 * steps)]
        after = loader.state_dict()
        loader.close()
        return [(batch["indices"], batch["input_ids"][0].tolist()) for batch in found], after, source

    whole, _, _ = read(None, 12)
    begun, state, _ = read(None, 5)
    resumed, _, source = read(state, 7)
    assert begun + resumed == whole
    assert len(source.seen) == len(set(source.seen))  # the waiting parts of a document are encoded together
    trained = [(index, first) for indices, ids in whole for index, first in zip(indices, ids[::7], strict=True)]
    assert len(trained) == len(set(trained))
    first = {index for index, _ in trained[: len(trained) // 2]}
    assert all((index, 3 + 7 * i) in trained for index in first for i in range([1, 9, 4][index % 3]))


def test_only_the_owner_encodes_and_bad_samples_are_skipped():
    found = run_distributed(owners, 2, 360)
    for rank, (seen, indices) in enumerate(found):
        assert seen and all(index % 2 == rank for index in seen)
        assert all(index % 3 for index in indices)
    assert not set(found[0][1]) & set(found[1][1])


def owners() -> tuple[list[int], list[int]]:
    source = small.Lengths("f", "text", [0, 7, 3])
    loader = numbers(source, build_parallel_dims(1))
    indices = [index for _ in range(3) for index in loader.next()["indices"]]
    dist.barrier()
    loader.close()
    return source.seen, indices
