"""A graded file: an A, a borderline A and two B, about one clip."""

import json

from tests.rl.reasoning.questions import rows, write_questions

HOSTILE = "<img src=x onerror=\"document.title='owned'\"><b>bold</b>"


def write_graded(folder):
    row = rows(write_questions(folder, 1))[0]
    lines = []
    chains = [
        ("A", False, ["I look at the frames.", "The square is blue."], []),
        ("A", True, ["At 0.0 s there is noise.", "At 1.5 s the noise changes.", "So it is blue."], []),
        ("B", False, ["I guess that it is red.", HOSTILE, "No, it is blue.", "It is blue because it is blue."], [1, 2]),
        ("B", False, [], []),
    ]  # fmt: skip
    for number, (grade, borderline, steps, flawed) in enumerate(chains):
        thought = "\n".join(steps)
        path = {
            "sample": number, "text": f"<think>{thought}</think><answer>blue0</answer>", "finished": True,
            "thinking": thought, "answer": "blue0", "answer_confidence": -0.21, "logprobs": True, "tokens": 9,
            "steps": [{"text": step, "confidence": -0.1 - 0.3 * place} for place, step in enumerate(steps)],
        }  # fmt: skip
        more = {"grade": grade, "why": "the process is flawed", "flawed": flawed, "process": 0.5}
        lines.append(row | {"id": f"q0/{number}", "trajectory": path, "borderline": borderline} | more)
    path = folder / "graded.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
