"""Tiny directories in the official layouts of the public benchmarks, with drawn clips.

python -m tests.keye.evaluation.public.layouts FOLDER      # all of them
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from keye.world.render import write_mp4

LEVEL = 6
"""Grey levels between two frames: a frame's brightness is `LEVEL` times its number."""


def draw(number: int, height: int = 56, width: int = 84) -> np.ndarray:
    return np.full((height, width, 3), number * LEVEL, np.uint8)


def clip(path: Path, frames: int = 40, fps: int = 10) -> None:
    """A clip whose frames show their number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_mp4(path, map(draw, range(frames)), fps)


def number_of(picture) -> int:
    """The number of a frame uint8 [3, h, w]."""
    return round(float(picture.float().mean()) / LEVEL)


def save(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


VIDEOS = (("001", "aaa", "short"), ("601", "bbb", "long"))


def video_mme(folder: Path, form: str = "parquet") -> Path:
    """Two videos with two questions each; the first has subtitles."""
    rows = []
    for video_id, video, duration in VIDEOS:
        clip(folder / "data" / f"{video}.mp4")
        for number, answer in ((1, "A"), (2, "C")):
            options = ["A. A grey field.", "B. A red ball.", "C. Nothing.", "D. Snow."]
            rows.append(
                {
                    "video_id": video_id, "duration": duration, "domain": "Knowledge", "sub_category": "Geography",
                    "url": f"https://www.youtube.com/watch?v={video}", "videoID": video,
                    "question_id": f"{video_id}-{number}", "task_type": "Counting Problem",
                    "question": "What is shown?", "options": options, "answer": answer,
                }
            )  # fmt: skip
    if form == "parquet":
        import pyarrow
        import pyarrow.parquet

        (folder / "videomme").mkdir(parents=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "videomme/test-00000-of-00001.parquet")
    else:
        save(folder / "video_mme.json", [_authors_form(rows, video_id) for video_id, *_ in VIDEOS])
    (folder / "subtitle").mkdir(parents=True)
    (folder / "subtitle" / "aaa.srt").write_text(
        '1\n00:00:00,000 --> 00:00:00,900\n<font color="white" size=".72c">It begins.</font>\n\n'
        "2\n00:00:01,100 --> 00:00:01,300\nBetween two frames.\n\n"
        "3\n00:00:03,000 --> 00:00:04,000\nIt\nends.\n",
        encoding="utf-8",
    )
    return folder


def _authors_form(rows: list[dict], video_id: str) -> dict:
    """A video of the authors' JSON."""
    own = [row for row in rows if row["video_id"] == video_id]
    questions = [
        {**{key: row[key] for key in ("question_id", "task_type", "question", "answer")}, "choices": row["options"]}
        for row in own
    ]
    return {
        "video_id": video_id, "duration_category": own[0]["duration"], "video_category": own[0]["domain"],
        "video_sub_category": own[0]["sub_category"], "url": own[0]["url"], "questions": questions,
    }  # fmt: skip


def longvideobench(folder: Path) -> Path:
    """Three questions about two clips that were cut out of longer videos, with both forms of subtitles."""
    rows = []
    for number, (video, group, answer) in enumerate((("v1", 15, 2), ("v1", 15, 0), ("v2", 600, 1))):
        clip(folder / "videos" / f"{video}.mp4")
        rows.append(
            {
                "video_id": video, "video_path": f"{video}.mp4", "subtitle_path": f"{video}_en.json",
                "question": "What happens?", "question_wo_referring_query": "What happens?",
                "candidates": ["It turns bright.", "It turns dark.", "Nothing."] + ["Rain.", "Hail."][: group // 300],
                "correct_choice": answer, "position": [1, 2], "topic_category": "KG-Knowledge-Geography",
                "question_category": ("S2E", "T2A")[number % 2], "level": "L1-Perception", "id": f"{video}_{number}",
                "duration_group": group, "starting_timestamp_for_subtitles": 100, "duration": 4.0, "view_count": 9,
            }
        )  # fmt: skip
    save(folder / "lvb_val.json", rows)
    save(
        folder / "subtitles" / "v1_en.json",
        [
            {"start": "00:01:30.000", "end": "00:01:31.000", "line": "Before the clip."},
            {"start": "00:01:40.000", "end": "00:01:42.000", "line": "It begins."},
            {"start": "00:01:43.200", "end": "00:01:43.300", "line": "It ends."},
        ],
    )
    save(
        folder / "subtitles" / "v2_en.json",
        [{"timestamp": [100.0, 101.0], "text": "First."}, {"timestamp": [103.0, None], "text": "Last."}],
    )
    return folder


MVBENCH = {"action_sequence": "star/Charades_v1_480", "action_count": "perception/videos"}


def mvbench(folder: Path) -> Path:
    """Two questions of three tasks: parts of videos, complete videos, and a folder of pictures."""
    for task, place in MVBENCH.items():
        clip(folder / "video" / place / f"{task}.mp4")
        rows = [
            {
                "video": f"{task}.mp4",
                "question": f"Question {n}?",
                "candidates": ["one", "two", "three"],
                "answer": answer,
            }
            for n, answer in ((1, "two"), (2, "three"))
        ]
        if task == "action_sequence":
            rows = [{**row, "start": 1.0, "end": 3.0} for row in rows]
        save(folder / "json" / f"{task}.json", rows)
    pictures = folder / "video" / "tvqa" / "frames_fps3_hq" / "house_s01"
    pictures.mkdir(parents=True)
    for number in range(1, 13):
        Image.fromarray(draw(number)).save(pictures / f"{number:05d}.jpg")
    row = {"video": "house_s01", "question": "Why?", "candidates": ["a", "b", "c", "d", "e"], "answer": "e"}
    save(folder / "json" / "episodic_reasoning.json", [{**row, "start": 1.0, "end": 3.0, "fps": 3}])
    return folder


def tempcompass(folder: Path) -> Path:
    """A clip and the reversed one, with the four formats of question."""
    for video in ("10", "10_reverse"):
        clip(folder / "videos" / f"{video}.mp4", frames=20)
    pairs = (("10", "brighter", "A"), ("10_reverse", "darker", "B"))
    kinds = {
        "multi-choice": lambda word, letter: ("What happens?\nA. brighter\nB. darker\nC. faster", f"{letter}. {word}"),
        "yes_no": lambda word, letter: ("Does it turn brighter?", "yes" if letter == "A" else "no"),
        "caption_matching": lambda word, letter: (
            "Which caption matches the video better?\nCaption A: It turns brighter.\nCaption B: It turns darker.",
            f"Caption {letter}: It turns {word}.",
        ),
        "captioning": lambda word, letter: ("Describe it.\nGenerated Caption:", f"{letter}. {word}"),
    }
    for task, make in kinds.items():
        questions = {}
        for video, word, letter in pairs:
            text, answer = make(word, letter)
            questions[video] = {"attribute_change": [{"question": text, "answer": answer}]}
        save(folder / "questions" / f"{task}.json", questions)
    change = {"subject": "field", "attribute_change": "brighter", "type": "color & light change"}
    dims = {"action": None, "speed": None, "direction": None, "order": None, "attribute_change": change}
    save(folder / "meta_info.json", {video: {"eval_dim": dims, "content": []} for video, *_ in pairs})
    return folder


LAYOUTS = {layout.__name__: layout for layout in (video_mme, longvideobench, mvbench, tempcompass)}

if __name__ == "__main__":
    for name, layout in LAYOUTS.items():
        print(layout(Path(sys.argv[1]) / name))
