"""Questions about small clips on disk, and a fake model that answers each step."""

import json
import re

import numpy as np

from tests.keye.video.make import write_video
from tests.rl.endpoint.fake_server import completion, text_of


def scenes(seed):
    """Three seconds at 4 frames a second: two still pictures of noise, so that a plan has slow and fast frames."""
    drawn = np.random.default_rng(seed).integers(0, 255, (2, 8, 12, 3), dtype=np.uint8)
    large = drawn.repeat(14, axis=1).repeat(14, axis=2)
    return large.repeat(6, axis=0)


def write_questions(folder, count=4, clip=True):
    """`count` questions, two for each clip; the answer of number n is `blue<n>`."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(count):
        content = [{"type": "text", "text": f"Which colour is number {number}?"}]
        if clip:
            name = f"clip{number // 2}.mp4"
            if not (folder / name).exists():
                write_video(folder / name, scenes(number), rate=4)
            content.insert(0, {"type": "video", "video": name})
        messages = [{"role": "user", "content": content}]
        lines.append({"id": f"q{number}", "messages": messages, "answer": f"blue{number}"})
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def number_of(request):
    return int(re.findall(r"number (\d+)", text_of(request))[-1])


def seen(request):
    """Whether a request has pictures or clips."""
    content = request["messages"][-1]["content"]
    return not isinstance(content, str) and any(part["type"] != "text" for part in content)


def spelled(text, values=(-0.5,)):
    """A completion with a log-probability for each character, in a cycle."""
    content = [{"token": c, "logprob": values[i % len(values)], "bytes": None} for i, c in enumerate(text)]
    return completion(text, logprobs={"content": content})
