"""The examples of the guide to HyperZ·Z·W run, and their comments state what they give."""

import shlex
from pathlib import Path

import torch

from keye.hyperzzw import HyperZZWConfig, HyperZZWNet, SlowNet
from keye.model.config import KeyeConfig
from keye.model.keye import KeyeForConditionalGeneration
from stages.recipe import load
from tests.docs.examples import ROOT, check_contents, elsewhere, run_in

GUIDE = ROOT / "docs" / "five-systems" / "hyperzzw.md"


def test_examples_run(tmp_path: Path) -> None:
    run_in(tmp_path, GUIDE)


def test_the_command_has_a_setting_that_recipes_take() -> None:
    [(language, line)] = elsewhere(GUIDE)
    words = shlex.split(line)
    assert language == "bash" and words[3] == "scripts/pretrain.py"
    recipe = load(ROOT / words[4], [words[words.index("--set") + 1]])
    assert recipe.model.vision == {"mixer": "hyperzzw"}


def test_comments_and_contents_are_true() -> None:
    check_contents(GUIDE)
    assert SlowNet(axes=2, hidden=32, layers=2, channels=16)((6, 10)).shape == (16, 6, 10)
    assert sum(p.numel() for p in HyperZZWNet(HyperZZWConfig.released()).parameters()) == 1336855
    model = KeyeForConditionalGeneration(KeyeConfig.preset("tiny", {"mixer": "hyperzzw"})).eval()
    pixels = torch.randint(256, (16 * 12 + 4 * 6, 3, 14, 14), dtype=torch.uint8)
    grids = torch.tensor([[1, 16, 12], [1, 4, 6]])
    with torch.no_grad():
        tokens, alone = model.encode_vision(pixels, grids), model.encode_vision(pixels[-24:], grids[1:])
    assert tokens.shape == (54, 128)
    torch.testing.assert_close(tokens[-6:], alone, atol=1e-4, rtol=0)
