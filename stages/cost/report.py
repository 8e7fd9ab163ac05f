"""The cost of a recipe as a table for the terminal, as JSON and as a picture."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from keye.errors import writing
from keye.visualize.figures import save_figure
from stages.cost.estimate import Assumptions, StageCost
from stages.cost.footprint import Footprint
from stages.cost.gpus import PRICES_OF, Gpu
from stages.cost.host_memory import HostFootprint
from stages.recipe import Recipe

HOST = ("processes", "cache", "samples", "offload", "drawn", "written")
MEMORY_PARTS = ("weights", "gradients", "buckets", "optimizer", "activations", "pixels", "one layer", "logits", "step")
GB = 1e9


def sentence(recipe: Recipe, gpu: Gpu, gpus: int, assumed: Assumptions) -> str:
    """The assumptions, as a note below the table."""
    return (
        f"Assumed: products at {assumed.utilisation:.0%} of {gpu.peak / 1e12:,.0f} TFLOP/s, recomputation "
        f"included; {assumed.usable:.0%} of {gpu.memory / GB:.0f} GB for tensors; {gpu.price:g} $ per GPU hour "
        f"({PRICES_OF}); samples of the sizes that the budgets of {recipe.name} allow ({gpus} × {gpu.name}); "
        f"{min(assumed.node.ranks, gpus)} processes per node, each of {assumed.node.process / GB:g} GB without model "
        "and data."
    )


def lines(costs: Sequence[StageCost]) -> list[list[str]]:
    """The table's cells: a row for each phase and one for the sum."""
    rows = []
    for cost in costs:
        fits = "fits" if cost.fits else "TOO LARGE"
        rows.append(
            [
                cost.name, amount(cost.parameters), amount(cost.trained), f"{cost.memory.peak / GB:.1f}", fits,
                f"{cost.flops:.2e}", f"{cost.seconds:.2f}", f"{cost.mfu:.0%}", f"{cost.steps:,}",
                f"{amount(cost.tokens * cost.steps)}", duration(cost.days), f"{cost.dollars:,.0f}",
            ]
        )  # fmt: skip
    days, dollars = sum(cost.days for cost in costs), sum(cost.dollars for cost in costs)
    tokens = amount(sum(cost.tokens * cost.steps for cost in costs))
    return [*rows, ["all", *[""] * 8, tokens, duration(days), f"{dollars:,.0f}"]]


COLUMNS = (
    "phase", "parameters", "trained", "GB a GPU", "", "FLOPs a step", "s a step", "MFU", "steps", "tokens", "time", "$",
)  # fmt: skip


def table(costs: Sequence[StageCost]) -> str:
    """The costs as aligned text, followed by the memory by component."""
    memory = [
        [cost.name, *(f"{cost.memory.parts.get(part, 0.0) / GB:.1f}" for part in MEMORY_PARTS), _moment(cost.memory)]
        for cost in costs
    ]
    host = [
        [cost.name, *(f"{getattr(cost.host, part) / GB:.1f}" for part in HOST), f"{cost.host.peak / GB:.1f}",
         _moment(cost.host)]
        for cost in costs
    ]  # fmt: skip
    tables = [
        [COLUMNS, *lines(costs)],
        [("GB a GPU", *MEMORY_PARTS, "at the peak,"), *memory],
        [("GB a node", *HOST, "peak", ""), *host],
    ]
    return "\n\n".join("\n".join(aligned(rows)) for rows in tables)


def _moment(memory: Footprint | HostFootprint) -> str:
    return max(memory.moments, key=memory.moments.__getitem__)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]


def amount(value: float) -> str:
    """A count with three digits: 8.64 G."""
    for size, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {name}"
    return f"{value:.0f}"


def duration(days: float) -> str:
    """A duration in days, hours or minutes."""
    if days >= 2:
        return f"{days:.1f} days"
    return f"{days * 24:.1f} h" if days * 24 >= 2 else f"{days * 1440:.1f} min"


def as_json(recipe: Recipe, gpu: Gpu, gpus: int, assumed: Assumptions, costs: Sequence[StageCost]) -> dict[str, Any]:
    """Everything, memory by component and by moment, ready for JSON."""
    phases = []
    for cost in costs:
        memory = {"peak": cost.memory.peak, "parts": cost.memory.parts, "moments": cost.memory.moments}
        host = {"peak": cost.host.peak, "moments": cost.host.moments}
        phases.append(
            {
                **asdict(cost),
                "mend": cost.remedy,  # the former name of the key
                "memory": {**asdict(cost.memory), **memory},
                "host": {**asdict(cost.host), **host},
            }
        )
    return {"recipe": recipe.name, "gpu": asdict(gpu), "gpus": gpus, "assumed": asdict(assumed), "phases": phases}


def draw(path: Path, gpu: Gpu, costs: Sequence[StageCost], title: str) -> None:
    """Draw the memory of each phase by component, with the GPU's as a line, and its time; PNG or SVG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 0.55 * len(costs) + 2.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2), sharey=True)
    names, colours = [cost.name for cost in costs], dict(zip(MEMORY_PARTS, _COLOURS, strict=True))
    starts = [0.0] * len(costs)
    for part in MEMORY_PARTS:
        sizes = [cost.memory.parts.get(part, 0.0) / GB for cost in costs]
        if any(sizes):
            left.barh(names, sizes, left=starts, color=colours[part], label=part, height=0.6)
            starts = [start + size for start, size in zip(starts, sizes, strict=True)]
    left.axvline(gpu.memory / GB, color="0.2", linestyle="--", linewidth=1)
    left.set_xlim(0, 1.08 * max(gpu.memory / GB, *starts))
    left.text(gpu.memory / GB, -0.65, f"{gpu.name} ", ha="right", va="bottom", fontsize=8)
    left.set_xlabel("GB of a GPU at the peak of a step")
    left.invert_yaxis()
    left.legend(fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.18 - 0.25 / len(costs)))
    hours = [cost.days * 24 for cost in costs]
    bars = right.barh(names, hours, color="#4878a8", height=0.6)
    right.bar_label(bars, [duration(cost.days) for cost in costs], padding=4, fontsize=8)
    right.set_xlim(0, 1.3 * max(hours))
    right.set_xlabel("hours")
    figure.suptitle(title, fontsize=10)
    with writing(path, "the figure"):
        path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path, dpi=120)


_COLOURS = ("#35507a", "#6f9bd1", "#8fb7c9", "#a9c8e8", "#d98b3a", "#ecc48f", "#8a6fb0", "#b8a6d1", "#9a9a9a")
