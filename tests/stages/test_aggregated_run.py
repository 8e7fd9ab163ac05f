"""A stage with an encoder's aggregation: two processes train as one, and the model keeps the setting."""

import json
from pathlib import Path

import pytest

from keye import KeyeProcessor
from tests.distributed import run_distributed
from tests.stages import small
from tests.stages.test_run import RECIPE, go

CHANGED = [
    "processor.encoder.policy='two_stream:slow=2,fast_tokens=1'",
    "processor.encoder.aggregation='mean:layout=slow_then_fast'",
    "alignment.global_batch_size=2",
    "alignment.zero=2",
    "start=alignment",
]


@pytest.mark.slow
def test_two_processes_train_on_aggregated_videos_as_one_does(tmp_path: Path):
    recipe = tmp_path / "test.toml"
    small.processor().tokenizer.save_pretrained(tmp_path / "tokenizer")
    recipe.write_text(RECIPE.replace("SEQUENCE", "1").replace("TOKENIZER", str(tmp_path / "tokenizer")))
    losses = {}
    for processes in (1, 2):
        run = tmp_path / str(processes)
        run_distributed(go, processes, 300, recipe, run, CHANGED, "alignment")
        lines = (run / "alignment" / "metrics.jsonl").read_text().splitlines()
        losses[processes] = [json.loads(line)["loss"] for line in lines]
        settings = KeyeProcessor.from_pretrained(run / "alignment" / "model").encoder
        assert settings["aggregation"] == "mean:layout=slow_then_fast"
    assert losses[1] == pytest.approx(losses[2], rel=1e-4) and len(losses[1]) == 2
