"""The study: plans as the encoder makes them, equal tokens, resumption, and tables from saved predictions."""

import json
import multiprocessing
import os
import signal
import time

import pytest
import torch

from keye import SlowFastEncoder
from keye.commands import ablate
from keye.errors import KeyeError
from keye.evaluation.study import Setting, models_of, run_study, settings_of, split_specs, store, tables, write_tables
from keye.evaluation.study.clips import DrawnClip, events, events_seen
from keye.world.slowfastbench import draw, painter_of, reader

SLICES = {"length": ["16s"], "height": ["144p"]}
POLICIES = ("default", "random", "uniform", "downsampled", "all_slow")


def drawn(family="order", index=0, length=8, height=144, motion="still"):
    item = draw(family, "dev", index, length, height, motion)
    return item, DrawnClip(item.clip, item.film)


def study(out, **changes):
    settings = settings_of(POLICIES, [128, 256], {"threshold": [0.5]})
    run_study(out, "dev", settings, ["find", "read"], SLICES, 4, workers=0, progress=False, **changes)
    return settings


@pytest.mark.parametrize("motion", ["still", "pan"])
@pytest.mark.parametrize("policy", ["default", "ladder", "released", "two_stream", "uniform"])
def test_plans_and_pictures_are_those_of_the_encoder(policy, motion):
    item, clip = drawn(motion=motion)
    setting = Setting(policy, 600)
    frames = [torch.from_numpy(painter_of(item.film).frame(i).copy()).permute(2, 0, 1) for i in range(item.film.frames)]
    encoded = SlowFastEncoder(**setting.settings())(frames, source_fps=item.film.fps)
    plan = clip.plan(setting)
    for name in ("frame_types", "frame_indices", "timestamps", "similarity"):
        torch.testing.assert_close(getattr(plan, name), getattr(encoded.plan, name), equal_nan=True)
    assert plan.frame_sizes == encoded.plan.frame_sizes and plan.tokens == encoded.plan.tokens
    for one, other in zip(clip.pictures_of(plan), encoded.pictures(), strict=True):
        assert (one.int() - other.int()).abs().max() <= 1


def test_a_random_policy_has_another_seed_for_each_clip():
    setting = Setting("random", 512)
    seeds = {setting.settings(clip=f"find-{number:05d}")["policy"] for number in range(50)}
    assert len(seeds) == 50 and setting.settings(clip="a") == setting.settings(clip="a")


@pytest.mark.parametrize("policy", ["random", "uniform", "downsampled", "two_stream", "released", "sparse"])
def test_tokens_are_matched_within_2_percent(policy):
    """Sizes of frames are whole numbers of tokens, so that a clip may miss what clips of several sizes meet."""
    targets, tokens = 0, 0
    for length, height in ((16, 240), (60, 144), (60, 240)):
        _, clip = drawn(length=length, height=height)
        targets += (target := clip.plan(Setting("default", 1024)).tokens)
        tokens += clip.plan_of_tokens(Setting(policy, 1024), target).tokens
    assert abs(tokens / targets - 1) <= 0.02


def test_sparse_has_frames_of_full_size_only():
    _, clip = drawn(length=16, height=240)
    plan = clip.plan(Setting("sparse", 700))
    full = clip.plan(Setting("all_slow", None)).tokens_per_frame[0]
    assert 5 <= len(plan) <= 6 and plan.tokens <= 700 and plan.tokens_per_frame.min() >= 0.8 * full


def test_events_are_read_from_the_states():
    item, clip = drawn("count", length=16)
    assert len(events(item.film)) == 10  # one, two, three and four flashes
    assert events_seen(item.film, clip.plan(Setting("all_slow", None)))[0] == 1
    seen, tokens = events_seen(item.film, clip.plan(Setting("sparse", 100)))
    assert seen < 1 and tokens < 100
    dial, _ = drawn("alias", length=16)
    starts = {start for start, _ in events(dial.film)}
    changes = {(cell + 1) / 2 for states in dial.film.states for cell in (states[1:] != states[:-1]).nonzero()[0]}
    assert starts <= changes and len(changes - starts) <= 1  # the last change is to rest


def test_settings_of_options():
    settings = settings_of(["random", "all_slow"], [512, 2048, 8192], {"threshold": [0.5], "measure": ["mse"]})
    assert [setting.label for setting in settings] == [
        "default@512", "random@512", "default@2048", "random@2048", "default@8192", "random@8192", "all_slow@unlimited",
        "default@2048 threshold=0.5", "default@2048 measure=mse",
    ]  # fmt: skip
    assert len(settings_of(["random"], [512], {"ratio": [0.1, 0.5], "fps": [1.0, 4.0]}, full=True)) == 2 + 2 * 4
    assert split_specs(["default,random", "adaptive:max_gap=8,cut=0.3,uniform:8"]) == [
        "default", "random", "adaptive:max_gap=8,cut=0.3", "uniform:8",
    ]  # fmt: skip
    with pytest.raises(KeyeError, match="packets reads files"):
        settings_of([], [512], {"measure": ["packets"]})
    with pytest.raises(KeyeError, match="use one of adaptive"):
        settings_of(["adaptve"], [512], {})


def test_a_study_from_end_to_end(tmp_path):
    settings = study(tmp_path)
    _, lines = store.read_predictions(tmp_path)
    assert len(lines) == len(settings) * 2 * 4
    assert {line["by"] for line in lines} == {"observer"} and {line["version"] for line in lines} == {1}
    ceiling = [line for line in lines if line["setting"] == "all_slow@unlimited"]
    assert all(line["right"] and line["events"] == 1 and line["slow"] == 1 for line in ceiling)
    written = write_tables(tmp_path)
    page = (tmp_path / "ablation.md").read_text()
    assert "The study is not complete" not in page
    assert "8 questions in 2 groups of 2 families" in page and "`downsampled`" in page and "threshold=0.5" in page
    assert all(path.stat().st_size for path in written)


def test_tables_come_from_the_predictions_alone(tmp_path, monkeypatch):
    study(tmp_path / "run")
    write_tables(tmp_path / "run")
    monkeypatch.setattr(SlowFastEncoder, "plan", None)
    write_tables(tmp_path / "run", tmp_path / "jsonl")
    write_tables(tmp_path / "jsonl", tmp_path / "parquet")  # which has no JSON Lines
    for name in ("rows.csv", "pairs.csv", "ablation.md"):
        texts = {(tmp_path / folder / name).read_text() for folder in ("run", "jsonl", "parquet")}
        assert len(texts) == 1, name


def test_questions_without_all_answers_are_left_out_and_counted(tmp_path):
    study(tmp_path)
    path = tmp_path / "predictions.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))  # the last setting of one question
    write_tables(tmp_path)
    assert "7 questions" in (text := (tmp_path / "ablation.md").read_text())
    assert "The study is not complete: 1 of its 8 questions" in text


def _killed_study(out):
    study(out)


def test_a_killed_study_continues_to_the_same_predictions(tmp_path):
    study(tmp_path / "whole")
    process = multiprocessing.get_context("spawn").Process(target=_killed_study, args=(tmp_path / "killed",))
    process.start()
    path = tmp_path / "killed" / "predictions.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (path.exists() and path.read_text().count("\n") > 20):
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with path.open("a") as file:
        file.write('{"id": "dev-find-00000", "sett')  # an incomplete line
    before = path.read_text().count("\n")
    study(tmp_path / "killed")
    whole, continued = (sorted((tmp_path / name / "predictions.jsonl").read_text().splitlines())
                        for name in ("whole", "killed"))  # fmt: skip
    assert continued == whole and 20 < before < len(whole)


def test_another_benchmark_or_other_settings_are_refused(tmp_path):
    study(tmp_path)
    path = tmp_path / "study.json"
    original = path.read_text()
    for change, key in (
        (("benchmark", "checksums", "find"), "benchmark.checksums.find"),
        (("settings", "default@128", "fast_ratio"), "settings.default@128.fast_ratio"),
        (("questions", "limit"), "questions.limit"),
    ):
        found = json.loads(original)
        inner = found
        for name in change[:-1]:
            inner = inner[name]
        inner[change[-1]] = "other"
        path.write_text(json.dumps(found))
        with pytest.raises(KeyeError, match=rf"study.json, key {key}: .* give another folder"):
            study(tmp_path)
    path.write_text(original.replace(json.loads(original)["benchmark"]["checksums"]["find"], "0" * 64))
    with pytest.raises(KeyeError, match="key benchmark.checksums.find"):
        write_tables(tmp_path)
    path.write_text(original)
    lines = (tmp_path / "predictions.jsonl").read_text()
    (tmp_path / "predictions.jsonl").write_text(lines.replace('"checksum": "', '"checksum": "x', 1))
    with pytest.raises(KeyeError, match="predictions.jsonl, key checksum: .* run the study again"):
        write_tables(tmp_path)


def made(setting, rights, tokens=100, by="observer", groups=2):
    return [
        {"id": f"q{number}", "family": "find", "group": f"g{number // groups}", "length": "16s", "height": "144p",
         "motion": "still", "load": "light", "setting": setting, "tokens": tokens, "entries": 4, "slow": 0.5,
         "psnr": 30.0, "ssim": 0.9, "events": 1.0, "event_tokens": 9.0, "by": by, "right": bool(right), "chance": 0.25}
        for number, right in enumerate(rights)
    ]  # fmt: skip


def test_a_win_needs_all_rivals_and_equal_tokens():
    better, worse = [1] * 40, [1, 0, 0, 0] * 10
    lines = made("default@512", better)
    for name in ("random", "uniform"):
        lines += made(f"{name}@512", worse)
    for rights, tokens, verdict in ((worse, 100, "win"), (worse, 97, "not equal"), (better, 100, "open")):
        pairs = tables.Answers([*lines, *made("downsampled@512", rights, tokens)]).pairs()
        assert tables.wins(pairs, "default@512", "observer")["all", ""] == verdict
    lines = made("default@512", worse) + made("random@512", better) + made("uniform@512", worse)
    pairs = tables.Answers([*lines, *made("downsampled@512", worse)]).pairs()
    assert tables.wins(pairs, "default@512", "observer")["all", ""] == "loss"
    pair = next(pair for pair in pairs if pair.rival == "random@512" and pair.slice == "all")
    assert pair.difference == -0.75 and pair.verdict == "worse"


def test_seeds_of_models_are_averaged_and_questions_without_all_settings_are_left_out():
    lines = made("default@512", [1, 1, 0, 0], by="model#0") + made("default@512", [1, 1, 1, 0], by="model#1")
    lines += made("random@512", [1, 0, 0], by="model#0") + made("random@512", [1, 0, 0], by="model#1")
    answers = tables.Answers(lines)
    row = next(row for row in answers.rows() if row.slice == "all" and row.policy == "default")
    assert (row.questions, row.seeds, row.groups, answers.left_out) == (3, 2, 2, 1)
    assert row.accuracy == pytest.approx(5 / 6)


def test_models_are_named_by_policy_and_numbered_as_seeds():
    found = models_of(["default=a", "random=b", "default=c"])
    assert [(one.directory, one.policy, one.by) for one in found] == [
        ("a", "default", "model#0"), ("b", "random", "model#0"), ("c", "default", "model#1"),
    ]  # fmt: skip
    assert [(one.policy, one.by) for one in models_of(["d", "e"])] == [(None, "model#0"), (None, "model#1")]
    with pytest.raises(KeyeError, match="POLICY=DIR for all or for none"):
        models_of(["default=a", "d"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give one of --videos, --benchmark and --tables"),
        (["--videos", "a.mp4", "--tables", "x"], "--videos and --tables is given; give one of"),
        (["--videos", "a.mp4", "--policy", "random"], "--policy is for a study"),
        (["--videos", "a.mp4", "--measure", "mse", "lab"], "a sweep takes one --model and one --measure"),
        (["--benchmark", "dev", "--manifest", "x"], "--manifest does not go with --benchmark"),
        (["--benchmark", "test"], "there is no split 'test'"),
        (["--benchmark", "dev", "--no-observer"], "nobody answers the questions"),
        (["--benchmark", "dev", "--slice", "length=2s"], "the slice length has no '2s'"),
        (["--benchmark", "dev", "--families", "find", "--slice", "motion=real"], "no question of find .* widen them"),
        (["--tables", "nowhere"], "nowhere/study.json is no study"),
        (["--benchmark", "dev", "--families", "find", "--model", "nowhere"], "--model nowhere has no weights"),
    ],
)
def test_wrong_options_are_refused(options, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["ablate", *options])
    with pytest.raises(KeyeError, match=message):
        ablate.main()


def test_families_that_the_observer_does_not_read_are_refused(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(reader.READERS, "turn")
    monkeypatch.setattr("sys.argv", ["ablate", "--benchmark", "dev", "--families", "turn"])
    with pytest.raises(KeyeError, match="the ideal observer does not read turn"):
        ablate.main()
