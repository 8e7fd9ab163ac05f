"""`tp_plan="auto"` of transformers on two processes against one process."""

from pathlib import Path

import pytest
import torch

from keye import KeyeForConditionalGeneration
from scripts.bench.common.streams import IMAGE, VIDEO, family_model, stream
from tests.distributed import run_distributed

pytestmark = pytest.mark.slow
MIXED = stream([(VIDEO, 2, 2), (IMAGE, 1, 3), (VIDEO, 1, 1)], 2)


def sharded_logits(path: str) -> tuple[torch.Tensor, bool]:
    model = KeyeForConditionalGeneration.from_pretrained(path, tp_plan="auto", dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(**MIXED).logits
    local = model.language_model.layers[0].mlp.gate_proj.weight
    local = local.to_local() if hasattr(local, "to_local") else local
    return logits, local.shape[0] * 2 == model.config.text_config.intermediate_size


@pytest.mark.parametrize("tied", [False, True])
def test_two_processes_give_the_logits_of_one(tied: bool, tmp_path: Path) -> None:
    model = family_model(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(**MIXED).logits
    for logits, is_split in run_distributed(sharded_logits, 2, 120, str(tmp_path)):
        assert is_split
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
