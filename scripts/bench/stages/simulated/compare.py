"""Compares simulated ranks: their collectives with one another's, their memory with `stages.cost.estimate`."""

import dataclasses
from dataclasses import dataclass

from keye.model.config import KeyeConfig
from scripts.bench.stages.simulated.rank import Simulated
from stages.cost.estimate import Assumptions, Kind, estimate, parameters_of
from stages.cost.footprint import Footprint, Plan, activations, footprint, reduced, tower_chunk
from stages.cost.gpus import gpu_named
from stages.distributed.collectives import difference
from stages.recipe import Recipe, StageRecipe, VisionRecipe, stage_of


@dataclass(frozen=True)
class Compared:
    """A phase. difference: where ranks differ, or None. counts: collectives by rank. parts: (simulated, estimated)."""

    name: str
    difference: str | None
    counts: list[int]
    largest: Simulated
    parts: dict[str, tuple[float, float]]
    planning: float

    @property
    def off(self) -> float:
        """Simulated peak against the estimated one."""
        simulated, estimated = self.parts["peak"]
        return simulated / estimated - 1


def collectives(found: list[Simulated], sequence: int) -> str | None:
    """Where ranks differ, in words: all that the ranks of a sequence group issue, and of all ranks what is over all."""
    found = sorted(found, key=lambda one: one.rank)
    world = max(call.ranks for one in found for call in one.calls)
    whole = [[call for call in one.calls if call.ranks == world] for one in found]
    said = difference(whole)
    if said is None and sequence > 1:
        for first in range(0, len(found), sequence):
            said = said or difference([one.calls for one in found[first : first + sequence]])
    return said


def memory(recipe: Recipe, name: str, config: KeyeConfig, one: Simulated, ranks: int) -> dict[str, tuple[float, float]]:
    """Part → bytes (simulated, estimated)."""
    has, estimated = one.memory, expected(recipe, name, config, one, ranks)
    frozen = stage_of(name) == "alignment"
    plan, counts = plan_of(recipe.chain[name], ranks), parameters_of(config)
    trained = counts["projector"] if frozen else has.weights / plan.element
    chunk = tower_chunk(config.vision_config, plan.element, one.share.patches, one.share.frame)
    if frozen:
        _, chunk, _ = activations(config, plan, dataclasses.replace(one.share, tokens=0, labels=0), frozen)
    parts = {
        "weights": (has.weights, estimated.weights),
        "gradients": (has.gradients, estimated.gradients),
        "buckets of gradients": (has.buckets, estimated.buckets + reduced(trained, plan)),
        "optimizer": (has.optimizer, estimated.optimizer),
        "activations kept": (has.kept, estimated.activations),
        "pixels": (has.pixels, estimated.pixels),
        "logits": (has.logits, estimated.logits),
        "vision, a chunk of frames": (has.vision, chunk),
        "at the loss": (has.at_loss, estimated.moments["at the loss"]),
        "in the backward pass": (has.in_backward, estimated.moments["in the backward pass"]),
        "in the optimizer's step": (has.in_step, estimated.moments["in the optimizer's step"]),
        "peak": (has.peak, estimated.peak),
    }
    return {part: pair for part, pair in parts.items() if any(pair)}


def plan_of(settings: StageRecipe, ranks: int) -> Plan:
    """How a stage trains on one of so many GPUs, in bf16."""
    several = (
        1 if isinstance(settings, VisionRecipe) else settings.global_batch_size * settings.sequence_parallel // ranks
    )
    return Plan(
        2, settings.zero, ranks, settings.checkpointing, settings.offload, settings.mlp_tiles, micro_batches=several
    )


def expected(recipe: Recipe, name: str, config: KeyeConfig, one: Simulated, ranks: int) -> Footprint:
    """The estimate for what this rank trained on."""
    settings = recipe.chain[name]
    if isinstance(settings, VisionRecipe):
        patches = one.share.patches * ranks * settings.micro_batches(ranks) / settings.pairs
        kinds = {"image": Kind(patches / 4, 1.0, patches, 0.0)}
        limits = {**recipe.processor.image, "max_tokens": one.share.frame // 4}
        processor = dataclasses.replace(recipe.processor, image=limits)
        alone = dataclasses.replace(recipe, processor=processor, alignment=None, multitask=None, annealing=None)
        return estimate(alone, gpu_named("h100"), ranks, Assumptions(kinds=kinds))[0].memory
    counts = parameters_of(config)
    total, frozen = sum(counts.values()), stage_of(name) == "alignment"
    trained = counts["projector"] if frozen else total
    return footprint(config, plan_of(settings, ranks), one.share, total, trained, frozen)
