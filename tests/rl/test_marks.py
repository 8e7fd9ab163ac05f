"""Questions of a manifest are marked by what a model answers without their media; a stopped run continues."""

import json
import zlib
from pathlib import Path

import pytest

from keye.errors import ManifestError
from rl.blindness import Blindness, without_marked
from rl.questions.marks import Marking, load_answerer, mark
from rl.questions.prompts import load_prompts
from tests.rl.test_restarts import make_visual_run


def line(number: int, media: bool = True, **more: object) -> str:
    content = [{"type": "text", "text": f"how many flashes in {number}?"}]
    if media:
        content.insert(0, {"type": "video", "video": f"clips/{number}.mp4"})
    family = "count" if number % 2 else "order"
    return json.dumps({"id": str(number), "family": family, "answer": "3", "meta": {"é": 1}, **more,
                       "messages": [{"role": "user", "content": content}]}, ensure_ascii=False)  # fmt: skip


@pytest.fixture
def manifest(tmp_path) -> Path:
    lines = [line(i) for i in range(7)]
    lines[2:2] = [line(100, media=False), "", '{"answer": 3, "messages": [{"role": "user", "content": "?"}]}']
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(lines))  # the last line has no newline
    return path


def test_another_model_does_not_continue_a_file(manifest):
    out, model = manifest.with_name("marked.jsonl"), manifest.with_name("model")
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"one")
    asked = []

    def stopped(prompts, seed):
        if asked:
            raise KeyboardInterrupt
        asked.append(seed)
        return accuracies(prompts, seed)

    with pytest.raises(KeyboardInterrupt):
        mark(manifest, out, Marking(batch=4, model=str(model)), stopped)
    (model / "model.safetensors").write_bytes(b"two")
    with pytest.raises(ManifestError, match="was begun with another model in"):
        mark(manifest, out, Marking(batch=4, model=str(model)), accuracies)
    (model / "model.safetensors").write_bytes(b"one")
    mark(manifest, out, Marking(batch=4, model=str(model)), accuracies)


def accuracies(prompts, seed):
    """Depends on the question and on the seed, as sampled answers do."""
    return [zlib.crc32(f"{prompt.id}/{seed}".encode()) % 9 / 8 for prompt in prompts]


def test_only_questions_with_media_are_marked(manifest):
    out = manifest.with_name("marked.jsonl")
    counts = mark(manifest, out, Marking(batch=4), accuracies)
    before, after = manifest.read_text().splitlines(), out.read_text().splitlines()
    assert len(after) == len(before) == 10
    for old, new in zip(before, after, strict=True):
        if "clips/" in old:
            row = json.loads(new)
            assert 0 <= row.pop("blind_accuracy") <= 1 and row == json.loads(old)
        else:
            assert new == old
    assert not list(manifest.parent.glob("*.partial*"))
    text = counts.lines(0.5)
    values = [json.loads(row)["blind_accuracy"] for row in after if "clips/" in row]
    share = sum(value >= 0.5 for value in values) / 7
    assert text[0] == "10 lines, 7 questions with media"
    assert text[1].startswith("1 lines cannot be used, the first because") and "train.jsonl:5" in text[1]
    assert text[2] == f"all: 7 questions, blind accuracy {sum(values) / 7:.3f}, {share:.1%} of them at 0.5 or more"
    assert text[3].startswith("count: 3 questions") and text[4].startswith("order: 4 questions")


@pytest.mark.parametrize("batches", [0, 1, 2])
def test_a_stopped_run_continues_and_writes_the_same_file(manifest, batches):
    whole, out = manifest.with_name("whole.jsonl"), manifest.with_name("marked.jsonl")
    expected = mark(manifest, whole, Marking(batch=4), accuracies)
    asked = []

    def stopped(prompts, seed):
        if len(asked) == batches:
            raise KeyboardInterrupt
        asked.append(seed)
        return accuracies(prompts, seed)

    with pytest.raises(KeyboardInterrupt):
        mark(manifest, out, Marking(batch=4), stopped)
    assert not out.exists()
    with out.with_name("marked.jsonl.partial").open("ab") as file:
        file.write(b'{"torn": ')  # as a killed process leaves it
    again = []
    counts = mark(manifest, out, Marking(batch=4), lambda p, s: (again.append(s), accuracies(p, s))[1])
    assert out.read_bytes() == whole.read_bytes() and counts.lines(0.5) == expected.lines(0.5)
    assert len(again) == 3 - batches


def test_other_settings_another_manifest_and_existing_files_are_refused(manifest):
    out = manifest.with_name("marked.jsonl")
    with pytest.raises(ZeroDivisionError):
        mark(manifest, out, Marking(), lambda p, s: 1 / 0)
    with pytest.raises(ManifestError, match="begun with samples = 8, and now it is 4"):
        mark(manifest, out, Marking(samples=4), accuracies)
    manifest.write_text(line(1))
    with pytest.raises(ManifestError, match="begun with manifest"):
        mark(manifest, out, Marking(), accuracies)
    out.write_text("")
    with pytest.raises(ManifestError, match="exists; remove it"):
        mark(manifest, out, Marking(), accuracies)
    with pytest.raises(ManifestError, match="relative to its folder"):
        mark(manifest, manifest.parent / "other/marked.jsonl", Marking(), accuracies)


def test_the_guard_drop_leaves_out_marked_questions(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join([line(0, blind_accuracy=0.9), line(1), line(2, blind_accuracy=0.5)]))
    found = load_prompts(path)
    assert without_marked(found, Blindness()) is found
    left = without_marked(found, Blindness(guard="drop", drop_above=0.75))
    assert [(prompt.id, prompt.index) for prompt in left.prompts] == [("1", 0), ("2", 1)]
    assert list(left.rejected) == [f"{path}:1"] and "0.9" in left.rejected[f"{path}:1"]
    path.write_text("\n".join([line(0, blind_accuracy=0.5, options=["3", "4"]), line(1, blind_accuracy=0.5)]))
    strict = Blindness(guard="drop", drop_over_chance=0.25)
    assert [prompt.id for prompt in without_marked(load_prompts(path), strict).prompts] == ["0", "1"]
    path.write_text(line(0, blind_accuracy=0.5, options=["3", "4", "5", "6"]) + "\n" + line(1, blind_accuracy=0.5))
    left = without_marked(load_prompts(path), strict)
    assert [prompt.id for prompt in left.prompts] == ["1"]
    assert "0.5 is at least 0.5" in left.rejected[f"{path}:1"]
    path.write_text(line(0, blind_accuracy=1.0))
    with pytest.raises(ManifestError, match="every question has a blind_accuracy"):
        without_marked(load_prompts(path), Blindness(guard="drop"))


def test_a_model_marks_the_questions_of_a_run(tmp_path):
    run = make_visual_run(tmp_path)
    settings = Marking(samples=2, max_new_tokens=2, batch=4, model=str(run / "annealing/model"))
    answer, sizes = load_answerer(settings, "cpu"), []

    def counted(prompts, seed):
        sizes.append([len(prompts), seed])
        return answer(prompts, seed)

    marked = run / "world/marked.jsonl"
    counts = mark(run / "world/train.jsonl", marked, settings, counted)
    assert counts.lines(0.75)[0] == "9 lines, 8 questions with media"
    assert sizes == [[3, 0], [4, 4], [1, 8]]
    assert [prompt.id for prompt in load_prompts(marked).prompts] == [f"train{i}" for i in range(9)]
    assert answer(load_prompts(marked).prompts[4:8], 4) == [
        json.loads(row)["blind_accuracy"] for row in marked.read_text().splitlines()[4:8]
    ]
