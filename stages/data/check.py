"""Check the data of a recipe before training: rows, bad samples, lengths, and the number of epochs.

Every source is opened as in the stage, and some of its samples are encoded in the order of training.
"""

import dataclasses
import tempfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from keye.processor.processor import KeyeProcessor
from keye.processor.tokenizer import load_tokenizer, train_tokenizer
from keye.visualize.figures import save_figure
from stages.data.items import Cache, Item
from stages.data.loader import encoding_threads
from stages.data.quarantine import Quarantine
from stages.data.sources.decontaminate import open_decontamination, sample_hashes
from stages.data.sources.formats import BAD, Table
from stages.data.sources.source import Source, source_name
from stages.data.sources.streams import StreamLanes
from stages.recipe import DataRecipe, Recipe, SourceRecipe, StageRecipe, VisionRecipe
from stages.recipe_checks import KINDS
from stages.stage import choose_sources


@dataclass
class SourceReport:
    """The result of checking a source.

    share: of the stage's tokens. rows: of the wanted kind; None for a stream. unreadable: rows of the data set in no
    known form. good: checked rows that can be used. split: texts among them that are longer than the context; each of
    their parts is a sample. tokens, visual: of each sample. thinned: samples that were made smaller to fit. seconds: of
    one thread per sample. pictures: of all samples. twins: pictures that another sample has, too. bad: file, line and
    reason of each. epochs: of the stage over the source; None for a stream.
    """

    name: str
    kind: str
    share: float
    rows: int | None
    unreadable: int = 0
    good: int = 0
    split: int = 0
    tokens: list[int] = field(default_factory=list)
    visual: list[int] = field(default_factory=list)
    thinned: int = 0
    seconds: float = 0.0
    pictures: int = 0
    twins: int = 0
    bad: list[dict[str, Any]] = field(default_factory=list)
    epochs: float | None = None

    @property
    def checked(self) -> int:
        return self.good + len(self.bad)


def one_manifest(path: str, tokenizer: str, context: int, evaluations: tuple[str, ...], bits: int) -> Recipe:
    """A recipe of one stage that reads all kinds of one manifest.

    Args:
        path: the manifest.
        tokenizer: path or name; "" trains a small one.
        context: tokens of a sample at most.
        evaluations: manifests of evaluations.
        bits: by which perceptual hashes may differ.

    Raises:
        ManifestError: the manifest cannot be opened.
    """
    kinds = Table(SourceRecipe(path, "text"), path).scan()[0]
    sources = tuple(SourceRecipe(path, kind) for place, kind in enumerate(KINDS) if (kinds == place).any())
    sources = sources or (SourceRecipe(path, "text"),)
    data = DataRecipe(sources, decontaminate_against=evaluations, decontaminate_bits=bits)
    recipe = Recipe(Path(path).stem, data, multitask=StageRecipe(steps=1, learning_rate=1e-4, context=context))
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, tokenizer=tokenizer))


def make_processor(recipe: Recipe, stage: StageRecipe, run: Path) -> KeyeProcessor:
    """The processor of a stage, with the tokenizer of the run if it exists, else the one that the run would make."""
    named = str(run / "tokenizer") if (run / "tokenizer").exists() else recipe.model.tokenizer or recipe.model.path
    if named:
        tokenizer = load_tokenizer(named)
    else:
        from keye.world import texts

        tokenizer = train_tokenizer(texts(recipe.seed), recipe.model.vocab_size)
    encoder = {**recipe.processor.encoder, **stage.encoder}
    return KeyeProcessor(tokenizer, encoder=encoder, image=recipe.processor.image)


def check_data(
    recipe: Recipe, stage: str, run: Path, samples: int, progress: Callable[[str, int, int], None]
) -> list[SourceReport]:
    """A report on each source of a stage.

    Args:
        recipe: the recipe.
        stage: a phase of its chain.
        run: replaces `{run}` in paths.
        samples: to check of each source, at most.
        progress: called with the source, the samples done and their number.

    Raises:
        ManifestError: a source cannot be opened.
    """
    settings = recipe.chain[stage]
    processor = make_processor(recipe, settings, run)
    guard = open_decontamination(recipe.data.decontaminate_against, recipe.data.decontaminate_bits, processor, str(run))
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (source, share) in enumerate(choose_sources(stage, recipe)):
            quarantine = Quarantine(Path(folder) / f"{number}.jsonl")
            opened = Source(
                source, processor, recipe.seed, Cache(0), quarantine,
                limit=settings.limit, run=str(run), report=False, guard=guard,
            )  # fmt: skip
            found.append(_check(opened, share, samples, encoding_threads(recipe.data.workers), progress))
            # The stage reads tokens: a source with few tokens for its share is read several times.
            if found[-1].rows is not None and found[-1].tokens:
                vision = isinstance(settings, VisionRecipe)
                per_step = settings.pairs if vision else settings.global_batch_size * settings.context
                each = 1.0 if vision else sum(found[-1].tokens) / found[-1].good
                found[-1].epochs = settings.steps * per_step * share / (each * found[-1].rows)
    return found


def _check(
    source: Source, share: float, samples: int, workers: int, progress: Callable[[str, int, int], None]
) -> SourceReport:
    name = source_name(source.recipe)
    found = SourceReport(name, source.recipe.kind, share, None)
    if not isinstance(source.rows, StreamLanes):
        found.rows = len(source.rows.indices)
        found.unreadable = int((source.rows.table.scan()[0] == BAD).sum())
        samples = min(samples, found.rows)
    hashes: list[np.ndarray] = []

    def timed(index: int) -> tuple[list[Item], float]:
        started = perf_counter()
        return source.items(index), perf_counter() - started

    with ThreadPoolExecutor(workers) as threads:
        indices = [source.draw() for _ in range(samples)]
        for done, (items, seconds) in enumerate(threads.map(timed, indices), start=1):
            for item in items:
                _add(found, item, hashes)
            if items:
                found.good += 1
                found.split += len(items) > 1
                found.seconds += seconds / samples
            progress(name, done, samples)
    found.bad = source.quarantine.rows()
    found.pictures = sum(map(len, hashes))
    found.twins = _twins(hashes)
    return found


def _add(found: SourceReport, item: Item, hashes: list[np.ndarray]) -> None:
    found.tokens.append(item.tokens)
    found.visual.append(item.sample.visual_tokens)
    found.thinned += item.sample.thinned > 0
    hashes.append(np.unique(np.array([value for _, value in sample_hashes(item.sample)], dtype=np.uint64)))


def _twins(hashes: list[np.ndarray]) -> int:
    """Pictures whose exact hash another sample has, too."""
    counts = Counter(value for sample in hashes for value in sample.tolist())
    return sum(count for count in counts.values() if count > 1)


def lines(found: list[SourceReport], planned: bool) -> list[str]:
    """The reports as text; `planned`: with each source's share of the stage and its epochs."""
    text = []
    for one in found:
        tokens = np.array(one.tokens or [0])
        median, percentile = np.percentile(tokens, (50, 95))
        rows = "a stream" if one.rows is None else f"{one.rows:,} rows, {one.unreadable:,} in no known form"
        times = "" if one.epochs is None else f", read {one.epochs:,.1f} times"
        plan = f"{one.share:.0%} of the tokens{times}; " if planned else ""
        text += [
            f"{_short(one.name)}: {plan}{rows}",
            f"  {one.checked:,} checked: {one.good:,} good, {len(one.bad):,} bad; {one.thinned:,} made"
            f" smaller to fit, {one.split:,} split;"
            f" {one.twins:,} of {one.pictures:,} pictures in several samples; {one.seconds:.2f} s each",
            f"  tokens: median {median:,.0f}, 95th percentile {percentile:,.0f}, maximum {tokens.max():,};"
            f" {sum(one.visual) / max(tokens.sum(), 1):.0%} of them visual",
            *(f"  bad: {row['file']} line {row['line']}: {row['reason']}" for row in one.bad[:3]),
        ]
    return text


def _short(name: str) -> str:
    path, _, part = name.partition("#")
    return f"{Path(path).name} · {part}"


def picture(found: list[SourceReport], context: int | None, path: str | Path) -> None:
    """Write a PNG with the tokens of each source's samples and the shares of good and bad samples.

    context: of the stage; None without a limit.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [one for one in found if one.checked]
    names = [_short(one.name) for one in shown]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 1.2 + 0.7 * max(len(shown), 3)), width_ratios=(3, 2))
    drawn = [np.log10(np.array(one.tokens or [1])) for one in shown]
    box = {"color": "#4878a8"}
    left.boxplot(drawn, orientation="horizontal", whis=(0, 100), widths=0.5, boxprops=box, whiskerprops=box,
                 capprops=box, medianprops={"color": "#b8403c"})  # fmt: skip
    if context is not None:
        left.axvline(np.log10(context), color="0.4", linestyle="--")
        left.set_title(f"dashed: the context of {context:,} tokens", loc="left", fontsize=10, color="0.4")
    most = max(d.max() for d in drawn) if context is None else np.log10(context)
    low, high = int(min(d.min() for d in drawn)), int(np.ceil(most))
    left.set_xticks(range(low, high + 1), [f"{10**power:,}" for power in range(low, high + 1)])
    left.set_yticks(range(1, len(shown) + 1), names)
    left.invert_yaxis()
    left.set_xlabel("tokens of a sample: minimum, quartiles, median, maximum")
    start = np.zeros(len(shown))
    parts = {
        "unchanged": [one.good - one.thinned for one in shown],
        "made smaller to fit": [one.thinned for one in shown],
        "bad": [len(one.bad) for one in shown],
    }
    totals = np.array([one.checked for one in shown])
    for (label, counts), colour in zip(parts.items(), ("#4878a8", "#d8a03c", "#b8403c"), strict=True):
        shares = 100 * np.array(counts) / totals
        right.barh(range(1, len(shown) + 1), shares, left=start, label=label, color=colour)
        start += shares
    right.invert_yaxis()
    right.set_yticks([])
    right.set_xlabel("% of the checked samples")
    right.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    save_figure(figure, path, dpi=130)
    plt.close(figure)
