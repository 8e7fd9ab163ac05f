"""TempCompass (arXiv 2403.00476): temporal perception in four formats of question about 410 short videos.

    DATA/questions/TASK.json           multi-choice, yes_no, caption_matching and captioning
    DATA/videos/VIDEO.mp4
    DATA/meta_info.json                optional: the fine-grained aspects

Prompts and answer rules: run_video_llava/inference_dataset.py and eval_*.py of github.com/llyx97/TempCompass, with
`--disable_llm`: a reply that no rule matches is wrong. The captions of the fourth format have no rule: a language model
judges them there. They are generated and stored, not scored.
"""

import re
from collections.abc import Iterator, Sequence

import numpy as np

from keye.evaluation.public.question import LETTERS, PublicBenchmark, PublicQuestion, Row, Verdict, read_json, user

CHOOSE = "\nPlease directly give the best option:"
PROMPTS = {"multi-choice": CHOOSE, "yes_no": "\nPlease answer yes or no:", "caption_matching": CHOOSE, "captioning": ""}
"""Task → the end of its prompt."""
ASPECTS = ("action", "direction", "speed", "order", "attribute_change")


class TempCompass(PublicBenchmark):
    """TempCompass; its families are the formats of question."""

    name = "tempcompass"
    max_new_tokens = 128
    remedy = "copy questions/ of github.com/llyx97/TempCompass and create videos/ with its scripts"

    def families(self) -> Sequence[str]:
        return tuple(PROMPTS)

    def read(self, families: Sequence[str]) -> Iterator[PublicQuestion]:
        meta = self.data / "meta_info.json"
        info = read_json(meta, dict, self.remedy) if meta.is_file() else {}
        for task in families:
            path = self.data / "questions" / f"{task}.json"
            for video, aspects in read_json(path, dict, self.remedy).items():
                where = f"{path}, video {video}"
                for aspect in Row(aspects, where, self.remedy).values:
                    rows = Row(aspects, where, self.remedy)(aspect, list)
                    fine = _fine(info, video, aspect)
                    for number, values in enumerate(rows, 1):
                        row = Row(values, f"{where}, {aspect} {number}", self.remedy)
                        yield self._question(task, video, aspect, fine, number, row)

    def _question(self, task: str, video: str, aspect: str, fine: str | None, number: int, row: Row) -> PublicQuestion:
        text, answer = row("question"), row("answer")
        lines = text.split("\n")[1:]
        clip = self.data / "videos" / f"{video}.mp4"
        slices = {"task": task, "aspect": f"{task}: {aspect}"}
        if fine:
            slices["fine-grained aspect"] = f"{task}: {fine}"
        options, letter = lines, answer
        if task == "yes_no":
            options, letter = ["yes", "no"], row("answer", str, ("yes", "no").__contains__)
        elif task == "multi-choice":
            letter = row("answer", str, lambda answer: answer[:1] in tuple("ABCD"))[0]
        elif task == "caption_matching":
            names = [line.partition(":")[0] for line in lines]
            named = row("answer", str, lambda answer: answer.partition(":")[0] in names).partition(":")[0]
            letter = LETTERS[names.index(named)]
        return PublicQuestion(
            id=f"{task}/{video}/{aspect}/{number}",
            family=task,
            messages=user(clip, text + PROMPTS[task]),
            answer=letter,
            options=None if task == "captioning" else options,
            clip=clip,
            slices=slices,
            official={"question": text, "answer": answer},
        )

    def judge(self, question: PublicQuestion, reply: str) -> Verdict | None:
        if question.family == "captioning":
            return None
        reply = reply.replace("</s>", "").strip()
        read = {"multi-choice": _letter, "yes_no": _polar, "caption_matching": _caption}[question.family]
        choice = read(reply, question)
        return Verdict(choice, choice == question.answer)

    def frames(self, question: PublicQuestion, total: int, rate: float, count: int) -> list[int]:
        return np.linspace(0, total - 1, count, dtype=int).tolist()


def _fine(info: dict, video: str, aspect: str) -> str | None:
    """The fine-grained aspect of `meta_info.json`; `order` has none of its own."""
    if aspect == "order" or not info:
        return aspect if info else None
    kinds = (info.get(video) or {}).get("eval_dim") or {}
    return (kinds.get(aspect) or {}).get("type")


def _letter(reply: str, question: PublicQuestion) -> str:
    if reply == question.official["answer"]:
        return question.answer
    alone = reply in tuple("ABCD")
    return reply[0] if alone or (reply[:1] in tuple("ABCD") and reply[1:2] in (".", ")")) else ""


def _polar(reply: str, question: PublicQuestion) -> str:
    return next((word for word in ("yes", "no") if reply.lower().startswith(word)), "")


def _caption(reply: str, question: PublicQuestion) -> str:
    """The option whose line, sentence, name or letter the reply is; of several, the rule takes the last."""
    options = [(line, *line.split(": ")[:2]) for line in question.options]
    choice = ""
    for place, (line, *_) in enumerate(options):
        choice = LETTERS[place] if reply == line else choice
    for place, (_, *parts) in enumerate(options):
        sentence = parts[1] if len(parts) > 1 else None
        if sentence is not None and sentence in (reply, reply.partition(") ")[2].partition(") ")[0]):
            choice = LETTERS[place]
    names = [name for _, name, *_rest in options]
    for known in (names, [re.sub("Sentence |Option |Caption ", "", name) for name in names]):
        for place, name in enumerate(known):
            choice = LETTERS[place] if name in (reply, reply.replace(".", "")) else choice
    return choice
