"""Stage 0 has native resolution; samples made smaller to fit are counted each step, logged, and summed."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stages import recipe as recipes
from stages.data.items import Cache, count_thinned
from stages.data.quarantine import Quarantine, WarningLog, kind_of_warning
from stages.distributed import engine as deep
from stages.distributed.parallel import ParallelDims, build_parallel_dims
from stages.multitask import Multitask
from stages.recipe import StageRecipe
from stages.report import findings
from stages.stage import open_mixture
from stages.trainer import Trainer
from stages.vision import Vision
from tests.distributed import run_distributed
from tests.stages import small

ALONE = ParallelDims(0, 1, 1, None)
RECIPES = Path(recipes.__file__).parent / "recipes"
IMAGE = {"min_tokens": 4, "max_tokens": 20_480}


@pytest.fixture(scope="module")
def stills(tmp_path_factory) -> Path:
    """Two photographs of 2016 × 1512 pixels and two of 280 × 280 with their captions: 3,888 and 100 tokens each."""
    folder, rows = tmp_path_factory.mktemp("stills"), []
    for i, (width, height) in enumerate([(2016, 1512), (2016, 1512), (280, 280), (280, 280)]):
        pixels = np.random.default_rng(i).integers(0, 255, (height // 28, width // 28, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((width, height)).save(folder / f"{i}.png")
        asked = [{"type": "image", "image": f"{i}.png"}, {"type": "text", "text": "what"}]
        rows.append({"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": f"red {i}"}]})
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "train.jsonl"


def tokens(sample: Any) -> list[int]:
    return (sample.image_grid_thw.prod(1) // 4).tolist()


def test_stage_0_of_the_8b_recipe_keeps_stills_at_their_native_size(stills):
    recipe = recipes.load(RECIPES / "keye_8b.toml")
    source = recipes.SourceRecipe(str(stills), "image", stages=("vision",))
    recipe = dataclasses.replace(recipe, data=recipes.DataRecipe((source,)))
    made = small.processor()
    made.image = dict(recipe.processor.image)
    mixture = open_mixture("vision", recipe, made, ALONE, Cache(0), Quarantine(), "")
    (opened,) = mixture.sources.values()
    items = [opened.item(i) for i in range(4)]
    assert [tokens(item.sample) for item in items] == [[3888], [3888], [100], [100]]
    assert count_thinned(items) == {"thinned": 0, "thinned_tokens": 0, "warned": 0}


def test_still_larger_than_the_context_is_made_smaller_counted_and_not_quarantined(stills):
    """As in the comment on `processor.image` in keye_8b.toml, at a context of 1,024."""
    made, quarantine = small.processor(), Quarantine()
    made.image = IMAGE
    opened = small.source(stills, "image", made, quarantine, limit=1024)
    items = [opened.item(i) for i in range(4)]
    sizes = [tokens(item.sample)[0] for item in items]
    assert sizes[2:] == [100, 100] and all(900 < size <= 1024 - 20 for size in sizes[:2]) and not len(quarantine)
    given = sum(3888 - size for size in sizes[:2])
    assert count_thinned(items) == {"thinned": 2, "thinned_tokens": given, "warned": 2}


def train(stills: Path, folder: Path, stage: str) -> None:
    deep.start(threads=1)
    made, grid = small.processor(), build_parallel_dims(1)
    made.image = IMAGE
    source = recipes.SourceRecipe(str(stills), "image", stages=(stage,))
    common = {"steps": 2, "learning_rate": 1e-4, "mixture": {"image": 1.0}}
    settings = {
        "multitask": StageRecipe(context=1024, global_batch_size=2, **common),
        "vision": recipes.VisionRecipe(pairs=2, text_layers=1, **common),
    }[stage]
    whole = recipes.Recipe("test", recipes.DataRecipe((source,)), **{stage: settings})
    mixture = open_mixture(stage, whole, made, grid, Cache(1 << 28), Quarantine(), "")
    kind = {"multitask": Multitask, "vision": Vision}[stage](settings, made)
    module = kind.prepare(small.model(made)).train()
    model = small.model(made)
    loader = kind.loader(mixture, grid, model, 1)
    batches = settings.global_batch_size // grid.data_size if stage == "multitask" else 1
    Trainer(kind, module, loader, grid, settings, folder / stage, batches, "fp32").run()


def both(stills: Path, folder: Path) -> None:
    train(stills, folder, "multitask")
    train(stills, folder, "vision")


@pytest.fixture(scope="module")
def trained(stills, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    run_distributed(both, 2, 300, stills, folder)
    return folder


def rows(metrics: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in metrics.read_text().splitlines()]


def test_metrics_count_what_every_step_thinned_over_all_ranks(trained):
    for row in rows(trained / "multitask" / "metrics.jsonl"):
        # A still that was made smaller fills a pack with its text; the small ones have 100 tokens each.
        assert row["thinned"] == row["warned"] > 0
        assert 2880 * row["thinned"] < row["thinned_tokens"] < 2980 * row["thinned"]
    for row in rows(trained / "vision" / "metrics.jsonl"):
        assert row["thinned"] == row["thinned_tokens"] == row["warned"] == 0


def test_the_sum_of_a_stage_is_in_its_last_message_and_in_the_report(trained):
    metrics = trained / "multitask" / "metrics.jsonl"
    count, given = (sum(row[name] for row in rows(metrics)) for name in ("thinned", "thinned_tokens"))
    message = findings.thinned(metrics)
    assert message.startswith(f"{count:,} samples were made smaller to fit the context and lost {given:,} visual")
    assert findings.thinned(trained / "vision" / "metrics.jsonl") == ""


def test_first_warning_of_each_kind_is_logged(caplog):
    log = WarningLog()
    with caplog.at_level(logging.WARNING, "stages"):
        log.add("a.jsonl", 3, ["image 1 is made smaller, from 3888 to 972 tokens"])
        log.add("a.jsonl", 9, ["image 2 is made smaller, from 900 to 400 tokens", "clips/b.mp4 stops after 3.5 s"])
        log.add("a.jsonl", 11, ["c.webm stops after 1 s"])
    assert [record.getMessage()[:20] for record in caplog.records] == ["a.jsonl line 3: imag", "a.jsonl line 9: clip"]


def test_a_kind_of_warning_has_neither_paths_nor_numbers():
    assert kind_of_warning("12 of 1,200 frames of dir/a b.mp4 are used: max_tokens=32 holds no more") == (
        "… of … frames of … … are used: max_tokens=… holds no more"
    )
