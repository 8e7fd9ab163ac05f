"""A stage: the module that DeepSpeed trains, the batches it trains on, and the loss of one of them."""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from keye.errors import RecipeError
from keye.model.keye import KeyeForConditionalGeneration
from keye.processor.processor import KeyeProcessor, Sample
from keye.processor.stream import IMAGE_PAD, VIDEO_PAD
from keye.slowfast.pixels import join
from stages.data.collate import pack
from stages.data.items import PIXELS, Cache, Item, count_thinned
from stages.data.loader import BatchStream, Loader
from stages.data.packing.balance import Cost, assign_rounds
from stages.data.packing.mixture import Mixture
from stages.data.packing.packer import BalancedPacker
from stages.data.packing.planner import Planner
from stages.data.quarantine import Quarantine
from stages.data.sources.decontaminate import open_decontamination
from stages.data.sources.source import Source
from stages.distributed.parallel import ParallelDims, shard
from stages.distributed.weights import MODULES
from stages.recipe import Recipe, SourceRecipe, StageRecipe, stage_of


class Stage(Protocol):
    """One stage of pre-training.

    parts: parts of the model that it uses; the others are not loaded.
    """

    name: str
    parts: tuple[str, ...]

    def prepare(self, model: KeyeForConditionalGeneration) -> nn.Module:
        """Freeze, change what the stage changes, and return the module to train."""

    def loader(self, mixture: Mixture, grid: ParallelDims, model: KeyeForConditionalGeneration, workers: int) -> Loader:
        """This rank's batches, one for each call of `loss`; collective.

        Args:
            model: after `prepare`. workers: threads that decode and encode.
        """

    def weight(self, batch: dict[str, Any], grid: ParallelDims) -> float:
        """This rank's part of what the summed loss of a step is divided by."""

    def begin(self, module: nn.Module, batches: list[dict[str, Any]], grid: ParallelDims) -> None:
        """Called with all batches of a step, before the first `loss`; collective."""

    def loss(self, module: nn.Module, batch: dict[str, Any], grid: ParallelDims) -> Tensor:
        """This rank's part of the batch's summed loss."""


class LanguageStage:
    """Next-token training on packs; stages 1 to 3 differ only in `prepare`."""

    name: str
    parts = MODULES

    def __init__(self, recipe: StageRecipe, processor: KeyeProcessor) -> None:
        self.recipe, self.processor = recipe, processor

    def prepare(self, model: KeyeForConditionalGeneration) -> nn.Module:
        """Everything trains."""
        return model.requires_grad_(True)

    def loader(self, mixture: Mixture, grid: ParallelDims, model: KeyeForConditionalGeneration, workers: int) -> Loader:
        def assemble(items: list[Item]) -> dict[str, Any]:
            row = pack([item.sample for item in items], grid.sequence, self.processor.tokenizer.pad_token_id)
            if grid.sequence > 1:
                own = [row.pop(name) for name in PIXELS if name in row]
                row |= {"pixel_values_mine": join(own)} if own else {}
            return {**row, "kinds": count_kinds(items), "thinned": count_thinned(items)}

        trains = [any(p.requires_grad for p in part.parameters()) for part in (model.visual, model.language_model)]
        cost = Cost(model.config, *trains)
        stage = self.recipe
        packer = BalancedPacker(stage.context, stage.global_batch_size, cost.per_token, stage.balanced_packs)
        planner = Planner(mixture, packer)
        # A step takes all of its batches first, to count their labels; they are made while the step before trains.
        ahead = max(2, stage.global_batch_size // grid.data_size)
        return Loader(BatchStream(planner, cost, assign_rounds, assemble, grid, workers), grid, ahead)

    def weight(self, batch: dict[str, Any], grid: ParallelDims) -> float:
        # One rank of a sequence group counts the labels of the complete pack.
        return float((batch["shift_labels"] != -100).sum()) if grid.sequence_rank == 0 else 0.0

    def begin(self, module: nn.Module, batches: list[dict[str, Any]], grid: ParallelDims) -> None:
        """Nothing: packs do not depend on each other."""

    def loss(self, module: nn.Module, batch: dict[str, Any], grid: ParallelDims) -> Tensor:
        row = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
        attention = getattr(module, "module", module).config.attention
        inputs = shard(row, grid, self.processor.token_id(IMAGE_PAD), self.processor.token_id(VIDEO_PAD), attention)
        return module(**inputs, num_items_in_batch=1.0).loss


def count_kinds(items: list[Item]) -> dict[str, int]:
    """Kind → tokens."""
    counts: dict[str, int] = {}
    for item in items:
        counts[item.kind] = counts.get(item.kind, 0) + item.tokens
    return counts


def visual_samples(samples: list[Sample]) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels `[N, 3, 14, 14]` and grids `[F, 3]` of all samples, and each frame's (or still's) sample `[F]`."""
    pixels, grids, owners = [], [], []
    for i, s in enumerate(samples):
        for values, grid in ((s.pixel_values, s.image_grid_thw), (s.pixel_values_videos, s.video_grid_thw)):
            if values is not None:
                pixels.append(values)
                grids.append(grid)
                owners.append(torch.full((len(grid),), i))
    return join(pixels), torch.cat(grids), torch.cat(owners)


def open_mixture(
    name: str, recipe: Recipe, processor: KeyeProcessor, grid: ParallelDims, cache: Cache, quarantine: Quarantine,
    run: str, heldout: bool = False,
) -> Mixture:  # fmt: skip
    """The stage's sources with their shares of the tokens, the same on every rank.

    Args:
        heldout: the sources that are held out, instead of those that are trained on.
    """
    stage = recipe.chain[name]
    guard = open_decontamination(recipe.data.decontaminate_against, recipe.data.decontaminate_bits, processor, run)
    fraction = recipe.data.heldout_fraction
    sources = []
    for source, share in choose_sources(name, recipe, heldout):
        made = Source(
            source, processor, recipe.seed, cache, quarantine,
            limit=stage.limit, run=run, report=grid.rank == 0, guard=guard, part=(fraction, heldout),
            max_bad_fraction=recipe.data.max_bad_fraction,
        )  # fmt: skip
        sources.append((made, share))
    return Mixture(sources, {} if heldout else {made.name: made.recipe.first_tokens for made, _ in sources})


def choose_sources(name: str, recipe: Recipe, heldout: bool = False) -> list[tuple[SourceRecipe, float]]:
    """The sources that a stage, or a phase of it, reads, each with its share of the tokens.

    Args:
        heldout: the sources of its held-out loss; kinds of the mixture that they do not have are left out of it.

    Raises:
        RecipeError: there is none, or none of a kind that the stage's mixture names.
    """
    stage, sources = recipe.chain[name], (heldout and recipe.data.heldout) or recipe.data.sources
    chosen = [s for s in sources if stage_of(name) in s.stages or (not s.stages and name != "vision")]
    chosen = [s for s in chosen if not stage.mixture or stage.mixture.get(s.kind, 0) > 0]
    mixture = stage.mixture
    if heldout:
        held = {s.kind for s in chosen}
        total = sum(share for kind, share in mixture.items() if kind in held)
        mixture = {kind: share / total for kind, share in mixture.items() if kind in held}
    return _shares(name, mixture, chosen, "data.heldout" if heldout else "data.sources")


def _shares(
    name: str, mixture: dict[str, float], sources: list[SourceRecipe], key: str
) -> list[tuple[SourceRecipe, float]]:
    if not sources:
        raise RecipeError(f'{key}: no data source is for the stage {name}; add one with stages = ["{name}"]')
    parts = [(s.path, s.config, s.split, s.kind, frozenset(s.families), s.transforms) for s in sources]
    if len(set(parts)) < len(parts):
        raise RecipeError(f"the stage {name} reads the same part of a manifest twice; write it once with its weight")
    weights = {kind: sum(s.weight for s in sources if s.kind == kind) for kind in {s.kind for s in sources}}
    missing = [kind for kind, share in mixture.items() if share > 0 and kind not in weights]
    if missing:
        raise RecipeError(f"{name}.mixture names {missing[0]}, but no data source of that kind is for the stage")
    mixture = mixture or {kind: weight / sum(weights.values()) for kind, weight in weights.items()}
    return [(s, mixture[s.kind] * s.weight / weights[s.kind]) for s in sources]
