"""Runs of a tiny model over the public layouts: replies, controls, resuming, several processes, the command."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import keye.cli
from keye.commands.evaluate import join_processes
from keye.errors import KeyeError
from keye.evaluation.controls import CONTROLS, frames_of, zeroed
from keye.evaluation.evaluate import Reply, generate_replies
from keye.evaluation.public import open_benchmark
from keye.evaluation.public.frames import FrameChoice, encode, messages_of
from keye.evaluation.public.run import evaluate_public
from keye.inference.chat import load_model
from keye.world.render import write_mp4
from tests.distributed import free_port
from tests.keye.evaluation.public.layouts import LAYOUTS, MVBENCH, clip, draw, number_of
from tests.keye.inference.talk import tiny_directory

FAMILIES = {"mvbench": [*MVBENCH, "episodic_reasoning"]}
MODULE = "keye.evaluation.public.run"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return {name: layout(folder / name) for name, layout in LAYOUTS.items()}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny_directory(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pair(directory):
    model, processor = load_model(directory, "cpu")
    return model, processor.with_encoder(max_tokens=120, max_tokens_per_frame=6)


def opened(name, data, **options):
    return open_benchmark(name, data[name], **{"families": FAMILIES.get(name), **options})


@pytest.mark.parametrize("name", LAYOUTS)
def test_replies_are_those_of_the_model_to_the_messages(name, data, pair, tmp_path):
    benchmark, (model, processor) = opened(name, data), pair
    made = evaluate_public(model, processor, benchmark, tmp_path, max_new_tokens=4, batch_size=2)
    assert [one.id for one in made] == [question.id for question in benchmark]
    for question, one in zip(benchmark, made, strict=True):
        # The clip by its path, as a user gives it: the plan is that of the processor.
        chat = [*question.messages]
        if question.prefix:
            chat.append({"role": "assistant", "content": question.prefix})
        begun = bool(question.prefix)
        sample = processor.sample(chat, add_generation_prompt=not begun, continue_final_message=begun)
        [reply] = generate_replies(model, processor, [sample], 0.0, 4)
        assert one.reply == question.prefix + reply.text
        assert (one.slow, one.fast) == sample.plans[0].counts and one.tokens == sample.plans[0].tokens
        verdict = benchmark.judge(question, reply.text)
        assert one.correct == (verdict and verdict.correct)
    assert sum(one.slow for one in made) and sum(one.fast for one in made)


def test_controls_change_the_pixels_of_the_complete_clip(data, pair, tmp_path, monkeypatch):
    model, processor = pair
    folder = shutil.copytree(data["longvideobench"], tmp_path / "data")
    clip(folder / "videos" / "v3.mp4", fps=9)
    rows = json.loads((folder / "lvb_val.json").read_text())
    (folder / "lvb_val.json").write_text(json.dumps([*rows[:2], {**rows[0], "id": "v3", "video_path": "v3.mp4"}]))
    benchmark, asked = open_benchmark("longvideobench", folder, subtitles=True), {}

    def generate(model, processor, samples, *_):
        asked[control] = asked.get(control, []) + list(samples)
        return generate_replies(model, processor, samples, 0.0, 1)

    monkeypatch.setattr(sys.modules[MODULE], "generate_replies", generate)
    for control in ("none", *CONTROLS):
        evaluate_public(model, processor, benchmark, tmp_path / control, control=control, batch_size=3)
    plain = asked.pop("none")
    for sample in asked.pop("blind"):
        assert sample.pixel_values_videos is None and "It begins." in processor.tokenizer.decode(sample.input_ids)
    for control, samples in asked.items():
        for sample, before in zip(samples, plain, strict=True):
            assert torch.equal(sample.input_ids, before.input_ids), control
            assert torch.equal(sample.video_grid_thw, before.video_grid_thw)
            assert not torch.equal(sample.pixel_values_videos, before.pixel_values_videos)
    numbers = [[number_of(p) for p in frames_of(s.pixel_values_videos, s.video_grid_thw)] for s in asked["one_frame"]]
    assert all(len(set(shown)) == 1 and len(shown) >= 8 for shown in numbers)
    shown, real = ([number_of(p) for p in frames_of(s.pixel_values_videos, s.video_grid_thw)]
                   for s in (asked["shuffled"][0], plain[0]))  # fmt: skip
    assert sorted(shown) == real != shown
    assert set(shown[:3]) != set(real[:3])  # frames change places across a subtitle
    assert torch.equal(zeroed(plain[0]).pixel_values_videos, asked["zeroed"][0].pixel_values_videos)


def test_a_stopped_run_continues_without_asking_again(data, pair, tmp_path, monkeypatch):
    benchmark, (model, processor) = opened("tempcompass", data), pair
    complete = evaluate_public(model, processor, benchmark, tmp_path / "complete", max_new_tokens=3)
    asked = []

    def stops(model, processor, samples, *rest):
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append(1)
        return generate_replies(model, processor, samples, *rest)

    monkeypatch.setattr(sys.modules[MODULE], "generate_replies", stops)
    with pytest.raises(KeyboardInterrupt):
        evaluate_public(model, processor, benchmark, tmp_path / "stopped", max_new_tokens=3)
    path = tmp_path / "stopped" / "predictions.jsonl"
    assert len(path.read_text().splitlines()) == 1 + 3
    with path.open("a") as file:
        file.write('{"id": "an incompl')
    asked[:] = [1, 1, 1, 1]
    again = evaluate_public(model, processor, benchmark, tmp_path / "stopped", max_new_tokens=3)
    assert again == complete and len(asked) == 4 + len(complete) - 3


def test_other_settings_do_not_continue(data, pair, tmp_path):
    benchmark, (model, processor) = opened("tempcompass", data, families=["yes_no"]), pair
    evaluate_public(model, processor, benchmark, tmp_path, max_new_tokens=2, identity={"model": "a"})
    with pytest.raises(KeyeError, match=r"predictions of other settings \(control\); give another --out, or delete it"):
        evaluate_public(model, processor, benchmark, tmp_path, control="blind", max_new_tokens=2,
                        identity={"model": "a"})  # fmt: skip
    with pytest.raises(KeyeError, match=r"other settings \(model\)"):
        evaluate_public(model, processor, benchmark, tmp_path, max_new_tokens=2, identity={"model": "b"})


def test_processes_share_the_clips_and_a_later_number_of_them_continues(data, pair, tmp_path):
    benchmark, (model, processor) = opened("video_mme", data), pair
    alone = evaluate_public(model, processor, benchmark, tmp_path / "alone", max_new_tokens=3)
    first = evaluate_public(model, processor, benchmark, tmp_path / "two", max_new_tokens=3, rank=1, world_size=2)
    assert {one.clip for one in first} == {alone[-1].clip} and len(first) == 2
    assert evaluate_public(model, processor, benchmark, tmp_path / "two", max_new_tokens=3) == alone
    assert len(list((tmp_path / "two").glob("predictions*.jsonl"))) == 2


def test_a_process_with_short_clips_waits_days_for_the_others(monkeypatch):
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}.items():
        monkeypatch.setenv(name, str(value))
    join_processes()
    try:
        backend = torch.distributed.group.WORLD._get_backend(torch.device("cpu"))
        assert backend.options._timeout.days >= 7
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are listed in /proc")
def test_the_threads_of_the_group_end_with_it():
    # A thread that survives can abort the process while the interpreter ends.
    script = "import pathlib, torch.distributed as dist; from keye.commands.evaluate import join_processes\n"
    script += "join_processes(); import torch._dynamo; dist.barrier(); dist.destroy_process_group()\n"
    script += "print(*(path.read_text() for path in pathlib.Path('/proc/self/task').glob('*/comm')))"
    own = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, env=os.environ | own, capture_output=True, text=True, check=True)
    assert "python" in result.stdout and "gloo" not in result.stdout


def test_a_clip_that_cannot_be_read_counts_as_wrong(data, pair, tmp_path):
    folder = shutil.copytree(data["video_mme"], tmp_path / "copy")
    (folder / "data" / "bbb.mp4").write_bytes(b"no video")
    made = evaluate_public(*pair, open_benchmark("video_mme", folder), tmp_path / "out", max_new_tokens=2)
    assert [one.error is None for one in made] == [True, True, False, False]
    assert not any(one.correct for one in made[2:]) and "bbb.mp4" in made[2].error


def test_a_clip_too_long_for_the_context_gets_a_smaller_budget(data, tmp_path):
    model, processor = load_model(tiny_directory(tmp_path / "small", max_position_embeddings=200), "cpu")
    benchmark = opened("longvideobench", data, subtitles=True)
    wanted = [encode(q, benchmark, processor._encoder, FrameChoice()) for q in benchmark]
    assert max(len(processor.sample(messages_of(q, v))) for q, v in zip(benchmark, wanted, strict=True)) > 190
    made = evaluate_public(model, processor, benchmark, tmp_path / "out", max_new_tokens=10)
    assert all(one.error is None for one in made)
    assert all(0 < one.tokens < video.plan.tokens for one, video in zip(made, wanted, strict=True))


@pytest.mark.parametrize("settings", [{"slow_multiple": 0}, {"slow_multiple": 4}, {"policy": "ladder"}])
def test_one_frame_too_large_for_the_context_becomes_smaller(settings, data, tmp_path):
    model, processor = load_model(tiny_directory(tmp_path / "small", max_position_embeddings=400), "cpu")
    limits = {"min_tokens_per_frame": 4, "max_tokens_per_frame": 768, "max_tokens": 2_000}
    folder = shutil.copytree(data["longvideobench"], tmp_path / "data")
    for name in ("v1", "v2"):
        write_mp4(folder / "videos" / f"{name}.mp4", [draw(9, 560, 840)] * 40, 10)
    benchmark = open_benchmark("longvideobench", folder)
    made = evaluate_public(model, processor.with_encoder(**limits, **settings), benchmark, tmp_path / "out",
                           FrameChoice(num_frames=1), max_new_tokens=2)  # fmt: skip
    assert [one.error for one in made] == [None] * 3
    least = 1 if "policy" in settings else 150  # ladder: flat pictures have no detail
    assert all(one.slow + one.fast == 1 and least < one.tokens < 400 for one in made)


def test_the_rule_reads_the_answer_and_not_the_thought(data, pair, tmp_path, monkeypatch):
    asked = []

    def think(model, processor, samples, *_):
        asked.extend(processor.tokenizer.decode(sample.input_ids) for sample in samples)
        return [Reply("<think>A or B?</think><answer>C</answer>") for _ in samples]

    monkeypatch.setattr(sys.modules[MODULE], "generate_replies", think)
    made = evaluate_public(*pair, opened("video_mme", data), tmp_path / "mme", thinking=True)
    assert [one.choice for one in made] == ["C"] * 4 and [one.correct for one in made] == [False, True] * 2
    assert made[0].reply.startswith("<think>") and all("The best answer is:/think" in text for text in asked)
    asked.clear()
    made = evaluate_public(*pair, opened("mvbench", data), tmp_path / "mv", thinking=True)
    assert made[1].correct and not any("Best option:(" in text for text in asked)  # a thought comes first


def test_frames_that_the_authors_do_not_prescribe_need_a_number(data, pair, tmp_path):
    with pytest.raises(KeyeError, match="the authors of video_mme prescribe no number of frames; give --num-frames"):
        evaluate_public(*pair, opened("video_mme", data), tmp_path, FrameChoice("official"))


def run(monkeypatch, *arguments) -> int:
    with pytest.raises(SystemExit) as ended:
        keye.cli.main(["evaluate", *map(str, arguments)])
    return ended.value.code


def test_the_command_prints_a_table_and_continues(data, directory, tmp_path, monkeypatch, capsys):
    command = [directory, "--benchmark", "tempcompass", "--data", data["tempcompass"], "--out", tmp_path]
    command += ["--max-new-tokens", 3, "--max-tokens", 60, "--control", "all"]
    assert run(monkeypatch, *command) == 0
    printed = capsys.readouterr().out
    for text in ("95 % interval", "multi-choice: attribute_change", "one_frame", "shuffled", "2 replies have no rule"):
        assert text in printed
    values = json.loads((tmp_path / "scores.json").read_text())
    assert values["scores"]["blind"]["all"]["all"]["n"] == 6
    before = (tmp_path / "predictions.jsonl").read_bytes()
    assert run(monkeypatch, *command) == 0 and capsys.readouterr().out == printed
    assert (tmp_path / "predictions.jsonl").read_bytes() == before


def test_a_control_that_needs_two_clips_is_refused_before_any_work(data, directory, tmp_path, monkeypatch, capsys):
    command = [directory, "--benchmark", "mvbench", "--data", data["mvbench"], "--families", "action_count"]
    assert run(monkeypatch, *command, "--control", "all", "--out", tmp_path / "out") == 2
    assert "'other' needs two clips of the family action_count" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "error: evaluate needs a manifest or --benchmark with --data; give one of them"),
        (["--benchmark", "mvbench"], "error: --benchmark mvbench needs --data; give its official directory"),
        (["x.jsonl", "--no-think"], "error: --no-think is for public benchmarks; leave it out"),
        (["x.jsonl", "--frames", "official"], "error: --frames official is for public benchmarks; leave it out"),
        (["x.jsonl", "--num-frames", "9"], "error: --num-frames is for public benchmarks; leave it out"),
        (["--benchmark", "mvbench", "--data", "gone"], "error: gone is not a directory; give the one of mvbench"),
    ],
)
def test_wrong_options_are_one_sentence(directory, options, message, monkeypatch, capsys):
    assert run(monkeypatch, directory, *options) == 2
    assert capsys.readouterr().err.startswith(message)
