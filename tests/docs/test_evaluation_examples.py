"""Every example of the guide to evaluation runs, with a tiny model and tiny directories in the official layouts."""

from pathlib import Path

from keye.world import generate
from tests.docs.examples import check_contents, elsewhere, run_in, sections
from tests.keye.evaluation.public.layouts import longvideobench, mvbench, tempcompass, video_mme
from tests.keye.inference.talk import tiny_directory

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "docs" / "evaluation.md"


def test_examples_run(tmp_path):
    tiny_directory(tmp_path / "model")
    counts = {"count": 4, "order": 4}
    generate(tmp_path, "heldout", counts, duration=3, size=(56, 56), workers=1, progress=False)
    layouts = {
        "Video-MME": video_mme, "LongVideoBench": longvideobench, "MVBench": mvbench, "TempCompass": tempcompass,
    }  # fmt: skip
    for name, layout in layouts.items():
        layout(tmp_path / name)
    assert {"A manifest", "Public benchmarks", "Controls"} <= set(sections(GUIDE))
    printed = run_in(tmp_path, GUIDE)
    for text in ("duration: short", "question category: S2E", "task: action_count", "multi-choice: attribute_change"):
        assert text in printed, text
    for made in ("report.json", "runs/mme/scores.json", "runs/mvbench/predictions.jsonl", "runs/tc/zeroed"):
        assert (tmp_path / made).exists(), made


def test_what_is_not_run_needs_several_processes_or_another_environment():
    assert [text.split()[0] for _, text in elsewhere(GUIDE)] == ["torchrun", "uv", "python"]


def test_the_contents_lead_to_the_headings():
    check_contents(GUIDE)
