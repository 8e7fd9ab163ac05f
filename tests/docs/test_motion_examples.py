"""The examples of the guide to motion run, and their comments state what they give."""

from pathlib import Path

import torch

from keye.motion.frames import macs
from keye.motion.network import SlowFastNet
from keye.motion.pathway import MotionPathway
from keye.motion.settings import PRESETS, MotionSettings
from tests.docs.examples import check_contents, run_in

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "five-systems" / "motion.md"


def test_examples_run(tmp_path):
    run_in(tmp_path, GUIDE)


def test_comments_are_true():
    text = GUIDE.read_text()
    net = SlowFastNet("tiny")
    assert f"# {sum(p.numel() for p in net.parameters()):,}" in text
    assert f"# {macs(PRESETS['r50_8x8']) / 1e9:.1f} billion" in text
    with torch.device("meta"):
        pathway = MotionPathway(MotionSettings(), 1152)
    size = {name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in pathway.named_children()}
    cnn = size["stem"] + size["stem_norm"] + size["stages"]
    assert f"has {sum(size.values()):.2f} M parameters: {cnn:.2f} M in the CNN, {size['laterals']:.2f} M" in text
    assert f"{size['output']:.2f} M in the last layer" in text


def test_the_contents_lead_to_the_headings():
    check_contents(GUIDE)
