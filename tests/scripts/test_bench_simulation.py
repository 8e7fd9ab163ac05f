"""The simulation of ranks counts memory correctly and finds ranks that differ."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from scripts.bench.common.record import ROOT
from scripts.bench.stages.simulated import drawn
from scripts.bench.stages.simulated.compare import collectives
from scripts.bench.stages.simulated.rank import Measured, Simulated
from scripts.bench.stages.simulated.shapes import Shapes
from stages.data.packing.samples import Meta
from stages.distributed.collectives import Collective
from stages.distributed.parallel import ParallelDims


def test_memory_without_values_is_that_of_the_tensors_alive():
    with Shapes() as shapes:
        x = torch.empty(1000, 256)
        assert x.is_meta and shapes.memory.now == 1000 * 256 * 4
        y = (x @ torch.empty(256, 512)).relu()
        # The second factor and the product that relu read are gone again.
        assert shapes.memory.now == 1000 * (256 + 512) * 4
        view = y[:10].t()
        assert shapes.memory.now == 1000 * (256 + 512) * 4
        del x, y
        assert shapes.memory.now == 1000 * 512 * 4
        del view
        assert shapes.memory.now == 0


def test_lengths_stay_real_together_with_tensors_without_values():
    with Shapes(), torch.device("meta"):
        table = nn.Embedding(64, 32)
    with Shapes():
        ids = torch.tensor([3, 0, 5, 0])
        rows = table(ids)[ids != 0]
        assert rows.shape == (2, 32) and rows.is_meta
        rows.float().sum().backward()
        assert table.weight.grad.shape == (64, 32)
        assert float(rows.norm()) == 1.0


def test_drawn_batch_has_the_lengths_of_its_plan():
    metas = [
        Meta("a", 0, "video", 90, 7, ((4, 6),), ((8, 4), (4, 4)), 0),
        Meta("b", 1, "text", 30, 12, (), (), 0),
    ]
    row = drawn.language_batch(metas, ParallelDims(0, 1, 1, None))
    assert row["cu_seqlens"].tolist() == [0, 90, 120]
    assert (row["shift_labels"] != -100).sum() == 7 + 12
    assert len(row["pixel_values"]) == 24 and len(row["pixel_values_videos"]) == 48
    assert row["kinds"] == {"video": 90, "text": 30}


def test_ranks_that_differ_are_named():
    def rank(number: int, *calls: Collective) -> Simulated:
        return Simulated(number, list(calls), Measured(), 0, (0, 0, 0))

    over_all, in_group = Collective("all_reduce", 4, "float32", 8), Collective("all_to_all_single", 2, "float32", -1)
    same = [rank(0, in_group, over_all), rank(1, in_group, over_all), rank(2, over_all), rank(3, over_all)]
    assert collectives(same, 2) is None  # collectives within a group may differ between groups
    assert "rank 1" in collectives([*same[:1], rank(1, over_all), *same[2:]], 2)
    assert "rank 3" in collectives([*same[:3], rank(3, over_all, over_all)], 2)


@pytest.mark.slow
def test_quick_simulation_of_a_stage_leaves_its_record(tmp_path):
    command = [sys.executable, "-m", "scripts.bench.stages.simulation", "--quick", "--phase", "annealing"]
    subprocess.run([*command, "--out", str(tmp_path), "--processes", "1"], check=True, cwd=ROOT)
    kept = json.loads((tmp_path / "simulation.json").read_text())
    assert kept["quick"] and kept["claims"][0]["met"] is True
