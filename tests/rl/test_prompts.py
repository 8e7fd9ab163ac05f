"""Questions of a manifest: wrong lines are named, equal ids are distinguished, a saved place is checked."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from keye.errors import CheckpointError, ManifestError
from keye.slowfast.pixels import normalised
from rl.questions.prompts import PromptStream, load_prompts

QUESTION = {"id": "a", "family": "count", "answer": "3", "messages": [{"role": "user", "content": "how many?"}]}


def write(path: Path, *lines: dict) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_two_lines_with_one_id_are_two_samples(tmp_path, processor):
    other = QUESTION | {"messages": [{"role": "user", "content": "which colour came first, red or green?"}]}
    prompts = load_prompts(write(tmp_path / "train.jsonl", QUESTION, other)).prompts
    for prompt, sample in PromptStream(prompts, processor, seed=0).take(4):
        alone = processor.sample(prompt.messages, add_generation_prompt=True)
        assert torch.equal(sample.input_ids, alone.input_ids), prompt.messages


@pytest.mark.parametrize("key", ["id", "answer", "options"])
def test_a_line_with_half_a_character_is_left_out(tmp_path, key):
    path = write(tmp_path / "train.jsonl", QUESTION)
    broken = {"id": r'"a\ud83d"', "answer": r'"\ud83d"', "options": r'["\udc00\ud83d"]'}[key]
    line = json.dumps(QUESTION | {"id": "b", key: None}).replace("null", broken)
    path.write_text(
        path.read_text() + line + "\n" + line.replace(broken, broken.replace(r"\ud83d", r"\ud83d\ude00")) + "\n"
    )
    found = load_prompts(path)
    assert "lone surrogate" in found.rejected[f"{path}:2"]
    assert [prompt.where.rpartition(":")[2] for prompt in found.prompts] == (["1"] if key == "options" else ["1", "3"])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("id", ["a"]),
        ("id", {"a": 1}),
        ("id", ""),
        ("family", ["count"]),
        ("family", {"count": 1}),
        ("answer", 3),
        ("answer", ["3"]),
        ("answer", " "),
        ("tolerance", "0.5"),
        ("tolerance", [1]),
        ("tolerance", True),
        ("tolerance", -1),
        ("tolerance", float("nan")),
        ("options", 5),
        ("options", "red"),
        ("options", True),
        ("options", {"A": "red"}),
        ("options", ["red", 5]),
        ("options", ["red", None]),
        ("messages", [{"role": "user", "content": 5}]),
        ("messages", [{"role": ["user"], "content": "how many?"}]),
        ("messages", [{"role": "user", "content": [{"type": "video"}]}]),
        ("messages", [{"role": "user", "content": ["how many?"]}]),
        ("messages", [{"role": "assistant", "content": "3"}]),
    ],
)
def test_a_value_of_a_wrong_type_is_named_with_file_line_and_key(tmp_path, key, value):
    path = write(tmp_path / "train.jsonl", QUESTION, QUESTION | {key: value})
    for families in ((), ("count",)):
        found = load_prompts(path, families)
        assert [prompt.where for prompt in found.prompts] == [f"{path}:1"]
        assert list(found.rejected) == [f"{path}:2"]
        assert f"{path}:2" in found.rejected[f"{path}:2"] and key in found.rejected[f"{path}:2"]


def test_a_question_without_an_answer_is_counted_and_named_with_its_line(tmp_path):
    bare = {key: value for key, value in QUESTION.items() if key != "answer"}
    path = write(tmp_path / "train.jsonl", QUESTION, bare, QUESTION | {"id": "b"}, bare | {"family": "other"})
    found = load_prompts(path)
    assert len(found.prompts) == 2 and list(found.rejected) == [f"{path}:2", f"{path}:4"]
    [remark] = found.remarks
    assert remark.startswith("2 lines") and f"{path}:2 has neither answer nor constraints" in remark
    assert list(load_prompts(path, ["count"]).rejected) == [f"{path}:2"]  # lines of other families are not of interest


@pytest.mark.parametrize(("number", "quoted"), [(5, '"answer": "5"'), (2.5, '"answer": "2.5"')])
def test_an_answer_that_is_a_number_is_refused_with_the_text_to_write(tmp_path, number, quoted):
    path = write(tmp_path / "train.jsonl", QUESTION, QUESTION | {"answer": number})
    reason = load_prompts(path).rejected[f"{path}:2"]
    assert quoted in reason
    assert load_prompts(write(path, QUESTION | json.loads(f"{{{quoted}}}"))).prompts[0].answer == str(number)


def test_an_unknown_family_names_the_families_that_there_are(tmp_path):
    path = write(tmp_path / "train.jsonl", QUESTION, QUESTION | {"family": "read"}, QUESTION | {"family": None})
    with pytest.raises(ManifestError, match=r"families cuont with an answer: its families are count, read; choose"):
        load_prompts(path, ["cuont"])
    found = load_prompts(path, ["count", "raed"])
    assert len(found.prompts) == 1 and found.absent == ("raed",)
    [remark] = found.remarks
    assert "raed" in remark and "count, read" in remark
    with pytest.raises(ManifestError, match='no line of it has a "family"'):
        load_prompts(write(path, QUESTION | {"family": None}), ["count"])


def test_lines_that_are_no_json_or_no_text_are_named_and_blank_ones_passed_over(tmp_path):
    line, path = json.dumps(QUESTION).encode(), tmp_path / "train.jsonl"
    huge = b'{"answer": ' + b"1" * 5000 + b"}"  # more digits than Python turns into a number
    path.write_bytes(b"\n".join([line, b"", line.replace(b"how", b"h\xffw"), huge, b"[" * 100_000, line + b"\r"]))
    found = load_prompts(path)
    assert [prompt.where for prompt in found.prompts] == [f"{path}:1", f"{path}:6"]
    assert list(found.rejected) == [f"{path}:{number}" for number in (3, 4, 5)]
    assert "UTF-8" in found.rejected[f"{path}:3"]
    path.write_bytes(b"\n".join([huge] * 3))
    with pytest.raises(ManifestError, match=r"3 lines .*train\.jsonl:1"):
        load_prompts(path)


def test_absent_and_null_keys_take_their_defaults(tmp_path):
    bare = {key: QUESTION[key] for key in ("answer", "messages")}
    lines = [
        bare | {"family": None, "tolerance": None, "options": None},
        bare | {"id": 7, "options": []},
        bare | {"answer": None},
    ]
    path = write(tmp_path / "train.jsonl", *lines)
    found = load_prompts(path)
    assert list(found.rejected) == [f"{path}:3"] and "answer" in found.rejected[f"{path}:3"]
    assert [(p.id, p.family, p.tolerance, p.options) for p in found.prompts] == [
        ("train.jsonl:1", "", None, ()),
        ("7", "", None, ()),
    ]


def test_repeated_ids_are_refused_where_results_are_paired_by_them(tmp_path):
    path = write(tmp_path / "heldout.jsonl", QUESTION, QUESTION | {"id": "b"}, QUESTION)
    assert len(load_prompts(path).prompts) == 3
    with pytest.raises(ManifestError) as caught:
        load_prompts(path, unique=True)
    assert f"{path}:1" in str(caught.value) and f"{path}:3" in str(caught.value) and "'a'" in str(caught.value)


def test_a_saved_place_that_the_manifest_does_not_have_is_named(tmp_path, processor):
    lines = [QUESTION | {"id": str(i)} for i in range(5)]
    path = write(tmp_path / "train.jsonl", *lines)
    stream = PromptStream(load_prompts(path).prompts, processor, seed=0)
    stream.take(4)
    state = stream.state_dict()
    shorter = PromptStream(load_prompts(write(path, *lines[:3])).prompts, processor, seed=0)
    with pytest.raises(CheckpointError, match=r"5 questions.* 3"):
        shorter.load_state_dict(state)
    with pytest.raises(CheckpointError, match="position"):
        shorter.load_state_dict({"epoch": 0, "position": 4})


def test_encoded_prompts_are_kept_up_to_a_number_of_bytes(tmp_path, processor):
    lines = [QUESTION | {"id": str(i)} for i in range(8)]
    prompts = load_prompts(write(tmp_path / "train.jsonl", *lines)).prompts
    one = processor.sample(prompts[0].messages, add_generation_prompt=True)
    size = sum(x.numel() * x.element_size() for x in vars(one).values() if isinstance(x, torch.Tensor))
    stream = PromptStream(prompts, processor, seed=0, cache=3 * size + 1)
    stream.take(16)
    assert len(stream.cache.entries) == 3 and stream.cache.used == 3 * size


def test_kept_pixels_are_bytes_and_come_back_as_they_were(tmp_path, processor):
    picture = np.random.default_rng(0).integers(0, 255, (56, 84, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "picture.png")
    content = [{"type": "image", "image": "picture.png"}, {"type": "text", "text": "how many?"}]
    line = QUESTION | {"messages": [{"role": "user", "content": content}]}
    prompts = load_prompts(write(tmp_path / "train.jsonl", line)).prompts
    alone = processor.sample(prompts[0].messages, tmp_path, add_generation_prompt=True).pixel_values
    stream = PromptStream(prompts, processor, seed=0)
    (_, first), (_, second) = stream.take(2)
    torch.testing.assert_close(first.pixel_values, normalised(alone), rtol=0, atol=1e-6)
    assert torch.equal(first.pixel_values, second.pixel_values)
    [[kept, size]] = stream.cache.entries.values()
    assert kept[0].sample.pixel_values.dtype == torch.uint8 and size < alone.numel() * 2
