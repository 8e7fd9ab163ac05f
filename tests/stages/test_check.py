"""The check of the data before training reports rows, bad samples and epochs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from keye.errors import ManifestError
from stages.data import check
from stages.recipe import DataRecipe, ProcessorRecipe, Recipe, SourceRecipe, StageRecipe
from tests.stages import small

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    """The small world, a duplicate still, a missing clip, a line that is no JSON."""
    path = small.world(tmp_path_factory.mktemp("world"))
    rows = small.lines(path)
    still = next(row for row in rows if row["family"] == "image_read")
    gone = [{"type": "video", "video": "gone.mp4"}, {"type": "text", "text": "what"}]
    chat = {"messages": [{"role": "user", "content": gone}, {"role": "assistant", "content": "red"}]}
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, still, chat]) + "{\n")
    small.processor().tokenizer.save_pretrained(path.with_name("tokenizer"))
    return path


def report_on(manifest: Path, context: int = 256) -> dict[str, check.SourceReport]:
    sources = tuple(SourceRecipe(str(manifest), kind) for kind in ("video", "image", "text"))
    settings = StageRecipe(steps=10, learning_rate=1e-3, context=context, global_batch_size=3)
    processor = ProcessorRecipe(encoder=small.ENCODER, image={"min_tokens": 1, "max_tokens": 4})
    recipe = Recipe("mine", DataRecipe(sources), processor=processor, multitask=settings)
    done: dict[str, list[int]] = {}

    def progress(name: str, at: int, of: int) -> None:
        done.setdefault(name, []).append(at)

    found = check.check_data(recipe, "multitask", manifest.parent, 100, progress)
    assert all(counted == list(range(1, len(counted) + 1)) for counted in done.values())
    return {one.kind: one for one in found}


@pytest.fixture(scope="module")
def found(manifest) -> dict[str, check.SourceReport]:
    return report_on(manifest)


def test_every_source_is_counted(found):
    assert {kind: (one.rows, len(one.tokens), len(one.bad)) for kind, one in found.items()} == {
        "video": (5, 4, 1), "image": (5, 5, 0), "text": (4, 4, 0)
    }  # fmt: skip
    assert all(one.unreadable == 1 for one in found.values())
    assert "gone.mp4" in found["video"].bad[0]["reason"] and found["video"].bad[0]["line"] == 14
    assert (found["image"].pictures, found["image"].twins) == (5, 2)
    assert sum(found["text"].visual) == 0 < sum(found["image"].visual) < sum(found["image"].tokens)
    # Ten steps of three packs of 256 tokens, a third of them text.
    text = found["text"]
    assert text.epochs == pytest.approx(10 * 3 * 256 / 3 / sum(text.tokens))


def test_clips_longer_than_the_context_are_counted_as_made_smaller(found, manifest):
    whole, tight = found["video"], report_on(manifest, context=60)["video"]
    assert max(whole.tokens) > 60 and whole.thinned == 0
    assert max(tight.tokens) <= 60 and tight.thinned == sum(count > 60 for count in whole.tokens)


def test_text_and_picture_show_the_report(found, tmp_path):
    found = list(found.values())
    message = "\n".join(check.lines(found, planned=True))
    assert "train.jsonl · video: 33% of the tokens, read" in message and "5 rows, 1 in no known form" in message
    assert "5 checked: 4 good, 1 bad" in message and "line 14: " in message
    check.picture(found, 256, tmp_path / "data.png")
    assert (tmp_path / "data.png").read_bytes().startswith(b"\x89PNG")


def test_script_checks_a_manifest_and_fails_with_too_many_bad_samples(manifest, tmp_path):
    command = [sys.executable, "scripts/data.py", str(manifest), "--json", str(tmp_path / "data.json")]
    command += ["--tokenizer", str(manifest.with_name("tokenizer")), "--most-bad=0.05"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "#video: more than 5% of the checked samples are bad" in done.stderr
    assert "the option --most-bad is now called --max-bad-fraction" in done.stderr
    assert [one["kind"] for one in json.loads((tmp_path / "data.json").read_text())] == ["video", "image", "text"]


def test_a_missing_manifest_is_named():
    with pytest.raises(ManifestError, match="gone.jsonl: no such manifest"):
        check.one_manifest("gone.jsonl", "", 8192, (), 6)
