"""The bench of killed runs: the state that it reports, and its comparisons."""

import json

from scripts.bench.stages import kills


def test_what_a_run_was_at_is_read_from_what_it_left(tmp_path):
    assert kills.doing(tmp_path).startswith("starting")
    (tmp_path / "tokenizer").mkdir()
    assert kills.doing(tmp_path) == "vision: loading"
    (tmp_path / "vision").mkdir()
    (tmp_path / "vision" / "metrics.jsonl").write_text("")
    assert kills.doing(tmp_path) == "vision: training"
    step = tmp_path / "vision" / "checkpoints" / "step-2"
    step.mkdir(parents=True)
    assert kills.doing(tmp_path) == "vision: saving"
    (step / "complete.json").write_text("{}")
    assert kills.doing(tmp_path) == "vision: training"
    (tmp_path / "vision" / "model").mkdir()
    assert kills.doing(tmp_path) == "vision: writing its model"
    for stage in kills.STAGES:
        (tmp_path / stage).mkdir(exist_ok=True)
        (tmp_path / stage / "stage.json").write_text("{}")
    assert kills.doing(tmp_path) == "ending"


def test_curves_differ_by_the_last_bit_of_a_loss_and_not_by_the_clock(tmp_path):
    def write(loss: float, seconds: float) -> dict:
        for stage in kills.STAGES:
            (tmp_path / stage).mkdir(exist_ok=True)
            line = {"step": 1, "loss": loss, "lr": 0.1, "grad_norm": 1.0, "tokens": 7, "not_finite": 0}
            (tmp_path / stage / "metrics.jsonl").write_text(json.dumps(line | {"seconds": seconds}) + "\n")
        return kills.curves(tmp_path)

    assert write(0.1 + 0.2, 1.0) == write(0.1 + 0.2, 2.0)
    assert write(0.1 + 0.2, 1.0) != write(0.3, 1.0)


def test_weights_differ_by_a_byte(tmp_path):
    (tmp_path / "vision" / "model").mkdir(parents=True)
    file = tmp_path / "vision" / "model" / "model.safetensors"
    file.write_bytes(b"12345678")
    before = kills.weights(tmp_path)
    file.write_bytes(b"12345679")
    assert before.keys() == kills.weights(tmp_path).keys() and before != kills.weights(tmp_path)
