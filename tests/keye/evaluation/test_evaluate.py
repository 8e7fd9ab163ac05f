"""Evaluation of an untrained tiny model, and reports built by hand."""

import math
import sys

import pytest
import torch

import keye.cli
from keye.errors import KeyeError, ManifestError
from keye.evaluation import ManifestBenchmark, Outcome, Report, evaluate, merge
from keye.evaluation.benchmark import Question
from keye.evaluation.controls import zeroed
from keye.evaluation.evaluate import Reply
from keye.evaluation.report import Baselines, score
from keye.model.config import KeyeConfig
from keye.model.keye import KeyeForConditionalGeneration
from keye.processor.processor import KeyeProcessor
from keye.processor.tokenizer import train_tokenizer
from keye.world import generate, texts


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    out = tmp_path_factory.mktemp("world")
    counts = {"count": 3, "image_place": 3, "text": 3}
    return generate(out, "heldout", counts, duration=3, size=(56, 56), workers=1, progress=False)


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    tokenizer = train_tokenizer(texts(samples=5), 600)
    processor = KeyeProcessor(tokenizer, {"max_tokens": 64, "min_tokens_per_frame": 1, "max_tokens_per_frame": 4})
    config = processor.configure(KeyeConfig.preset("tiny", vocab_size=len(tokenizer)))
    return KeyeForConditionalGeneration(config), processor


def outcome(index: int, correct: bool, family: str = "count") -> Outcome:
    return Outcome(index, str(index), family, "x", "y", correct, chance=0.25, majority=index % 2 == 0)


def test_every_question_is_asked_and_reports_of_ranks_merge(world, pair):
    complete = evaluate(*pair, world, max_new_tokens=3, batch_size=4)
    assert [o.index for o in complete.outcomes] == list(range(9))
    assert {family: row.n for family, row in complete.families.items()} == {"count": 3, "image_place": 3, "text": 3}
    assert not complete.failed
    parts = [evaluate(*pair, world, max_new_tokens=3, batch_size=4, rank=r, world_size=2) for r in (1, 0)]
    assert merge(parts).outcomes == complete.outcomes


def test_batching_does_not_change_the_replies(world, pair):
    alone, together = (evaluate(*pair, world, max_new_tokens=4, batch_size=size) for size in (1, 9))
    assert [o.prediction for o in alone.outcomes] == [o.prediction for o in together.outcomes]


def test_blind_questions_have_no_media(world, pair):
    for question in ManifestBenchmark(world):
        assert all(part["type"] == "text" for message in question.blind() for part in message["content"])
        assert question.messages[-1]["role"] == "user"
    for family in ("count", "image_place"):
        for path in world.parent.glob(f"*/heldout-{family}-*"):
            assert path.exists()
    (moved := world.with_name("elsewhere.jsonl")).write_text(
        world.read_text().replace("clips/", "no/").replace("stills/", "no/")
    )
    report = evaluate(*pair, moved, max_new_tokens=1, control="blind")
    assert not report.failed and "count" in report.families and "text" not in report.families


def test_zeroed_pixels_leave_the_token_stream_unchanged(world, pair):
    model, processor = pair
    for question in ManifestBenchmark(world, families=["count", "image_place"]):
        sample = processor.sample(question.messages, base_dir=question.base_dir, add_generation_prompt=True)
        control = zeroed(sample)
        for name in ("input_ids", "position_ids", "image_grid_thw", "video_grid_thw"):
            assert getattr(control, name) is getattr(sample, name)
        [pixels] = [x for x in (control.pixel_values, control.pixel_values_videos) if x is not None]
        [real] = [x for x in (sample.pixel_values, sample.pixel_values_videos) if x is not None]
        assert pixels.shape == real.shape and not pixels.any() and real.any()
    report = evaluate(model, processor, world, max_new_tokens=2, control="zeroed")
    assert set(report.families) == {"count", "image_place"} and report.settings["control"] == "zeroed"


def test_a_reply_cut_off_by_the_limit_is_wrong(world, pair, monkeypatch):
    report = evaluate(*pair, world, families=["text"], max_new_tokens=2)
    assert not any(o.finished or o.correct for o in report.outcomes)
    module, answers = sys.modules["keye.evaluation.evaluate"], [o.answer for o in report.outcomes]
    monkeypatch.setattr(module, "generate_replies", lambda *_: [Reply(a, False) for a in answers])
    assert not any(o.correct for o in evaluate(*pair, world, families=["text"]).outcomes)
    monkeypatch.setattr(module, "generate_replies", lambda *_: [Reply(a, True) for a in answers])
    assert all(o.correct for o in evaluate(*pair, world, families=["text"]).outcomes)


def test_an_unreadable_clip_counts_as_wrong_and_is_reported(world, pair):
    broken = world.with_name("broken.jsonl")
    broken.write_text(world.read_text().replace("clips/heldout-count-00001", "clips/missing"))
    report = evaluate(*pair, broken, families=["count"], max_new_tokens=1)
    [failed] = report.failed
    assert failed.index == 1 and not failed.correct and "missing" in failed.error
    assert "could not be read" in report.table()


def test_sampling_is_reproducible_and_restores_the_random_state(world, pair):
    model, processor = pair
    model.train()
    torch.manual_seed(7)
    state = torch.get_rng_state()
    runs = [evaluate(model, processor, world, max_new_tokens=4, temperature=1.0, seed=1) for _ in range(2)]
    assert runs[0].outcomes == runs[1].outcomes
    assert torch.equal(torch.get_rng_state(), state) and model.training
    model.eval()


def test_score_by_hand():
    row = score([outcome(0, True), outcome(1, True), outcome(2, True), outcome(3, False)])
    assert (row.n, row.accuracy, row.chance, row.majority, row.baseline) == (4, 0.75, 0.25, 0.5, 0.5)
    smooth = 4 / 6
    assert row.stderr == pytest.approx(math.sqrt(smooth * (1 - smooth) / 4))
    assert row.above == pytest.approx(0.25 / row.stderr)


def test_majority_comes_from_the_training_answers():
    train = [Question(str(i), "find", [], answer) for i, answer in enumerate(["red", "red", "blue"])]
    baselines = Baselines(train)
    assert baselines.majority(Question("a", "find", [], "red"))
    assert not baselines.majority(Question("b", "find", [], "blue"))
    assert baselines.chance(Question("c", "find", [], "blue")) == 0.5
    assert baselines.chance(Question("d", "find", [], "green")) == 0
    assert baselines.chance(Question("e", "find", [], "green", options=list("abcd"))) == 0.25


def test_the_constant_answer_uses_the_tolerance():
    questions = [
        Question(str(i), "when", [], answer, tolerance=0.5) for i, answer in enumerate(["1", "1", "2", "2.5", "3"])
    ]
    baselines = Baselines(questions)
    assert [baselines.majority(question) for question in questions] == [False, False, True, True, True]
    assert baselines.chance(questions[0]) == 1 / 4


def test_a_saved_report_loads_unchanged(tmp_path):
    report = Report("bench", [outcome(0, True), outcome(1, False, "order")], {"control": "blind"}, 1.5)
    report.save(tmp_path / "deep" / "report.json")
    assert Report.load(tmp_path / "deep" / "report.json") == report
    (tmp_path / "text.json").write_text("[]")
    with pytest.raises(ManifestError, match="is not an evaluation report"):
        Report.load(tmp_path / "text.json")


def test_limit_and_families(world):
    assert len(ManifestBenchmark(world, limit=2)) == 6
    assert {question.family for question in ManifestBenchmark(world, families=["text"])} == {"text"}
    with pytest.raises(ManifestError, match="no family 'dance'; it has count, image_place, text"):
        ManifestBenchmark(world, families=["dance"])


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ({"limit": 0}, "limit 0.*at least 1"),
        ({"limit": -2}, "limit -2.*at least 1"),
        ({"batch_size": 0}, "batch_size 0.*at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens 0.*at least 1"),
        ({"temperature": -1.0}, "temperature -1.0.*0 or more"),
        ({"temperature": float("nan")}, "temperature nan.*0 or more"),
    ],
)
def test_settings_out_of_range_are_reported(world, pair, setting, complaint):
    with pytest.raises(KeyeError, match=complaint):
        evaluate(*pair, world, **setting)


def test_a_report_without_replies_has_no_score():
    with pytest.raises(KeyeError, match="no replies to score.*questions"):
        _ = Report("x", []).overall


@pytest.mark.parametrize("command", ["evaluate", "ablate"])
def test_a_directory_that_is_no_model_is_one_line(command, tmp_path, world, monkeypatch, capsys):
    (tmp_path / "config.json").write_text("{}")
    given = [str(tmp_path), str(world)]
    if command == "ablate":
        given = ["--videos", str(tmp_path / "a.mp4"), "--model", str(tmp_path), "--manifest", str(world)]
        given += ["--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["keye", command, *given])
    with pytest.raises(SystemExit) as ended:
        keye.cli.main()
    error = capsys.readouterr().err
    assert ended.value.code == 2 and len(error.splitlines()) == 1
    assert error.startswith("error: ") and str(tmp_path) in error and "not Keye; give one that a stage" in error


def test_a_wrong_policy_is_refused_before_the_model_is_read(tmp_path, world, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["keye", "evaluate", str(tmp_path / "none"), str(world), "--policy", "fastest"])
    with pytest.raises(SystemExit):
        keye.cli.main()
    assert "fastest" in capsys.readouterr().err
