"""Packs are full, of equal cost and in the mixture's shares, also after a resume; no sample is lost."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keye.errors import CheckpointError
from stages.data.packing.balance import assign_rounds
from stages.data.packing.mixture import Mixture
from stages.data.packing.packer import BalancedPacker, PairPacker
from stages.data.packing.planner import Planner
from stages.data.packing.samples import Block, Encoded, Meta
from tests.stages import small

PER_TOKEN = 10


class Plans:
    """A planner with synthetic samples: kind → (share, tokens of each, excess per token)."""

    def __init__(
        self,
        parts: dict[str, tuple[float, list[int], int]],
        former: BalancedPacker | PairPacker,
        lead: dict[str, int] | None = None,
    ) -> None:
        self.parts = parts
        sources = [(small.Lengths(kind, kind, lengths), share) for kind, (share, lengths, _) in parts.items()]
        self.planner, self.blocks = Planner(Mixture(sources, lead), former), 0

    def meta(self, kind: str, index: int) -> Meta | None:
        _, lengths, density = self.parts[kind]
        tokens = lengths[index % len(lengths)]
        return Meta(kind, index, kind, tokens, tokens - 1, (), (), density * tokens) if tokens else None

    def step(self) -> list[list[Meta]]:
        self.planner.draws()
        while self.planner.hungry():
            self.blocks += 1
            self.planner.take(self.encoded(self.planner.flight[0]))
            self.planner.draws()
        names = self.planner.mixture.names
        return [
            [self.meta(names[source], index) for source, index, _ in pack.refs] for pack in self.planner.plan().packs()
        ]

    def encoded(self, block: Block) -> Encoded:
        names = self.planner.mixture.names
        metas = [self.meta(names[s], i) for s, i in zip(block.source.tolist(), block.index.tolist(), strict=True)]
        return Encoded.of(names, metas)


def lengths(seed: int, low: int, high: int, count: int = 499) -> list[int]:
    draw = random.Random(seed)
    return [draw.randint(low, high) for _ in range(count)]


def three_kinds() -> dict[str, tuple[float, list[int], int]]:
    return {
        "video": (0.24, lengths(1, 200, 900), 5),
        "image": (0.50, lengths(2, 40, 400), 8),
        "text": (0.26, lengths(3, 20, 700), 0),
    }


@settings(max_examples=25, deadline=None)
@given(
    numbers=st.lists(st.integers(0, 40), min_size=1, max_size=60).filter(any),
    context=st.integers(40, 120),
    packs=st.integers(1, 4),
    steps=st.integers(1, 6),
)
def test_nothing_is_lost_and_no_pack_is_over_the_context(numbers, context, packs, steps):
    plans = Plans({"text": (1.0, numbers, 1)}, BalancedPacker(context, packs, PER_TOKEN))
    seen: list[int] = []
    for _ in range(steps):
        step = plans.step()
        assert len(step) == packs
        for pack in step:
            assert pack and sum(meta.tokens for meta in pack) <= context
            seen += [meta.index for meta in pack]
    # Each drawn sample is exactly once in a pack, in the pool, in flight, or bad.
    waiting = plans.planner.pool.index.tolist()
    waiting += [index for block in plans.planner.flight for index in block.index.tolist()]
    drawn = range(plans.planner.mixture.sources["text"].at)
    taken = set(drawn) - {index for block in plans.planner.flight for index in block.index.tolist()}
    bad = [index for index in taken if plans.meta("text", index) is None]
    assert sorted(seen + waiting + bad) == list(drawn)


@pytest.mark.parametrize("packs", [1, 8])
def test_packs_are_full_and_shares_are_kept(packs):
    plans = Plans(three_kinds(), BalancedPacker(8192, packs, PER_TOKEN))
    fills = [sum(meta.tokens for meta in pack) / 8192 for _ in range(30) for pack in plans.step()]
    assert min(fills) > 0.98 and sum(fills) / len(fills) > 0.995
    for kind, share in plans.planner.realised().items():
        assert share == pytest.approx(plans.parts[kind][0], abs=0.01)


@pytest.mark.parametrize("packs", [1, 8])
def test_a_source_gives_its_first_tokens_before_the_shares_apply(packs):
    amount, parts = 8192 * packs, three_kinds()
    plans, resumed = (Plans(parts, BalancedPacker(8192, packs, PER_TOKEN), {"image": 10 * amount}) for _ in range(2))
    kinds: list[dict[str, int]] = []
    for step in range(50):
        if step == 7:  # in the middle of the first tokens
            resumed.planner.load_state_dict(plans.planner.state_dict())
        packed = plans.step()
        if step >= 7:
            assert resumed.step() == packed
        kinds.append(dict.fromkeys(parts, 0))
        for meta in (meta for pack in packed for meta in pack):
            kinds[-1][meta.kind] += meta.tokens
    for first in kinds[:8]:
        assert first["image"] == sum(first.values()) > 0.98 * amount
    total = {kind: sum(step[kind] for step in kinds) for kind in parts}
    after = sum(total.values()) - 10 * amount
    for kind, (share, _, _) in parts.items():
        given = total[kind] - (10 * amount if kind == "image" else 0)
        assert given / after == pytest.approx(share, abs=0.01)
        assert plans.planner.realised()[kind] == pytest.approx(total[kind] / sum(total.values()))


@pytest.mark.parametrize(("packs", "ranks"), [(4, 2), (16, 2), (16, 4)])
def test_packs_of_a_round_have_similar_costs(packs, ranks):
    plans, slowest, mean = Plans(three_kinds(), BalancedPacker(8192, packs, PER_TOKEN)), 0.0, 0.0
    for _ in range(20):
        costs = [sum(meta.tokens * PER_TOKEN + meta.excess for meta in pack) for pack in plans.step()]
        for round_ in zip(*assign_rounds(costs, ranks), strict=True):
            of_ranks = [costs[pack] for (pack,) in round_]
            slowest, mean = slowest + max(of_ranks), mean + sum(of_ranks) / ranks
    assert slowest < 1.05 * mean


def test_no_sample_waits_forever():
    parts = three_kinds() | {"image": (0.50, [*lengths(2, 40, 400), 6000], 8)}  # one without similar samples
    plans = Plans(parts, BalancedPacker(8192, 4, PER_TOKEN))
    for _ in range(60):
        plans.step()
        assert (plans.planner.step - plans.planner.pool.born <= 2 * BalancedPacker.patience).all()


def test_sample_without_similar_ones_waits_while_its_kind_has_others():
    parts = {"text": (0.5, lengths(4, 20, 60), 0), "image": (0.5, [600, *lengths(5, 20, 60, 150)], 40)}
    plans, left = Plans(parts, BalancedPacker(1000, 4, PER_TOKEN, balanced_packs=2)), []
    for number in range(12):
        left += [number for pack in plans.step() for meta in pack if meta.tokens == 600]
    # It was in the pool before the first step and leaves it because of its age.
    assert 0 < left[0] <= BalancedPacker.patience


@pytest.mark.parametrize("balanced_packs", [1, 2, 4])
def test_expensive_samples_come_in_groups_of_a_round(balanced_packs):
    parts = {"text": (0.6, lengths(4, 5, 60), 0), "video": (0.3, lengths(5, 20, 90), 5), "image": (0.1, [600], 40)}
    plans, steps = Plans(parts, BalancedPacker(1000, 4, PER_TOKEN, balanced_packs)), []
    for number in range(120):
        expensive = [pack for pack in plans.step() if any(meta.tokens == 600 for meta in pack)]
        if expensive and number >= 60:  # at first too many are drawn, because their length is unknown
            steps.append(len(expensive))
            costs = [sum(meta.tokens * PER_TOKEN + meta.excess for meta in pack) for pack in expensive]
            assert max(costs) < 1.05 * min(costs)
    assert len(steps) > 3 and all(count % balanced_packs == 0 for count in steps)


@pytest.mark.parametrize("after", [0, 1, 7])
@pytest.mark.parametrize("former", [BalancedPacker(1024, 2, PER_TOKEN), PairPacker(12)], ids=["packs", "pairs"])
def test_resumed_planner_makes_the_same_steps(after, former):
    whole, begun = Plans(three_kinds(), former), Plans(three_kinds(), former)
    for _ in range(after):
        whole.step(), begun.step()
    state = begun.planner.state_dict()
    for _ in range(3):  # later steps do not change the state
        begun.step()
    resumed = Plans(three_kinds(), former)
    blocks = resumed.planner.load_state_dict(state)
    counts = [len(part["index"]) for part in (state["pool"], *state["flight"])]
    assert [len(block) for block in blocks] == counts
    for _ in range(12):
        assert whole.step() == resumed.step()


def test_pairs_of_a_step_keep_their_shares():
    plans = Plans(three_kinds(), PairPacker(64))
    for _ in range(30):
        assert [len(pack) for pack in plans.step()] == [1] * 64
    for kind, share in plans.planner.realised().items():
        assert share == pytest.approx(plans.parts[kind][0], abs=0.01)


def test_step_of_short_samples_takes_as_few_blocks_as_one_of_long_ones():
    parts = {"text": (1.0, lengths(6, 8, 40), 1)}
    plans = Plans(parts, BalancedPacker(8192, 8, PER_TOKEN))
    for _ in range(3):  # at first the lengths are unknown
        plans.step()
    plans.blocks = 0
    for _ in range(6):
        assert sum(map(len, plans.step())) > 2000
    assert plans.blocks <= 6 * 6


def test_state_of_other_sources_is_refused():
    state = Plans({"a": (1.0, [3], 0)}, PairPacker(2)).planner.state_dict()
    with pytest.raises(CheckpointError, match="other data.sources"):
        Plans({"b": (1.0, [3], 0)}, PairPacker(2)).planner.load_state_dict(state)
