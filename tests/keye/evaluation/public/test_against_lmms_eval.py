"""Our answer rules and subtitles against those of lmms-eval's tasks, on random replies and times.

Its rule for Video-MME is its own, not that of the authors.
"""

import random
import sys

import pytest
import torch

pytest.importorskip("lmms_eval")
pytest.importorskip("decord")

from lmms_eval.tasks.longvideobench import utils as their_longvideobench  # noqa: E402
from lmms_eval.tasks.videomme import utils as their_video_mme  # noqa: E402

from keye import SlowFastEncoder  # noqa: E402
from keye.evaluation.public.frames import interleaved  # noqa: E402
from keye.evaluation.public.longvideobench import LongVideoBench  # noqa: E402
from keye.evaluation.public.question import PublicQuestion, Subtitle  # noqa: E402
from keye.evaluation.public.tempcompass import TempCompass  # noqa: E402
from keye.evaluation.public.video_mme import read_srt  # noqa: E402
from tests.keye.evaluation.public.layouts import draw, tempcompass, video_mme  # noqa: E402

WORDS = ["The best answer is", "The answer", "The correct option is", "Best option:", "A", "B.", "(C)", "D)", "E", "b"]
WORDS += ["Yes", "no", "dog", "because", "a", "it", "is", "Caption A", "Caption B:", "It turns dark.", "\n", ".", ""]


def replies(count: int = 2000) -> list[str]:
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=rng.randrange(14))) for _ in range(count)]


def judged(benchmark: type, reply: str, **question: object):
    options = question.pop("options", ["a", "b", "c", "d", "e"])
    question = {"family": "", "answer": "B", **question}
    return object.__new__(benchmark).judge(PublicQuestion("q", messages=[], options=options, **question), reply)


def test_letters_of_longvideobench(monkeypatch):
    monkeypatch.setattr(their_longvideobench.random, "choice", lambda _: "")
    for reply in replies():
        theirs = their_longvideobench.parse_multi_choice_response(reply, [], {})
        assert judged(LongVideoBench, reply).choice == theirs, reply


def test_rules_of_tempcompass(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    from lmms_eval.tasks.tempcompass import utils as theirs

    benchmark = TempCompass(tempcompass(tmp_path))
    monkeypatch.setattr(theirs, "get_eval_result", lambda *_: (None, 0))  # with --disable_llm
    for question in benchmark:
        rule = {
            "multi-choice": "multi_choice", "yes_no": "yes_no", "caption_matching": "caption_matching",
        }.get(question.family)  # fmt: skip
        for reply in map(str.strip, replies(500)) if rule else ():
            document = {"video_id": "10", "dim": "attribute_change", **question.official}
            found = getattr(theirs, f"tempcompass_process_results_{rule}")(document, [reply])["avg_accuracy"]
            verdict = benchmark.judge(question, reply)
            assert verdict.correct == bool(found["rating"]), (question.id, reply)
            assert bool(verdict.choice) == found["match_success"], (question.id, reply)


def test_places_of_subtitles_in_longvideobench():
    rng, size = random.Random(1), (56, 84)
    pictures = [torch.from_numpy(draw(number, *size)).permute(2, 0, 1) for number in range(12)]
    video = SlowFastEncoder(max_tokens=200, min_tokens_per_frame=1)(pictures, timestamps=range(12), dtype=torch.uint8)
    for _ in range(200):
        starts = sorted(rng.uniform(-3, 14) for _ in range(rng.randrange(6)))
        subtitles = [Subtitle(start, start + rng.uniform(0.1, 4), f"text {start}") for start in starts]
        theirs = their_longvideobench.insert_subtitles_into_frames(
            list(range(12)), [{"timestamp": [s.start + 50, s.end + 50], "text": s.text} for s in subtitles], 50, 12
        )
        ours = []
        for part in interleaved(video, subtitles):
            ours += ["<image>"] * len(part["video"].plan) if "video" in part else [part["text"].strip()]
        assert "\n".join(ours) == theirs


def test_subtitles_of_video_mme(tmp_path):
    path = video_mme(tmp_path, "json") / "subtitle" / "aaa.srt"
    theirs = their_video_mme.load_subtitles(path)
    ours = {(s.start, s.end): s.text for s in read_srt(path)}
    assert list(ours) == list(theirs) and ours[3.0, 4.0] == theirs[3.0, 4.0].strip() == "It ends."


def test_the_tasks_of_lmms_eval_are_the_real_ones():
    assert "site-packages" in their_video_mme.__file__ and "lmms_eval" in sys.modules
