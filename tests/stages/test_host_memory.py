"""The host memory of a node, by hand."""

from dataclasses import replace
from pathlib import Path

import pytest

from keye.model.config import KeyeConfig
from stages.cost import report as cost_report
from stages.cost.estimate import Assumptions, estimate
from stages.cost.footprint import Plan, Share
from stages.cost.gpus import gpu_named
from stages.cost.host_memory import Node, host_footprint
from stages.recipe import load

RECIPES = Path(__file__).resolve().parents[2] / "stages" / "recipes"
CONFIG = KeyeConfig.preset("keye_8b")  # hidden 4,096, 36 layers, 151,936 tokens
NODE = Node(ranks=8, process=2e9)
STEP = Share(tokens=64_000, patches=128_000, labels=0)


def test_samples_and_cache_by_hand():
    made = host_footprint(CONFIG, Plan(2, 2, 64), NODE, STEP, 8e9, 8e9, cache=4e9)
    assert made.processes == 16e9 and made.cache == 32e9
    # A token is an id, a label and three positions of 8 bytes; a patch 3 × 14 × 14 bytes. A rank has a 64th of a step.
    sample = 1_000 * 40 + 2_000 * 588
    assert made.samples == 8 * sample  # of prepared batches; the cache has the samples of the four steps that wait
    for cache, more in ((0.0, 4 * sample), (sample, 3 * sample)):
        less = host_footprint(CONFIG, Plan(2, 2, 64), NODE, STEP, 8e9, 8e9, cache=cache)
        assert less.samples == 8 * (sample + more)
    assert made.offload == made.drawn == 0
    assert made.moments["in a step"] == 48e9 + made.samples


def test_a_node_of_fewer_ranks_than_gpus_counts_them_alone():
    made = host_footprint(CONFIG, Plan(2, 2, 2), NODE, STEP, 8e9, 8e9, cache=1e9)
    assert made.processes == 4e9 and made.cache == 2e9


@pytest.mark.parametrize(
    ("zero", "ranks", "wanted"),
    [
        (2, 64, 16e9 + 7 * 4 * 8e9 / 64),  # the first rank writes 8 G weights in bf16, seven others their flat masters
        (1, 8, 16e9 + 7 * 4 * 8e9 / 8),
        (3, 64, 8 * 4 * 8e9 / 64),  # the weights are also partitioned and smaller than the masters
        (0, 64, 16e9),
    ],
)
def test_written_tensors_pass_through_the_host_one_storage_at_a_time(zero, ranks, wanted):
    assert host_footprint(CONFIG, Plan(2, zero, ranks), NODE, STEP, 8e9, 8e9).written == wanted


def test_a_small_share_still_counts_the_largest_tensor():
    made = host_footprint(CONFIG, Plan(2, 3, 4096), NODE, STEP, 8e9, 8e9)
    assert made.written == 4 * 151_936 * 4096  # the embeddings in fp32, when the stage's model is written


def test_inputs_in_pinned_memory_take_powers_of_two():
    plan = Plan(2, 1, 64, checkpointing=True, offload=True)
    made = host_footprint(CONFIG, plan, NODE, STEP, 8e9, 8e9, pinned=16_384)
    assert made.offload == 8 * 36 * 2 * 4096 * 16_384  # 128 MiB a layer, a power of two
    more = host_footprint(CONFIG, plan, NODE, STEP, 8e9, 8e9, pinned=16_385)
    assert more.offload == 2 * made.offload


@pytest.mark.parametrize(
    ("zero", "wanted"),
    [
        # 8 G parameters on 64 ranks: a rank's fp32 share is 0.5 GB, a storage of 2^29 bytes, for weights and two
        # moments; the first rank's 16 GB in bf16 take 2^34.
        (2, 8 * 3 * 2**29 + 2**34),
        (3, 8 * (3 * 2**29 + 2**28)),
        (0, 2 * 8e9 + 8 * 8e9),
    ],
)
def test_background_checkpoints_need_a_copy_of_everything_that_a_node_writes(zero, wanted):
    made = host_footprint(CONFIG, Plan(2, zero, 64), NODE, STEP, 8e9, 8e9, background=True)
    assert made.copied == wanted
    assert made.moments["in a step"] == made.processes + made.samples + wanted
    assert made.written == 4 * 151_936 * 4096  # a stage's model still passes through the host one tensor at a time
    assert host_footprint(CONFIG, Plan(2, zero, 64), NODE, STEP, 8e9, 8e9).copied == 0


def test_drawn_weights_are_fp32_and_one_rank_draws_the_model():
    made = host_footprint(CONFIG, Plan(2, 2, 64), NODE, STEP, 1e9, 1e9, drawn=0.5e9, drawn_once=8e9)
    assert made.drawn == 4 * (8 * 0.5e9 + 8e9) and made.moments["at the start"] == 16e9 + made.drawn


def test_a_share_of_zero_3_passes_through_the_host_at_the_start():
    made = host_footprint(CONFIG, Plan(2, 3, 64), NODE, STEP, 8e9, 4e9)
    assert made.flattened == 8 * 2 * 4e9 / 64 and made.moments["at the start"] == 16e9 + made.flattened
    assert host_footprint(CONFIG, Plan(2, 2, 64), NODE, STEP, 8e9, 4e9).flattened == 0


def test_no_stage_of_keye_8b_holds_the_model_once_for_each_rank():
    recipe, gpu = load(RECIPES / "keye_8b.toml"), gpu_named("h100")
    costs = estimate(recipe, gpu, 64, Assumptions(node=Node(8, 0.0)))
    for made in costs:
        assert made.host.cache == 8 * (4096 << 20)
        assert made.host.peak - made.host.cache < 4 * 8.6e9  # less than one copy in fp32, of which there were eight
    fresh = estimate(replace(recipe, model=replace(recipe.model, path="")), gpu, 64)
    assert [made.host.drawn > 4 * 8e9 for made in fresh] == [True, False, False, False]


def test_host_memory_is_in_the_table_and_in_json():
    recipe, gpu, assumed = load(RECIPES / "keye_8b.toml"), gpu_named("h100"), Assumptions(node=Node(4))
    costs = estimate(recipe, gpu, 64, assumed)
    message = cost_report.table(costs)
    assert "GB a node" in message and all(f"{made.host.peak / 1e9:.1f}" in message for made in costs)
    written = cost_report.as_json(recipe, gpu, 64, assumed, costs)
    assert written["phases"][2]["host"]["peak"] == costs[2].host.peak
    assert written["assumed"]["node"] == {"ranks": 4, "process": 3e9}
    assert "4 processes per node" in cost_report.sentence(recipe, gpu, 64, assumed)
