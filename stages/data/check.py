"""A look over a recipe's data before anything trains on it: what is there, what is bad, how long, how often read.

Every source is opened as the stage would open it, and some of its samples are encoded in the order of training.
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
from stages.data.items import Cache, Item, Quarantine
from stages.data.loader import encoding_threads
from stages.data.sources.decontaminate import open_decontamination, sample_hashes
from stages.data.sources.formats import BAD, Table
from stages.data.sources.source import Source, source_name
from stages.data.sources.streams import StreamLanes
from stages.recipe import DataRecipe, Recipe, SourceRecipe, StageRecipe, VisionRecipe
from stages.recipe_checks import KINDS
from stages.stage import choose_sources


@dataclass
class Found:
    """What a source has.

    share: of the stage's tokens. rows: wanted ones, None for a stream. unreadable: rows of its data set that are in no
    form. good: rows looked at that can be used. split: texts among them that are longer than the context, of which each
    part is a sample. tokens, visual: of each sample. thinned: how many of them were made smaller to fit.
    seconds: of one thread for each sample. twins: pictures that another sample shows too. bad: file, line, reason.
    epochs: how many times the stage goes through it, None for a stream.
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
    def looked_at(self) -> int:
        return self.good + len(self.bad)


def one_manifest(path: str, tokenizer: str, context: int, evaluations: tuple[str, ...], bits: int) -> Recipe:
    """A recipe of one stage that reads all kinds of one manifest.

    Raises:
        ManifestError: it cannot be opened.
    """
    kinds = Table(SourceRecipe(path, "text"), path).scan()[0]
    sources = tuple(SourceRecipe(path, kind) for place, kind in enumerate(KINDS) if (kinds == place).any())
    sources = sources or (SourceRecipe(path, "text"),)
    data = DataRecipe(sources, decontaminate_against=evaluations, decontaminate_bits=bits)
    recipe = Recipe(Path(path).stem, data, multitask=StageRecipe(steps=1, learning_rate=1e-4, context=context))
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, tokenizer=tokenizer))


def make_processor(recipe: Recipe, told: StageRecipe, run: Path) -> KeyeProcessor:
    """The processor of a stage; its tokenizer is the run's where there is one, else as the run would make it."""
    named = str(run / "tokenizer") if (run / "tokenizer").exists() else recipe.model.tokenizer or recipe.model.path
    if named:
        tokenizer = load_tokenizer(named)
    else:
        from keye.world import texts

        tokenizer = train_tokenizer(texts(recipe.seed), recipe.model.vocab_size)
    settings = {**recipe.processor.encoder, **told.encoder}
    return KeyeProcessor(tokenizer, encoder=settings, image=recipe.processor.image)


def look_over(
    recipe: Recipe, stage: str, run: Path, samples: int, progress: Callable[[str, int, int], None]
) -> list[Found]:
    """What each source of a stage has.

    Args:
        stage: a phase of the recipe's chain. run: what `{run}` stands for. samples: looked at of each source, at most.
        progress: told the source, the samples done and their number.

    Raises:
        ManifestError: a source cannot be opened.
    """
    told = recipe.chain[stage]
    processor = make_processor(recipe, told, run)
    guard = open_decontamination(recipe.data.decontaminate_against, recipe.data.decontaminate_bits, processor, str(run))
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (source, share) in enumerate(choose_sources(stage, recipe)):
            quarantine = Quarantine(Path(folder) / f"{number}.jsonl")
            opened = Source(
                source, processor, recipe.seed, Cache(0), quarantine,
                limit=told.limit, run=str(run), report=False, guard=guard,
            )  # fmt: skip
            found.append(_look(opened, share, samples, encoding_threads(recipe.data.workers), progress))
            # The stage reads by tokens; a source that holds few of them for its share is read many times.
            if found[-1].rows is not None and found[-1].tokens:
                per_step = told.pairs if isinstance(told, VisionRecipe) else told.global_batch_size * told.context
                each = 1.0 if isinstance(told, VisionRecipe) else sum(found[-1].tokens) / found[-1].good
                found[-1].epochs = told.steps * per_step * share / (each * found[-1].rows)
    return found


def _look(source: Source, share: float, samples: int, workers: int, progress: Callable[[str, int, int], None]) -> Found:
    name = source_name(source.recipe)
    found = Found(name, source.recipe.kind, share, None)
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


def _add(found: Found, item: Item, hashes: list[np.ndarray]) -> None:
    found.tokens.append(item.tokens)
    found.visual.append(item.sample.visual_tokens)
    found.thinned += item.sample.thinned > 0
    hashes.append(np.unique(np.array([value for _, value in sample_hashes(item.sample)], dtype=np.uint64)))


def _twins(hashes: list[np.ndarray]) -> int:
    """Pictures whose very hash another sample has, too."""
    counts = Counter(value for sample in hashes for value in sample.tolist())
    return sum(count for count in counts.values() if count > 1)


def lines(found: list[Found], planned: bool) -> list[str]:
    """What was found in words; `planned`: with the stage's share of each source and how often it goes through it."""
    said = []
    for one in found:
        tokens = np.array(one.tokens or [0])
        median, most_have = np.percentile(tokens, (50, 95))
        rows = "a stream" if one.rows is None else f"{one.rows:,} rows, {one.unreadable:,} in no known form"
        times = "" if one.epochs is None else f", read {one.epochs:,.1f} times"
        plan = f"{one.share:.0%} of the tokens{times}; " if planned else ""
        said += [
            f"{_short(one.name)}: {plan}{rows}",
            f"  {one.looked_at:,} looked at: {one.good:,} good, {len(one.bad):,} bad; {one.thinned:,} made"
            f" smaller to fit, {one.split:,} split;"
            f" {one.twins:,} of {one.pictures:,} pictures shown by several; {one.seconds:.2f} s each",
            f"  tokens: half below {median:,.0f}, 95 % below {most_have:,.0f}, most {tokens.max():,};"
            f" {sum(one.visual) / max(tokens.sum(), 1):.0%} of them visual",
            *(f"  bad: {row['file']} line {row['line']}: {row['reason']}" for row in one.bad[:3]),
        ]
    return said


def _short(name: str) -> str:
    path, _, part = name.partition("#")
    return f"{Path(path).name} · {part}"


def picture(found: list[Found], context: int | None, path: str | Path) -> None:
    """Write a PNG: the tokens of each source's samples up to the context, and what became of those looked at.

    context: of the stage; None for one that has no limit.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [one for one in found if one.looked_at]
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
    left.set_xlabel("tokens of a sample: least, half of the samples, median, most")
    start = np.zeros(len(shown))
    parts = {
        "as it is": [one.good - one.thinned for one in shown],
        "made smaller to fit": [one.thinned for one in shown],
        "bad": [len(one.bad) for one in shown],
    }
    totals = np.array([one.looked_at for one in shown])
    for (label, counts), colour in zip(parts.items(), ("#4878a8", "#d8a03c", "#b8403c"), strict=True):
        shares = 100 * np.array(counts) / totals
        right.barh(range(1, len(shown) + 1), shares, left=start, label=label, color=colour)
        start += shares
    right.invert_yaxis()
    right.set_yticks([])
    right.set_xlabel("% of the samples looked at")
    right.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
