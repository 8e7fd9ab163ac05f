"""Keye in lmms-eval: a local task from the command line, and the plug-in's requests, settings and errors.

lmms-eval demands older packages than this project, so it has its own environment (docs/evaluation.md).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lmms_eval")

from lmms_eval.api.instance import Instance  # noqa: E402
from lmms_eval.models import get_model  # noqa: E402

from keye import SlowFastEncoder  # noqa: E402
from keye.adapters.lmms_eval import Keye, keye_messages, sampling_of  # noqa: E402
from keye.errors import KeyeError  # noqa: E402
from keye.inference.chat import Chat, load_model  # noqa: E402
from keye.inference.sampling import Sampling  # noqa: E402
from tests.keye.adapters.lmms_task import draw_task  # noqa: E402
from tests.keye.inference.talk import tiny_directory  # noqa: E402

ROOT = Path(__file__).resolve().parents[3]
SETTINGS = {"max_tokens": 128, "max_tokens_per_frame": 16}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_directory(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    return draw_task(tmp_path_factory.mktemp("task"), count=2)


def lmms_eval(task: Path, out: Path, *options: str) -> subprocess.CompletedProcess:
    """Run the command line of lmms-eval on the local task."""
    command = [sys.executable, "-m", "lmms_eval", "--model", "keye", "--tasks", "drawn_clips", "--include_path", task]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(out / "hf")}
    command += ["--output_path", out, "--log_samples", *options]
    return subprocess.run(command, cwd=out, env=environment, capture_output=True, text=True, check=False)


def rows(questions: Path) -> list[dict]:
    return [json.loads(line) for line in questions.read_text().splitlines()]


def requests(docs: list[dict], **generation: object) -> tuple[list[Instance], dict]:
    """One request of six arguments for each document, as lmms-eval builds them, and the model's task_dict."""

    def messages(doc: dict) -> list[dict]:
        parts = [{"type": "video", "url": doc["clip"]}, {"type": "text", "text": doc["question"]}]
        return [{"role": "user", "content": parts}]

    meta = {"task": "drawn", "doc_id": 0, "repeats": 1}
    built = [
        Instance("generate_until", (doc["question"], messages, dict(generation), number, "drawn", "test"), 0, meta)
        for number, doc in enumerate(docs)
    ]
    return built, {"drawn": {"test": docs}}


def test_a_local_task_runs_from_the_command_line(model, questions, tmp_path):
    arguments = f"pretrained={model},{','.join(f'{name}={value}' for name, value in SETTINGS.items())}"
    done = lmms_eval(questions.parent, tmp_path, "--model_args", arguments, "--batch_size", "2")
    assert done.returncode == 0 and "|drawn_clips|" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
    [samples] = tmp_path.rglob("*samples_drawn_clips.jsonl")
    answers = {sample["doc_id"]: sample["filtered_resps"] for sample in map(json.loads, samples.open())}
    pair, docs = load_model(model), rows(questions)
    for number, doc in enumerate(docs):
        encoder = SlowFastEncoder(**{**pair[1].encoder, **SETTINGS})
        chat = Chat(*pair, sampling=Sampling(8))
        chat._media.append({"type": "video", "video": encoder(doc["clip"])})
        expected = "".join(piece.text for piece in chat.ask(doc["question"]))
        assert answers[number] == expected.strip(), doc
    assert len(answers) == len(docs) == 4 and len(set(answers.values())) > 1


def test_clips_keep_their_slow_and_fast_frames_for_every_batch_size(model, questions):
    docs, answers = rows(questions), []
    for size in (1, 3):
        keye = Keye(str(model), device="cpu", batch_size=size, **SETTINGS)
        built, keye.task_dict = requests(docs, max_new_tokens=6)
        answers.append([result.text for result in keye.generate_until(built)])
        encoder = SlowFastEncoder(**keye.processor.encoder)
        plans = [encoder.plan(doc["clip"]) for doc in docs]
        slow, fast = map(sum, zip(*(plan.counts for plan in plans), strict=True))
        wanted = {"clips": len(docs), "slow": slow, "fast": fast, "tokens": sum(plan.tokens for plan in plans)}
        assert keye.counts == wanted and fast > 0
    assert answers[0] == answers[1]


def test_the_entry_point_names_the_chat_class():
    assert get_model("keye") is Keye and get_model("keye_vl") is Keye and not Keye.is_simple


def test_generation_arguments_become_sampling():
    given = {"max_new_tokens": 5, "until": ["\n\n", ""], "temperature": 0.5, "top_p": 0.9, "do_sample": True}
    assert sampling_of(given, 100) == Sampling(5, 0.5, 0.9, stop=("\n\n",))
    assert sampling_of({**given, "do_sample": False}, 100) == Sampling(5, stop=("\n\n",))
    assert sampling_of({"until": "END", "max_new_tokens": 900}, 100) == Sampling(50, stop=("END",))
    with pytest.raises(KeyeError, match="num_beams is 4"):
        sampling_of({"num_beams": 4}, 100)


def test_messages_keep_parts_of_clips_and_pictures():
    parts = [
        {"type": "video", "url": "a.mp4", "start_time": 1.5, "end_time": 3},
        {"type": "video", "url": {"url": "b.mp4", "video_start": 2}},
        {"type": "image", "url": "c.png"},
        {"type": "text", "text": "?"},
    ]
    [system, user] = keye_messages([{"role": "user", "content": parts}], "Be brief.")
    assert system == {"role": "system", "content": "Be brief."}
    assert user["content"] == [
        {"type": "video", "video": "a.mp4", "start": 1.5, "end": 3.0},
        {"type": "video", "video": "b.mp4", "start": 2},
        {"type": "image", "image": "c.png"},
        {"type": "text", "text": "?"},
    ]
    with pytest.raises(KeyeError, match="has sound"):
        keye_messages([{"role": "user", "content": [{"type": "audio", "url": "d.wav"}]}])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_token": 8}, "error: model_args: max_token is not known; did you mean max_tokens?"),
        ({"pretrained": ""}, "error: model_args: pretrained is missing; give a model directory"),
        ({"policy": "nearest"}, "error: .*nearest"),
        ({"batch_size": "auto"}, "error: batch_size is 'auto'; give a whole number of 1 or more"),
        ({"thinking": "yes"}, "error: model_args: thinking is 'yes'; give True or False"),
        ({"pretrained": "nowhere"}, "error: nowhere is not a model directory; give one that a stage"),
    ],
)
def test_a_wrong_argument_is_one_sentence(model, arguments, message):
    with pytest.raises(SystemExit, match=message) as raised:
        Keye(**{"pretrained": str(model), "device": "cpu", **arguments})
    assert "\n" not in str(raised.value)


def test_a_model_without_chat_template_is_one_sentence(tmp_path):
    tiny_directory(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(SystemExit, match="has no chat template; copy the chat_template.jinja"):
        Keye(str(tmp_path), device="cpu")


def test_a_missing_clip_is_one_sentence_with_its_document(model, questions):
    keye = Keye(str(model), device="cpu")
    docs = rows(questions)
    docs[1]["clip"] = "gone.mp4"
    built, keye.task_dict = requests(docs)
    with pytest.raises(SystemExit, match="error: task drawn, document 1: gone.mp4 does not exist; check the path"):
        keye.generate_until(built)
    for call in (keye.loglikelihood, keye.generate_until_multi_round):
        with pytest.raises(SystemExit, match="error: keye answers tasks"):
            call([])


def test_the_command_line_prints_one_sentence_for_a_wrong_argument(model, questions, tmp_path):
    done = lmms_eval(questions.parent, tmp_path, "--model_args", f"pretrained={model},max_token=9")
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    assert done.stderr.splitlines()[-1] == "error: model_args: max_token is not known; did you mean max_tokens?"
