"""MVBench (arXiv 2311.17005): 20 tasks of 200 questions each about clips of eleven data sets.

    DATA/json/TASK.json                the annotations
    DATA/video/FOLDER/…                the extracted zip files; FOLDER as in `TASKS`

Prompt, frames and answer rule: video_chat2/mvbench.ipynb of github.com/OpenGVLab/Ask-Anything. The notebook counts an
empty reply as correct, because the open bracket that it puts before a reply is part of every answer; here a reply
without a letter is wrong.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from keye.evaluation.public.question import LETTERS, PublicBenchmark, PublicQuestion, Row, Verdict, read_json, user

SYSTEM = (
    "Carefully watch the video and pay attention to the cause and sequence of events, the detail and movement of"
    " objects, and the action and pose of persons. Based on your observations, select the best option that accurately"
    " addresses the question.\n"
)
END = "\nOnly give the best option."
PREFIX = "Best option:("
_STAR, _CLEVRER, _PERCEPTION = "star/Charades_v1_480", "clevrer/video_validation", "perception/videos"
TASKS: dict[str, tuple[str, bool]] = {
    "action_sequence": (_STAR, True),
    "action_prediction": (_STAR, True),
    "action_antonym": ("ssv2_video", False),
    "fine_grained_action": ("Moments_in_Time_Raw/videos", False),
    "unexpected_action": ("FunQA_test/test", False),
    "object_existence": (_CLEVRER, False),
    "object_interaction": (_STAR, True),
    "object_shuffle": (_PERCEPTION, False),
    "moving_direction": (_CLEVRER, False),
    "action_localization": ("sta/sta_video", True),
    "scene_transition": ("scene_qa/video", False),
    "action_count": (_PERCEPTION, False),
    "moving_count": (_CLEVRER, False),
    "moving_attribute": (_CLEVRER, False),
    "state_change": (_PERCEPTION, False),
    "fine_grained_pose": ("nturgbd", False),
    "character_order": (_PERCEPTION, False),
    "egocentric_navigation": ("vlnqa", False),
    "episodic_reasoning": ("tvqa/frames_fps3_hq", True),
    "counterfactual_inference": (_CLEVRER, False),
}
"""Task → (folder of its clips, whether a question is about the part from `start` to `end`)."""
FRAME_FOLDERS = {"episodic_reasoning": 3.0}
"""Tasks whose clips are folders of pictures 00001.jpg, 00002.jpg, …, and their frames per second."""


class MVBench(PublicBenchmark):
    """MVBench; its families are the tasks."""

    name = "mvbench"
    max_new_tokens = 100
    num_frames = 16
    remedy = "download json/ and extract the zip files of video/ of the Hub's OpenGVLab/MVBench"

    def families(self) -> Sequence[str]:
        return tuple(TASKS)

    def read(self, families: Sequence[str]) -> Iterator[PublicQuestion]:
        for task in families:
            path = self.data / "json" / f"{task}.json"
            for number, values in enumerate(read_json(path, list, self.remedy), 1):
                yield self._question(task, number, Row(values, f"{path}, question {number}", self.remedy))

    def _question(self, task: str, number: int, row: Row) -> PublicQuestion:
        options = row.texts("candidates")
        known = [text.strip().casefold() for text in options]
        answer = row("answer", str, lambda text: text.strip().casefold() in known).strip().casefold()
        lines = [f"({letter}) {text}" for letter, text in zip(LETTERS, options, strict=False)]
        question = "\n".join([f"Question: {row('question')}", "Options:", *lines])
        sampling = {}
        if TASKS[task][1]:
            start, end = (float(row(key, (int, float))) for key in ("start", "end"))
            sampling = {"start": max(start, 0.0), "end": end}
        if task in FRAME_FOLDERS:
            sampling["source_fps"] = FRAME_FOLDERS[task]
        clip = self._clip(TASKS[task][0], row("video"))
        messages = [{"role": "system", "content": SYSTEM.strip()}, *user(clip, SYSTEM + question + END, sampling)]
        return PublicQuestion(
            id=f"{task}-{number}",
            family=task,
            messages=messages,
            answer=LETTERS[known.index(answer)],
            options=options,
            clip=clip,
            sampling=sampling,
            prefix=PREFIX,
            slices={"task": task},
        )

    def judge(self, question: PublicQuestion, reply: str) -> Verdict:
        first = f"({reply.strip()}".split("\n")[0].lower().split(" ")[0]
        wanted = f"({question.answer.lower()})"
        letter = re.search(r"[a-z]", first)
        if not letter:
            return Verdict("", False)
        correct = first.replace(".", "") in wanted or wanted in first
        return Verdict(question.answer if correct else letter[0].upper(), correct)

    def frames(self, question: PublicQuestion, total: int, rate: float, count: int) -> list[int]:
        folder = "source_fps" in question.sampling
        first, last = (1, total) if folder else (0, total - 1)  # the pictures of a folder are numbered from 1
        start = max(first, round(question.sampling["start"] * rate)) if "start" in question.sampling else first
        end = min(round(question.sampling["end"] * rate), last) if "end" in question.sampling else last
        size = float(end - start) / count
        found = [int(start + size / 2 + np.round(size * place)) for place in range(count)]
        return [min(max(index, first), last) - first for index in found]

    def _clip(self, folder: str, video: str) -> Path:
        # The corrected clips of data0613.zip are in a folder of their own.
        corrected = self.data / "video" / "data0613" / folder / video
        return corrected if corrected.exists() else self.data / "video" / folder / video
