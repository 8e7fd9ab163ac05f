"""The host memory of a node by component, computed from shapes; the memory of the GPUs is not counted.

Weights are read from mapped pages of their files, which the processes of a node share and which the system can free:
they are not counted. Counted are the processes, their samples, the inputs of layers in host memory, and the tensors
that pass through host memory when a checkpoint or a model is written.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from stages.cost.footprint import CHANNELS, FP32, Plan, Share

POOLED = 4  # steps of encoded samples in the planner's pool or in flight
PREPARED = 1  # steps of assembled batches, which are copies
TOKEN = 8 * (1 + 1 + 3)  # bytes of a token in a sample: id, label and three positions


@dataclass(frozen=True)
class HostFootprint:
    """Bytes of one node.

    processes: interpreters and libraries. cache: of encoded samples (`data.cache_mb`). samples: encoded, not yet
    trained on and not in the cache, and assembled batches. offload: inputs of layers in pinned memory. drawn: randomly
    initialized weights at the start of a stage. written: copies of device memory while a checkpoint or the stage's
    model is written. copied: with `async_checkpoints`, the complete checkpoint in pinned memory, which stays allocated.
    flattened: with ZeRO-3, each rank's share of the weights while DeepSpeed moves it into one buffer.
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
        """Time at which the memory may peak → bytes at that time."""
        training = self.processes + self.cache + self.samples + self.offload + self.copied
        return {
            "at the start": self.processes + max(self.drawn, self.flattened),
            "in a step": training,
            "at a checkpoint": training + self.written,
        }

    @property
    def peak(self) -> float:
        """The largest of the moments, in bytes."""
        return max(self.moments.values())


@dataclass(frozen=True)
class Node:
    """Assumptions on a node.

    ranks: processes, one per GPU. process: bytes of one without model and samples; 128 MB are row groups of Parquet.
    """

    ranks: int = 8
    process: float = 3e9


def host_footprint(
    config: Any, plan: Plan, node: Node, step: Share, parameters: float, trained: float, *,
    cache: float = 0.0, pinned: float = 0.0, drawn: float = 0.0, drawn_once: float = 0.0, heldout: int = 0,
    background: bool = False, gpus: bool = True,
) -> HostFootprint:  # fmt: skip
    """The host memory of one node in one stage.

    Args:
        plan: the settings of one rank.
        node: the assumptions on the node.
        step: a step over all ranks.
        parameters, trained: of the trained module.
        cache: bytes of encoded samples that a process may keep.
        pinned: tokens of a rank whose layers' inputs are in host memory.
        drawn, drawn_once: parameters initialized in fp32 by every rank, and by one rank only.
        heldout: steps of held-out samples that are kept.
        background: whether checkpoints are written in the background.
        gpus: whether copies of the devices' memory are pinned; on the CPU they are plain memory of the same size.
    """
    text, ranks = config.text_config, min(node.ranks, plan.ranks)
    pixels = CHANNELS * config.vision_config.patch_size**2 * plan.pixel
    sample = (TOKEN * step.tokens + pixels * step.patches) / plan.ranks
    allocated = _pinned if gpus else float
    inputs = allocated(plan.element * text.hidden_size * pinned) * text.num_hidden_layers if plan.offload else 0.0
    return HostFootprint(
        processes=ranks * node.process,
        cache=ranks * cache,
        # The samples that wait are those that were encoded last, so the cache contains the same tensors.
        samples=ranks * ((PREPARED + heldout) * sample + max(0.0, POOLED * sample - cache)),
        offload=ranks * inputs,
        drawn=FP32 * (ranks * drawn + drawn_once),
        written=_table(config) if background else _written(config, plan, ranks, parameters, trained),
        copied=_copied(plan, ranks, parameters, trained, allocated) if background else 0.0,
        flattened=ranks * plan.element * trained / plan.ranks if plan.zero == 3 else 0.0,
    )


def _pinned(size: float) -> float:
    """Bytes that torch allocates for a pinned tensor: the next power of two."""
    return float(1 << (max(1, round(size)) - 1).bit_length())


def _written(config: Any, plan: Plan, ranks: int, parameters: float, trained: float) -> float:
    """Bytes in host memory while a checkpoint, or a stage's model, is written: torch copies one storage at a time.

    The largest storage of a rank is a third of its optimizer's state, and of the first rank the flat weights; a stage's
    model passes through the first rank's host one tensor at a time.
    """
    shard = FP32 * trained / plan.ranks if plan.zero else 0.0  # without ZeRO the first rank writes all, by parameter
    model = plan.element * (parameters / plan.ranks if plan.zero == 3 else parameters)
    # The first rank writes the model while the others write their shards.
    return max(max(model, shard) + (ranks - 1) * shard, _table(config))


def _table(config: Any) -> float:
    """Bytes of the largest tensor of a stage's model in fp32: the embeddings."""
    return float(FP32 * config.text_config.vocab_size * config.text_config.hidden_size)


def _copied(plan: Plan, ranks: int, parameters: float, trained: float, allocated: Callable[[float], float]) -> float:
    """Bytes of a complete checkpoint: each rank's share of the fp32 weights and of both moments, each in one storage.

    The first rank also writes the weights; with ZeRO-3 every rank writes its share of them. Without ZeRO only the first
    rank writes, by parameter, counted without the rounding to powers of two. allocated: bytes → allocated bytes.
    """
    if not plan.zero:
        return plan.element * parameters + 2 * FP32 * trained
    shard = 3 * allocated(FP32 * trained / plan.ranks)
    if plan.zero == 3:
        return ranks * (shard + allocated(plan.element * parameters / plan.ranks))
    return ranks * shard + allocated(plan.element * parameters)
