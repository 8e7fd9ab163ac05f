"""How much memory of its host a node needs, by component, from the shapes alone; what is on the GPUs is not counted.

Weights are read as pages of their files, which the processes of a node share and which the system takes back when it
wants them: they are not counted. What is: the processes themselves, the samples that they hold, the inputs of layers
that wait in host memory, and what passes through host memory when a checkpoint or a model is written.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from stages.cost.footprint import CHANNELS, FP32, Plan, Share

POOLED = 5  # steps whose samples are held encoded: at most four in the planner's pool or on their way, one made up
TOKEN = 8 * (1 + 1 + 3)  # bytes of a token in a sample: id, label and three positions


@dataclass(frozen=True)
class HostFootprint:
    """Bytes of one node.

    processes: interpreters and libraries. cache: encoded samples that are kept (`data.cache_mb`). samples: those that
    wait to be trained on. offload: inputs of layers in pinned memory. drawn: weights that no file has when a stage
    begins. written: copies of what is on the devices while a checkpoint or the stage's model is written. copied: with
    `async_checkpoints`, the whole checkpoint in pinned memory, which stays taken between one and the next. flattened:
    with ZeRO-3, each rank's share of the weights while DeepSpeed moves it into one buffer.
    """

    processes: float
    cache: float
    samples: float
    offload: float
    drawn: float
    written: float
    copied: float = 0.0
    flattened: float = 0.0

    @property
    def moments(self) -> dict[str, float]:
        """When the memory may peak → how much is then held."""
        training = self.processes + self.cache + self.samples + self.offload + self.copied
        return {
            "at the start": self.processes + max(self.drawn, self.flattened),
            "in a step": training,
            "at a checkpoint": training + self.written,
        }

    @property
    def peak(self) -> float:
        """The most that is held at once."""
        return max(self.moments.values())


@dataclass(frozen=True)
class Node:
    """What is assumed of a node. ranks: processes, one a GPU. process: bytes of one that holds no model and no data."""

    ranks: int = 8
    process: float = 3e9


def host_footprint(
    config: Any, plan: Plan, node: Node, step: Share, parameters: float, trained: float, *,
    cache: float = 0.0, pinned: float = 0.0, drawn: float = 0.0, drawn_once: float = 0.0, heldout: int = 0,
    background: bool = False, gpus: bool = True,
) -> HostFootprint:  # fmt: skip
    """The host memory of one node in one stage.

    Args:
        plan: how one rank trains. step: what a whole step trains on, over all ranks.
        parameters, trained: of the module that is trained.
        cache: bytes that a process may keep of encoded samples. pinned: tokens of a rank whose layers' inputs wait in
            host memory. drawn, drawn_once: parameters that every rank, and that one rank alone, draws in fp32.
        heldout: steps whose held-out samples wait for the next measure.
        background: whether checkpoints are written in the background. gpus: whether copies of the devices' memory are
            pinned; on the CPU they are plain memory, of their own size.
    """
    text, ranks = config.text_config, min(node.ranks, plan.ranks)
    pixels = CHANNELS * config.vision_config.patch_size**2 * plan.pixel
    sample = (TOKEN * step.tokens + pixels * step.patches) / plan.ranks
    taken = _pinned if gpus else float
    inputs = taken(plan.element * text.hidden_size * pinned) * text.num_hidden_layers if plan.offload else 0.0
    return HostFootprint(
        processes=ranks * node.process,
        cache=ranks * cache,
        samples=ranks * (POOLED + heldout) * sample,
        offload=ranks * inputs,
        drawn=FP32 * (ranks * drawn + drawn_once),
        written=_table(config) if background else _written(config, plan, ranks, parameters, trained),
        copied=_copied(plan, ranks, parameters, trained, taken) if background else 0.0,
        flattened=ranks * plan.element * trained / plan.ranks if plan.zero == 3 else 0.0,
    )


def _pinned(size: float) -> float:
    """Bytes that torch's allocator of pinned memory takes for a tensor: the next power of two."""
    return float(1 << (max(1, round(size)) - 1).bit_length())


def _written(config: Any, plan: Plan, ranks: int, parameters: float, trained: float) -> float:
    """What lies in host memory while a checkpoint, or a stage's model, is written: torch copies a storage at a time.

    The largest storage of a rank is a third of its optimizer's state, and of the first rank the flat weights; a stage's
    model passes through the first rank's host one tensor at a time.
    """
    shard = FP32 * trained / plan.ranks if plan.zero else 0.0  # without ZeRO the first rank writes all, by parameter
    model = plan.element * (parameters / plan.ranks if plan.zero == 3 else parameters)
    # The first rank writes the model while the others are at their shards.
    return max(max(model, shard) + (ranks - 1) * shard, _table(config))


def _table(config: Any) -> float:
    """The largest tensor of a stage's model in fp32: the embeddings."""
    return float(FP32 * config.text_config.vocab_size * config.text_config.hidden_size)


def _copied(plan: Plan, ranks: int, parameters: float, trained: float, taken: Callable[[float], float]) -> float:
    """A whole checkpoint: of each rank its share of the fp32 weights and both moments, each a storage of its own.

    The first rank writes the weights besides; with ZeRO-3 every rank its share of them, and without ZeRO the first rank
    alone writes anything, by parameter, which is counted without what powers of two add. taken: bytes → bytes that a
    copy of so many takes.
    """
    if not plan.zero:
        return plan.element * parameters + 2 * FP32 * trained
    shard = 3 * taken(FP32 * trained / plan.ranks)
    if plan.zero == 3:
        return ranks * (shard + taken(plan.element * parameters / plan.ranks))
    return ranks * shard + taken(plan.element * parameters)
