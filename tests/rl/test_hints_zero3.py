"""Answers to hinted questions are scored after the question alone with weights that ZeRO-3 divides among two ranks."""

import dataclasses
import json
from pathlib import Path

import pytest

from rl.hints import Hints, HintStage
from rl.rewards import Judgement, register
from rl.run.agree import gather
from rl.trainer import GspoTrainer
from stages.distributed import engine
from tests.distributed import run_distributed
from tests.rl.test_hints import HINTS
from tests.rl.test_trainer import GSPO, RECIPE, make_run


@register("hint_for_some")
class HintForSome:
    """Right for some answers to questions 0, 1, 3, 4 … with a hint of level 2."""

    in_process = True

    def __call__(self, judgement: Judgement) -> float:
        helped = "two" in str(judgement.prompt.messages) and int(judgement.prompt.answer) % 3 < 2
        return float(helped and sum(map(ord, judgement.text)) % 2 == 0)


def trained(run: Path, zero: int) -> list[int]:
    """Trains a step; the number of groups that each rank scored."""
    engine.start(threads=1)
    gspo = dataclasses.replace(GSPO, steps=1, group_size=8, max_new_tokens=4, zero=zero)
    recipe = dataclasses.replace(
        RECIPE, gspo=gspo, hints=Hints("original", reward="hint_for_some"), rewards={"hint_for_some": 1.0}
    )
    solved, to_original = [], HintStage._to_original
    HintStage._to_original = lambda stage, found, groups, places, tally: (
        solved.append(len(places)), to_original(stage, found, groups, places, tally)
    )  # fmt: skip
    GspoTrainer(recipe, run).train()
    return gather(solved[0])


@pytest.mark.slow
def test_two_ranks_with_zero_3_have_the_step_of_one_process(tmp_path):
    rows, counts = [], []
    for world, zero in ((1, 0), (2, 3)):
        run = make_run(tmp_path / str(world))
        path = run / "world/train.jsonl"
        lines = [json.loads(line) | {"hints": HINTS, "trusted": True} for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        counts.append(run_distributed(trained, world, 120, run, zero)[0])
        rows.append(json.loads((run / "gspo/metrics.jsonl").read_text()))
    assert sum(counts[0]) == sum(counts[1]) > 0
    for name in ("hints/failed", "hints/tried", "hints/level_2", "hints/importance", "loss", "grad_norm", "entropy"):
        assert rows[1][name] == pytest.approx(rows[0][name], rel=1e-4, abs=1e-6), name
    assert rows[0]["grad_norm"] > 1e-2 and abs(rows[0]["hints/importance"] - 1) > 1e-4
