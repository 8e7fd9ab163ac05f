"""Layers in every setting, timed in turn, with their memory; and the measured ceiling that rates are a share of."""

from collections.abc import Callable, Sequence
from statistics import median

import torch

from scripts.bench.common.record import Claim, Table
from scripts.bench.common.timing import in_turn, ratio
from scripts.bench.gpu.journal import Journal, Values, begin_peak, failure, say
from scripts.bench.gpu.settings import Row, Sizes

GOAL = 0.55
COLUMNS = ("layers", "setting", "ms, forward + backward", "TFLOP/s", "of the ceiling", "MB kept", "MB at the peak")


def ceiling_of(journal: Journal, sizes: Sizes) -> float:
    """FLOP/s of the fastest product of two large random matrices; 0 if none could be measured."""
    rates = []
    for shape in sizes.matrices:
        m, n, k = shape
        key = f"matrix product {m} × {k} by {k} × {n}"
        if found := journal.row(key, lambda shape=shape: _product(shape, sizes, journal)):
            rates.append(found["rate"])
    return max(rates, default=0.0)


def _product(shape: tuple[int, int, int], sizes: Sizes, journal: Journal) -> Values:
    m, n, k = shape
    a, b = (torch.randn(s, device=journal.device, dtype=sizes.dtype) for s in ((m, k), (k, n)))
    took = median(in_turn({"product": lambda: a @ b}, sizes.rounds, journal.device, warm_up=5)["product"])
    return {"ms": took * 1e3, "rate": 2 * m * n * k / took}


def ceiling_table(journal: Journal) -> Table:
    rows = [
        (key.removeprefix("matrix product "), f"{row['ms']:.3f}", f"{row['rate'] / 1e12:.3g}")
        for key, row in journal.found.items()
        if key.startswith("matrix product ")
    ]
    return Table("The ceiling, products of random matrices", ("shape", "ms", "TFLOP/s"), rows)


def measure_rows(rows: Sequence[Row], sizes: Sizes, device: torch.device) -> Values:
    """Warm all up, then time them in turn; each one's memory is taken alone. A row that fails has its sentence."""
    calls = {}
    for number, row in enumerate(rows):
        try:
            calls[str(number)] = _ready(row, sizes, device)
        except Exception as error:  # out of memory, a compiler's own; the others are still measured
            row.failure = failure(error)
            say(f"{row.name}, {row.setting}: {row.failure}")
    for number, times in in_turn(calls, sizes.rounds, device).items():
        rows[int(number)].times = times
    return {"rows": [row.values() for row in rows]}


def _ready(row: Row, sizes: Sizes, device: torch.device) -> Callable[[], object]:
    """Build and compile a stack, run it, note its memory."""
    stack = row.make()
    if row.compiled:
        stack.compile(sizes.compiler, fullgraph=row.setting.startswith("ours"))
    row.flops, row.count = stack.flops, len(stack.layers)
    for _ in range(2):
        stack.step(row.recompute)
    if device.type == "cuda":
        stack.forget()
        before = begin_peak(device)
        output = stack.forward(row.recompute)
        row.kept = (torch.cuda.memory_allocated(device) - before) / row.count / 2**20
        stack.backward(output)
        row.peak = (torch.cuda.max_memory_allocated(device) - before) / row.count / 2**20
    return lambda: stack.step(row.recompute)


def table_of(rows: Sequence[Row], ceiling: float) -> Table:
    """The rows of one kind of layer."""
    return Table(f"One layer: {rows[0].name}", COLUMNS, [_cells(row, ceiling) for row in rows])


def _cells(row: Row, ceiling: float) -> tuple[str, ...]:
    if row.failure:
        return (row.name, row.setting, row.failure, *["–"] * 4)
    memory = [f"{size:.0f}" if size else "–" for size in (row.kept, row.peak)]
    share = f"{row.rate / ceiling:.0%}" if ceiling else "–"
    return (row.name, row.setting, f"{row.took / row.count * 1e3:.3f}", f"{row.rate / 1e12:.3g}", share, *memory)


def claims_of(rows: Sequence[Row], ceiling: float) -> list[Claim]:
    """The share of the ceiling of each kind of layer, and the comparison with transformers over each pack."""
    claims = []
    for kind in ("vision", "decoder"):
        measured = [row for row in rows if row.name.startswith(kind) and row.times]
        ours, theirs = ([row for row in measured if row.setting.startswith(who)] for who in ("ours", "Qwen2.5-VL"))
        if ours and ceiling:
            best = max(ours, key=lambda row: row.rate)
            share = best.rate / ceiling
            figure = f"{share:.0%} ({best.rate / 1e12:.3g} TFLOP/s; {best.name}, {best.setting})"
            claim = f"{kind} layers, forward + backward, share of the measured matrix ceiling"
            claims.append(Claim(claim, f"≥ {GOAL:.0%}", figure, met=share >= GOAL))
        for name in dict.fromkeys(row.name for row in theirs):
            mine, other = ([row for row in some if row.name == name] for some in (ours, theirs))
            if mine:
                claims.append(_comparison(mine, other))
    return claims


def _comparison(ours: list[Row], theirs: list[Row]) -> Claim:
    mine, other = (min(rows, key=lambda row: row.took) for rows in (ours, theirs))
    times = ratio(mine.times, other.times)
    figure = f"{mine.took / mine.count * 1e3:.2f} against {other.took / other.count * 1e3:.2f} ms a layer"
    claim = f"{mine.name}: compared with transformers' Qwen2.5-VL, each in its fastest setting"
    return Claim(claim, "no slower", figure, f"{times:.2f} × its time", times <= 1.0)


NOTES = [
    "Operations are those of the model (forward, and twice that backward); what checkpointing computes again is not "
    "counted, causal attention counts the pairs it sees. 'ours' names the attention backend. Qwen2.5-VL is run with "
    "sdpa: frame by frame in the tower, documents kept apart by a mask in the decoder. Its gated vision MLPs are two "
    "thirds as wide inside, so that both take the same number of operations.",
    "Times and memory are a layer's, times medians over rounds in alternating order after a warm-up; 'kept' is what a "
    "forward pass leaves for the backward pass, the peak is the most above the weights in a step, gradients included.",
]
