"""The cost of a GSPO recipe as tables for the terminal and as JSON."""

from dataclasses import asdict
from typing import Any

from rl.cost.estimate import Assumptions, RlCost
from stages.cost.gpus import PRICES_OF, Gpu
from stages.cost.report import GB, HOST, aligned, amount, duration


def table(cost: RlCost) -> str:
    """The cost as aligned text: a summary, memory by component at every moment of a step, the time, and the node."""
    size, name = unit(cost.memory.peak)
    fits = "fits" if cost.fits else "TOO LARGE"
    summary = [
        ("parameters", "trained", f"{name} a GPU", "", "FLOPs a step", "s a step", "steps", "tokens", "time", "$"),
        (
            amount(cost.parameters), amount(cost.trained), f"{cost.memory.peak / size:.1f}", fits,
            f"{cost.operations.total:.2e}", f"{cost.seconds.total:.1f}", f"{cost.steps:,}",
            amount(cost.tokens * cost.steps), duration(cost.days), f"{cost.dollars:,.0f}",
        ),
    ]  # fmt: skip
    tables = [summary, memory_rows(cost), _time(cost), _host(cost)]
    return "\n\n".join("\n".join(aligned(rows)) for rows in tables)


def memory_rows(cost: RlCost) -> list[tuple[str, ...]]:
    """A row for every moment of a step, with a column for each component; the first row has the names and the unit."""
    components, (size, unit_name) = cost.memory.components, unit(cost.memory.peak)
    names = [name for name in _COLUMNS if any(parts.get(name) for parts in components.values())]
    rows = [
        (moment, *(f"{parts[name] / size:.1f}" if parts.get(name) else "" for name in names),
         f"{sum(parts.values()) / size:.1f}")
        for moment, parts in components.items()
    ]  # fmt: skip
    return [(f"{unit_name} a GPU", *names, "sum"), *rows]


_COLUMNS = (
    "weights", "optimizer", "gradients", "buckets", "kv cache", "activations", "pixels", "one layer", "logits", "step",
)  # fmt: skip


SERVED = (
    ' Answers are sampled by other servers (rollout.engine = "served"): their GPUs, their time and the wait for them '
    "are not counted."
)


def _time(cost: RlCost) -> list[tuple[str, ...]]:
    seconds, done = cost.seconds, cost.operations
    update = done.update + done.again
    return [
        ("a step", "prefill", "decode", "old log-probs", "update", "sum"),
        ("seconds", *(f"{x:.1f}" for x in (seconds.prefill, seconds.decode, seconds.score, seconds.update)),
         f"{seconds.total:.1f}"),
        ("FLOPs", *(f"{x:.1e}" for x in (done.prefill, done.decode, done.score, update)), f"{done.total:.1e}"),
    ]  # fmt: skip


def _host(cost: RlCost) -> list[tuple[str, ...]]:
    parts = [part for part in HOST if getattr(cost.host, part)]
    return [
        ("GB a node", *parts, "peak"),
        ("", *(f"{getattr(cost.host, part) / GB:.1f}" for part in parts), f"{cost.host.peak / GB:.1f}"),
    ]


def advice(cost: RlCost) -> str:
    """The largest component at the peak, and the key that lowers it."""
    moments = cost.memory.moments
    moment = max(moments, key=moments.__getitem__)
    size, name = unit(cost.memory.peak)
    largest, peak = cost.memory.parts[cost.largest] / size, cost.memory.peak / size
    return (
        f"The peak is {moment}. Its largest component is {cost.largest} ({largest:.1f} of {peak:.1f} {name}). "
        f"What lowers it: {cost.lowers}."
    )


def unit(size: float) -> tuple[float, str]:
    """Bytes of the unit in which a size is shown, and its name."""
    return (GB, "GB") if size >= GB else (1e6, "MB")


def sentence(pretrain: str, gpu: Gpu, gpus: int, assumed: Assumptions, cost: RlCost) -> str:
    """The assumptions, as a note below the table."""
    lengths = cost.lengths
    return (
        f"Assumed: the model and the clips of {pretrain}; prompts of {lengths.prompt:,} tokens, the longest of "
        f"{lengths.longest_prompt:,}; answers of {lengths.answer:,}, the longest of {lengths.longest_answer:,}; every "
        f"group has an advantage; products at {assumed.utilisation:.0%} of {gpu.peak / 1e12:,.0f} TFLOP/s, decoding "
        f"at {assumed.bandwidth:.0%} of {gpu.bandwidth / 1e12:g} TB/s; {assumed.usable:.0%} of {gpu.memory / GB:.0f} "
        f"GB for tensors; {gpu.price:g} $ per GPU hour ({PRICES_OF}); {min(assumed.node.ranks, gpus)} processes per "
        f"node, each of {assumed.node.process / GB:g} GB without model and data. Rewards, communication between GPUs "
        "and held-out questions are not counted." + (SERVED if cost.memory.rollout is None else "")
    )


def as_json(name: str, gpu: Gpu, gpus: int, assumed: Assumptions, cost: RlCost) -> dict[str, Any]:
    """Everything, memory by component and by moment, ready for JSON."""
    memory = {"peak": cost.memory.peak, "parts": cost.memory.parts, "moments": cost.memory.components}
    host = {"peak": cost.host.peak, "moments": cost.host.moments}
    return {
        "recipe": name,
        "gpu": asdict(gpu),
        "gpus": gpus,
        "assumed": asdict(assumed),
        **asdict(cost),
        "memory": {**asdict(cost.memory), **memory},
        "host": {**asdict(cost.host), **host},
    }
