"""The controls, with an answerer that reads the pixels by a known rule in place of a model."""

import dataclasses
import importlib
import json

import numpy as np
import pytest
import torch

from keye.errors import KeyeError
from keye.evaluation import CONTROLS, ManifestBenchmark, ablation, control_table, evaluate
from keye.evaluation.controls import cut, frames_of, partners
from keye.evaluation.evaluate import Reply
from keye.processor.processor import KeyeProcessor
from keye.processor.tokenizer import train_tokenizer
from keye.world import texts
from keye.world.render import write_mp4

module = importlib.import_module("keye.evaluation.evaluate")  # the package has a function of that name


@pytest.fixture(scope="module")
def processor():
    settings = {"max_tokens": 256, "min_tokens_per_frame": 1, "max_tokens_per_frame": 4, "fast_ratio": 0.3}
    return KeyeProcessor(train_tokenizer(texts(samples=5), 600), settings)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """Clips of eight frames: "shade" asks for a grey level that all have, "order" for the direction of a ramp."""
    root = tmp_path_factory.mktemp("controls")
    lines = []
    for family, clips in {"shade": (60, 200, 60, 200), "order": (1, -1, 1, -1)}.items():
        for number, value in enumerate(clips):
            levels = [value] * 8 if family == "shade" else list(range(40, 200, 20))[::value]
            path = f"{family}{number}.mp4"
            write_mp4(root / path, [np.full((56, 56, 3), level, np.uint8) for level in levels], 2)
            answer = ("dark" if value == 60 else "bright") if family == "shade" else "up" if value == 1 else "down"
            content = [{"type": "video", "video": path}, {"type": "text", "text": f"{family}?"}]
            options = ["dark", "bright"] if family == "shade" else ["up", "down"]
            lines.append({"id": path, "family": family, "messages": [{"role": "user", "content": content}],
                          "answer": answer, "options": options})  # fmt: skip
    lines.append({"id": "words", "family": "words", "messages": [{"role": "user", "content": "dark?"}], "answer": "x"})
    path = root / "questions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


class Answerer:
    """Reads the pixels in place of a model: it answers "dark", "bright", "up" or "down", and "none" without pixels."""

    training, device = False, torch.device("cpu")

    def __init__(self, family):
        self.family = family

    def eval(self):
        return self

    def train(self, mode):
        return self

    def reply(self, sample):
        if sample.pixel_values_videos is None:
            return "none"
        levels = [float(f.float().mean()) for f in frames_of(sample.pixel_values_videos, sample.video_grid_thw)]
        if self.family == "shade":
            return "dark" if np.mean(levels) < 100 else "bright"
        steps = np.diff(levels)
        return "up" if (steps > 5).all() else "down" if (steps < -5).all() else "none"


@pytest.fixture
def asking(monkeypatch, processor, manifest):
    """(family, control) → the report of the answerer."""

    def ask(family, control="none", **options):
        answerer = Answerer(family)
        monkeypatch.setattr(module, "generate_replies", lambda model, p, samples, *a: [
            Reply(answerer.reply(sample)) for sample in samples
        ])  # fmt: skip
        return evaluate(answerer, processor, manifest, [family], control=control, **options)

    return ask


@pytest.mark.parametrize(
    ("control", "shade", "order"),
    [
        ("none", 1.0, 1.0),
        ("blind", 0.0, 0.0),
        ("zeroed", 0.5, 0.0),  # mid grey counts as bright
        ("other", 0.0, 0.0),  # every other clip has the other answer
        ("one_frame", 1.0, 0.0),
        ("shuffled", 1.0, 0.0),
    ],
)
def test_each_control_removes_what_it_says(asking, control, shade, order):
    assert asking("shade", control).overall.accuracy == shade
    assert asking("order", control).overall.accuracy == order
    assert asking("order", control).settings["control"] == control


def test_controls_leave_the_tokens_and_the_sizes_unchanged(processor, manifest):
    questions = [q for q in ManifestBenchmark(manifest) if q.media]
    sample, source = (processor.sample(q.messages, base_dir=q.base_dir) for q in questions[4:6])
    for control in CONTROLS:
        changed = module.apply(control, sample, questions[4], source)
        for name in ("input_ids", "position_ids", "video_grid_thw"):
            assert torch.equal(getattr(changed, name), getattr(sample, name)), (control, name)
        assert changed.pixel_values_videos.shape == sample.pixel_values_videos.shape
    before, after = (module.apply("shuffled", sample, questions[4]).pixel_values_videos for _ in range(2))
    assert torch.equal(before, after), "the order depends on the question alone"


def test_pictures_of_patches_and_back_are_equal(processor, manifest):
    question = next(iter(ManifestBenchmark(manifest, ["order"])))
    sample = processor.sample(question.messages, base_dir=question.base_dir)
    pictures = frames_of(sample.pixel_values_videos, sample.video_grid_thw)
    assert torch.equal(cut(pictures, sample.video_grid_thw), sample.pixel_values_videos)
    assert len(pictures) == 8 and abs(float(pictures[0].float().mean()) - 40) < 3


def test_questions_without_the_media_of_a_control_are_skipped(asking):
    assert len(asking("words").outcomes) == 1
    for control in CONTROLS:
        assert not asking("words", control).outcomes


def test_partners_have_other_clips_of_the_same_family(manifest):
    questions = [q for q in ManifestBenchmark(manifest) if q.media]
    for question, partner in zip(questions, partners(questions), strict=True):
        assert partner.family == question.family and partner.files != question.files
    with pytest.raises(KeyeError, match="needs two clips"):
        partners(questions[:1])


def test_questions_about_one_clip_get_the_pixels_of_another(manifest):
    one, two = list(ManifestBenchmark(manifest, ["order"]))[:2]
    again = [dataclasses.replace(one, id=name) for name in "ab"]
    found = partners([one, *again, two])
    assert [question.id for question in found] == [two.id, two.id, two.id, one.id]


def test_an_unknown_control_is_named(asking):
    with pytest.raises(KeyeError, match="no control 'deaf'; choose among none, blind"):
        asking("shade", "deaf")


def test_ranks_use_the_same_partners_as_one_process(asking):
    complete = asking("shade", "other").outcomes
    parts = [asking("shade", "other", rank=rank, world_size=2).outcomes for rank in (0, 1)]
    assert sorted(parts[0] + parts[1], key=lambda outcome: outcome.index) == complete


def test_the_ablation_measures_controls_and_keeps_them(asking, tmp_path, manifest):
    asked = []

    def accuracy(threshold, control="none"):
        asked.append((threshold, control))
        return asking("order", control)

    clip, settings = manifest.parent / "order0.mp4", {"max_frames": 8}
    for _ in range(2):
        rows, _ = ablation.sweep([clip], [0.5], settings, accuracy, tmp_path, {}, False, controls=("blind", "shuffled"))
        assert rows[0].controls == {"blind": 0.0, "shuffled": 0.0} and rows[0].accuracy == 1.0
        assert "blind 0.0%, shuffled 0.0%" in ablation.line(rows[0])
    assert sorted(asked) == [(0.5, "blind"), (0.5, "none"), (0.5, "shuffled")], "the second sweep reads the first"


def test_one_table_has_every_control_and_a_dash_where_it_does_not_apply(asking):
    reports = {control: asking("shade", control) for control in ("none", *CONTROLS)}
    words = {control: asking("words", control) for control in reports}
    for control, report in words.items():
        reports[control].outcomes.extend(report.outcomes)
    head, shade, other = control_table(reports).splitlines()
    assert head.split() == ["family", "chance", "majority", "none", *CONTROLS]
    assert shade.split()[:3] == ["shade", "50.0", "50.0"] and shade.split()[3::3] == [
        "100.0", "0.0", "50.0", "0.0", "100.0", "100.0"
    ]  # fmt: skip
    assert other.split().count("–") == len(CONTROLS)
