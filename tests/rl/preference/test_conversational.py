"""TRL's conversational preference form: written, read by `datasets`, TRL and this project, with the same pairs."""

import json
import math
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image

from keye import KeyeConfig, KeyeForConditionalGeneration, KeyeProcessor
from keye.errors import ManifestError, RecipeError
from keye.processor.tokenizer import train_tokenizer
from rl.commands.pairs import main
from rl.preference.answers import Answer, Answers
from rl.preference.pairs import load_pairs
from rl.preference.selecting import make_pairs

SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """A question about a still, one about two stills and one in words."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name in "abc":
        Image.new("RGB", (56, 56), (ord(name), 0, 0)).save(folder / f"{name}.png")
    still = {"type": "image", "image": "a.png", "max_tokens": 4}
    words = {"type": "text", "text": "Which colour?"}
    two = [
        {"type": "image", "image": "b.png"},
        words,
        {"type": "image_url", "image_url": {"url": str(folder / "c.png")}},
    ]
    chats = [[SYSTEM, {"role": "user", "content": [still, words]}], [{"role": "user", "content": two}]]
    chats.append(
        [{"role": "user", "content": [{"type": "text", "text": "Red or "}, {"type": "text", "text": "green?"}]}]
    )
    rows = [{"id": i, "family": "look", "answer": "red", "messages": chat} for i, chat in enumerate(chats)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "train.jsonl"


def answers(manifest: Path) -> list[Answers]:
    pair = [Answer("red", 1, True, 1.0, 1.0), Answer("green", 1, True, 0.0, 0.0)]
    return [Answers(f"{manifest}:{i}", pair) for i in (1, 2, 3)]


def test_both_forms_are_the_same_pairs_and_datasets_reads_them(manifest, tmp_path):
    ours, theirs = tmp_path / "pairs.jsonl", tmp_path / "out/dpo.jsonl"
    for path, form in ((ours, "messages"), (theirs, "trl")):
        assert make_pairs(manifest, answers(manifest), path, form=form) == {"questions": 3, "pairs": 3}
    rows = datasets.load_dataset("json", data_files=str(theirs), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows[0]["prompt"][1] == {
        "role": "user",
        "content": [{"type": "image"}, {"type": "text", "text": "Which colour?"}],
    }
    assert rows[2]["prompt"] == [{"role": "user", "content": "Red or green?"}] and not rows[2]["images"]
    assert (
        rows[0]["chosen"] == [{"role": "assistant", "content": "red"}] and rows[0]["rejected"][0]["content"] == "green"
    )
    stills = rows.cast_column("images", datasets.List(datasets.Image()))
    assert [still.getpixel((0, 0))[0] for still in stills[1]["images"]] == [ord("b"), ord("c")]
    for mine, other in zip(load_pairs(ours).pairs, load_pairs(theirs).pairs, strict=True):
        assert (mine.chosen, mine.rejected, mine.prompt.family) == (other.chosen, other.rejected, other.prompt.family)
        assert seen(mine.prompt.messages, tmp_path) == seen(other.prompt.messages, theirs.parent)


def seen(messages: list[dict], base: Path) -> list:
    """Role, joined text and the files of each message."""
    found = []
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        files = [part.get("image") or part["image_url"]["url"] for part in parts if "text" not in part]
        text = "".join(part.get("text", "*") for part in parts)
        found.append((message["role"], text, [(base / file).resolve() for file in files]))
    return found


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Why?", "chosen": "a", "rejected": "b"},
        {"prompt": "Why?", "chosen": [{"role": "assistant", "content": "a"}],
         "rejected": {"role": "assistant", "content": "b"}},
        {"prompt": "Why?", "chosen": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "a"}],
         "rejected": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "b"}]},
    ],
)  # fmt: skip
def test_other_forms_of_trl_are_read(tmp_path, row):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(row) + "\n")
    [pair] = load_pairs(path).pairs
    assert (pair.prompt.messages, pair.chosen, pair.rejected) == ([{"role": "user", "content": "Why?"}], "a", "b")


def test_an_image_column_without_placeholders_comes_first(tmp_path):
    path = tmp_path / "pairs.jsonl"
    row = {"prompt": [SYSTEM, {"role": "user", "content": "Why?"}], "images": ["a.png"], "chosen": "a", "rejected": "b"}
    path.write_text(json.dumps(row) + "\n")
    [pair] = load_pairs(path).pairs
    assert pair.prompt.messages[1]["content"] == [{"type": "image", "image": "a.png"}, {"type": "text", "text": "Why?"}]


@pytest.mark.parametrize("chosen", [[], [{"role": "assistant", "content": "a"}] * 2, 5])
def test_answers_of_several_turns_are_named_with_their_line(tmp_path, chosen):
    path = tmp_path / "pairs.jsonl"
    good = {"prompt": "Why?", "chosen": "a", "rejected": "b"}
    path.write_text("".join(json.dumps(row) + "\n" for row in (good, good | {"chosen": chosen})))
    assert f"{path}:2: chosen is" in load_pairs(path).rejected[f"{path}:2"]


def test_videos_are_refused_before_anything_is_sampled(manifest, tmp_path, monkeypatch):
    video = {"type": "video", "video": "a.mp4"}
    row = {"family": "watch", "answer": "x", "messages": [{"role": "user", "content": [video]}]}
    with manifest.open("a") as file:
        file.write(json.dumps(row) + "\n")
    monkeypatch.setattr("stages.distributed.engine.start", lambda: None)
    monkeypatch.setattr("rl.run.agree.agree", lambda action: action())
    words = [
        "keye posttrain pairs",
        str(tmp_path),
        str(manifest),
        "--out",
        str(tmp_path / "p.jsonl"),
        "--format",
        "trl",
    ]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(RecipeError, match=r"train.jsonl:4 has a video, .*--format messages, or --families look"):
        main()
    answered = [*answers(manifest), Answers(f"{manifest}:4", answers(manifest)[0].answers)]
    with pytest.raises(ManifestError, match=r"train.jsonl:4 has a medium"):
        make_pairs(manifest, answered, tmp_path / "p.jsonl", form="trl")
    assert not (tmp_path / "p.jsonl").exists()


@pytest.mark.slow
def test_the_dpo_trainer_of_trl_trains_on_the_answers_of_the_pairs(manifest, tmp_path):
    trl = pytest.importorskip("trl", reason="TRL is not installed: pip install '.[trl]'")
    model, out = tmp_path / "model", tmp_path / "dpo.jsonl"
    processor = KeyeProcessor(
        train_tokenizer(["which colour red green user"] * 5, 600), image={"min_tokens": 4, "max_tokens": 16}
    )
    torch.manual_seed(0)
    KeyeForConditionalGeneration(processor.configure(KeyeConfig.preset("tiny", vocab_size=640))).save_pretrained(model)
    processor.save_pretrained(model)
    lines = manifest.read_text().splitlines(keepends=True)
    manifest.write_text("".join(lines[:2]))  # TRL has no data set of questions with and without images
    make_pairs(manifest, answers(manifest)[:2], out, form="trl")
    rows = datasets.load_dataset("json", data_files=str(out), split="train", cache_dir=str(tmp_path / "cache"))
    rows = rows.cast_column("images", datasets.List(datasets.Image()))
    options = {"max_steps": 1, "per_device_train_batch_size": 2, "report_to": [], "save_strategy": "no", "bf16": False}
    config = trl.DPOConfig(str(tmp_path / "trl"), max_length=None, logging_steps=1, use_cpu=True, **options)
    trainer = trl.DPOTrainer(str(model), args=config, train_dataset=rows, processing_class=processor)
    batch = next(iter(trainer.get_train_dataloader()))
    trained = [
        ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True)
    ]
    texts = [processor.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in trained]
    assert texts == ["red", "red", "green", "green"]
    trainer.train()
    # Before the first step policy and reference are one model: the loss is -log sigmoid(0).
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=2e-4)
