"""Reading the official directories: prompts, options, frames and subtitles by hand, and what an incomplete one says."""

import json
import shutil

import numpy as np
import pytest
import torch

from keye import SlowFastEncoder
from keye.errors import KeyeError
from keye.evaluation.public import BENCHMARKS, open_benchmark
from keye.evaluation.public.frames import FrameChoice, encode, interleaved, messages_of
from keye.evaluation.public.question import Subtitle
from keye.slowfast.plan import VideoPlan
from keye.world.render import write_mp4
from tests.keye.evaluation.public.layouts import LAYOUTS, MVBENCH, number_of, video_mme

FAMILIES = {"mvbench": [*MVBENCH, "episodic_reasoning"]}
ENCODER = SlowFastEncoder(max_tokens=400, min_tokens_per_frame=1, max_tokens_per_frame=6)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return {name: layout(folder / name) for name, layout in LAYOUTS.items()}


def opened(name, data, **options):
    return open_benchmark(name, data[name], **{"families": FAMILIES.get(name), **options})


def texts(question, video=None) -> list[str]:
    parts = messages_of(question, video)[-1]["content"]
    return [part.get("text", "video") for part in parts]


def frames_of(question, benchmark, **choice) -> list[int]:
    video = encode(question, benchmark, ENCODER, FrameChoice(**choice))
    return [number_of(picture) for picture in video.pictures()]


def test_every_layout_is_read():
    assert set(LAYOUTS) == set(BENCHMARKS)


def test_video_mme_has_its_prompt_and_slices(data):
    benchmark = opened("video_mme", data)
    question = benchmark.questions[1]
    assert texts(question) == [
        "Select the best answer to the following multiple-choice question based on the video. Respond with only the "
        "letter (A, B, C, or D) of the correct option.\nWhat is shown?\nA. A grey field.\nB. A red ball.\nC. Nothing.\n"
        "D. Snow.\nThe best answer is:"
    ]
    assert (question.id, question.answer, question.family) == ("001-2", "C", "short") and len(benchmark) == 4
    wanted = {"duration": "short", "domain": "Knowledge", "sub-category": "Geography", "task": "Counting Problem"}
    assert question.slices == wanted


def test_the_authors_json_of_video_mme_gives_the_same_questions(data, tmp_path):
    other = open_benchmark("video_mme", video_mme(tmp_path / "json", "json"))
    keys = ("id", "family", "answer", "options", "slices")
    ours, theirs = ([[getattr(q, key) for key in keys] for q in b] for b in (opened("video_mme", data), other))
    assert ours == theirs and [q.prompt for q in other] == [q.prompt for q in opened("video_mme", data)]


def test_video_mme_lists_the_subtitles_of_the_sampled_frames_only(data):
    benchmark = opened("video_mme", data, subtitles=True)
    question = benchmark.questions[0]
    video = encode(question, benchmark, ENCODER, FrameChoice())  # at 0.0, 0.5, …, 3.5 seconds
    *_, prompt = texts(question, video)
    assert prompt.startswith("This video's subtitles are listed below:\nIt begins.\nIt ends.\nSelect the best answer")
    assert "Between two frames." in texts(question)[0]  # without a clip all subtitles are shown
    *_, prompt = texts(benchmark.questions[2], encode(benchmark.questions[2], benchmark, ENCODER, FrameChoice()))
    assert prompt.startswith("Select the best answer")  # a video without a subtitle file


def test_longvideobench_has_its_prompt(data):
    benchmark = opened("longvideobench", data)
    assert texts(benchmark.questions[2]) == [
        "Question: What happens?\nA. It turns bright.\nB. It turns dark.\nC. Nothing.\nD. Rain.\nE. Hail.\n"
        "Answer with the option's letter from the given choices directly."
    ]
    assert [question.answer for question in benchmark] == ["C", "A", "B"]
    assert [question.family for question in benchmark] == ["15", "15", "600"]


def test_subtitles_of_longvideobench_are_between_the_frames(data):
    benchmark = opened("longvideobench", data, subtitles=True)
    question = benchmark.questions[0]
    assert [(s.start, s.end) for s in question.subtitles][1:] == [(0.0, 2.0), (pytest.approx(3.2), pytest.approx(3.3))]
    video = encode(question, benchmark, ENCODER, FrameChoice("official"))  # frames at 0, 1, 2 and 3 seconds
    parts = messages_of(question, video)[-1]["content"]
    assert [part.get("text", "video") for part in parts[:-1]] == ["video", "It begins.\n", "video", "It ends.\n"]
    assert [part["video"].plan.timestamps.tolist() for part in parts[0:4:2]] == [[0.0, 1.0], [2.0, 3.0]]
    last = benchmark.questions[2].subtitles
    assert last == (Subtitle(0.0, 1.0, "First."), Subtitle(3.0, 4.0, "Last."))  # no end: until the end of the clip


def test_parts_of_a_plan_join_to_the_plan(data):
    question = opened("longvideobench", data).questions[0]
    video = encode(question, opened("longvideobench", data), ENCODER, FrameChoice())
    subtitles = [Subtitle(t, t + 0.6, str(t)) for t in (0.2, 1.2, 1.3, 9.0)]
    parts = [part["video"] for part in interleaved(video, subtitles) if part["type"] == "video"]
    assert len(parts) == 3
    for name in ("frame_types", "timestamps"):
        joined = torch.cat([getattr(part.plan, name) for part in parts])
        assert torch.equal(joined, getattr(video.plan, name))
    assert torch.equal(torch.cat([part.pixel_values for part in parts]), video.pixel_values)
    assert set(video.plan.frame_types.tolist()) == {0, 1}


def test_parts_of_a_plan_with_many_sizes_join_to_the_plan(tmp_path):
    pictures = np.random.default_rng(0).integers(0, 256, (12, 168, 224, 3), np.uint8)
    for index in range(1, 12):  # a larger and larger part of each picture is new
        pictures[index, 14 * index :] = pictures[index - 1, 14 * index :]
    write_mp4(tmp_path / "clip.mp4", pictures, 2)
    limits = {"max_tokens": 250, "min_tokens_per_frame": 4, "max_tokens_per_frame": 48, "measure": "patch_l1"}
    video = SlowFastEncoder(policy="ladder", **limits)(tmp_path / "clip.mp4", dtype=torch.uint8)
    assert video.plan.levels is not None and len(set(video.plan.frame_sizes)) > 1
    middle = video.plan.timestamps[len(video.plan) // 2].item()
    subtitles = [Subtitle(middle - 0.1, middle + 0.1, "now")]
    parts = [part["video"] for part in interleaved(video, subtitles) if part["type"] == "video"]
    assert len(parts) == 2
    assert sum((part.plan.frame_sizes for part in parts), []) == video.plan.frame_sizes
    assert [part.plan.tokens for part in parts] == [len(part.pixel_values) // 4 for part in parts]
    assert [VideoPlan.from_json(part.plan.to_json()) for part in parts] == [part.plan for part in parts]


def test_mvbench_has_its_prompts_and_bounds(data):
    benchmark = opened("mvbench", data)
    system, turn = messages_of(benchmark.questions[0], None)
    assert system["content"].startswith("Carefully watch the video and pay attention to the cause")
    assert turn["content"][-1]["text"] == (
        system["content"] + "\nQuestion: Question 1?\nOptions:\n(A) one\n(B) two\n(C) three\nOnly give the best option."
    )
    assert benchmark.questions[0].prefix == "Best option:("
    assert benchmark.questions[0].sampling == {"start": 1.0, "end": 3.0} and benchmark.questions[0].answer == "B"
    assert benchmark.questions[2].sampling == {}


def test_tempcompass_has_its_prompts(data):
    found = {question.family: question for question in opened("tempcompass", data)}
    assert found["multi-choice"].prompt.endswith("C. faster\nPlease directly give the best option:")
    assert found["yes_no"].prompt == "Does it turn brighter?\nPlease answer yes or no:"
    assert found["captioning"].prompt == "Describe it.\nGenerated Caption:"
    assert [found[task].answer for task in ("multi-choice", "yes_no", "caption_matching")] == ["B", "no", "B"]
    assert found["yes_no"].slices["fine-grained aspect"] == "yes_no: color & light change"


@pytest.mark.parametrize(
    ("name", "place", "count", "expected"),
    [
        ("video_mme", 0, 5, [0, 9, 19, 29, 39]),  # linspace(0, 39, 5)
        ("longvideobench", 0, None, [0, 10, 20, 30]),  # min(64, 4 seconds) frames, int(40 / 4) apart
        ("longvideobench", 0, 3, [0, 13, 26]),
        ("mvbench", 0, 4, [12, 17, 22, 27]),  # 10 … 30, four segments of 5, their middles
        ("mvbench", 2, 4, [4, 14, 24, 33]),  # 0 … 39, int(4.875 + round(9.75 i)), half to even
        ("mvbench", 4, 3, [4, 6, 8]),  # pictures 3 … 9 of a folder that is numbered from 1
        ("tempcompass", 0, 4, [0, 6, 12, 19]),
    ],
)
def test_official_frames_are_those_of_the_authors(data, name, place, count, expected):
    benchmark = opened(name, data)
    assert frames_of(benchmark.questions[place], benchmark, frames="official", num_frames=count) == expected


def test_families_and_limits(data):
    assert len(opened("tempcompass", data, families=["yes_no"])) == 2
    assert [q.family for q in opened("tempcompass", data, limit=1)] == list(BENCHMARKS["tempcompass"].families(None))
    assert len(opened("video_mme", data, families=["long"], limit=1)) == 1


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("video_mm", {}, "--benchmark video_mm is not known; did you mean video_mme?"),
        ("mvbench", {"families": ["action_counts"]}, "mvbench has no action_counts; did you mean action_count?"),
        ("mvbench", {"families": None}, "action_prediction.json does not exist; download json/"),
        ("mvbench", {"subtitles": True}, "mvbench has no subtitles; leave out --subtitles"),
    ],
)
def test_a_wrong_option_is_one_sentence(data, name, options, message):
    with pytest.raises(KeyeError, match=message):
        open_benchmark(name, data.get(name, "nowhere"), **options)


def change_json(path, change) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def no_clip(folder):
    (folder / "videos/v2.mp4").unlink()


def no_subtitles(folder):
    shutil.rmtree(folder / "subtitles")


def no_key(folder):
    change_json(folder / "lvb_val.json", lambda rows: rows[1].pop("candidates"))


def test_set(folder):
    change_json(folder / "lvb_val.json", lambda rows: rows[0].pop("correct_choice"))


def wrong_value(folder):
    change_json(folder / "lvb_val.json", lambda rows: rows[2].update(correct_choice=9))


def no_annotation(folder):
    (folder / "lvb_val.json").unlink()


def not_json(folder):
    (folder / "lvb_val.json").write_text("[{")


def no_time(folder):
    change_json(folder / "subtitles/v2_en.json", lambda rows: rows[0].update(timestamp=[None, 1.0]))


test_set.__test__ = False


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_clip, r"1 of 3 questions of longvideobench have no clip, such as v2_2: .*v2.mp4 does not exist; join and"),
        (no_subtitles, r"v1_en.json does not exist; join and extract the tar files"),
        (no_key, r"lvb_val.json, question 2 has no key 'candidates'; join"),
        (test_set, r"lvb_val.json, question 1 has no key 'correct_choice'"),
        (wrong_value, r"lvb_val.json, question 3: correct_choice is 9; join"),
        (no_annotation, r"lvb_val.json does not exist; join"),
        (not_json, r"lvb_val.json cannot be read as JSON"),
        (no_time, r"v2_en.json, line 1: timestamp is \[None, 1.0\]; join"),
    ],
)
def test_an_incomplete_layout_names_file_key_and_remedy(data, tmp_path, damage, message):
    folder = shutil.copytree(data["longvideobench"], tmp_path / "copy")
    damage(folder)
    with pytest.raises(KeyeError, match=message):
        open_benchmark("longvideobench", folder, subtitles=True)


def test_questions_without_clips_can_be_left_out(data, tmp_path):
    folder = shutil.copytree(data["longvideobench"], tmp_path / "copy")
    no_clip(folder)
    benchmark = open_benchmark("longvideobench", folder, skip_missing=True)
    assert [question.id for question in benchmark] == ["v1_0", "v1_1"] and benchmark.left_out == 1
