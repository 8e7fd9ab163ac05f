"""Time of a step with and without `compile = true`: the same training in both ways, with alternating steps.

Layers and pack are the base case of cost.py, with and without recomputation.
"""

import time
from statistics import median

from keye.errors import run
from scripts.bench.common.record import Table, arguments, out_of, save
from scripts.bench.stages.cost import Case, Training
from stages.distributed import engine as deep

EXAMPLES = """examples:
  python -m scripts.bench.stages.compile           about two minutes on a quiet machine
  python -m scripts.bench.stages.compile --quick   small layers, which prove nothing
"""


def measure(case: Case, steps: int) -> list[object]:
    """A row of the table: seconds of the first compiled step, of a plain and of a compiled step, and their ratio."""
    trainings = [Training(case, compiled) for compiled in (False, True)]
    began = time.perf_counter()
    trainings[0].step()
    trainings[1].step()
    first = time.perf_counter() - began
    taken: list[list[float]] = [[], []]
    for number in range(steps):
        for which in (0, 1) if number % 2 else (1, 0):
            taken[which].append(trainings[which].step())
    plain, compiled = map(median, taken)
    return [case.name, f"{first:.0f}", f"{plain:.2f}", f"{compiled:.2f}", f"{plain / compiled:.2f}"]


def main() -> int:
    args = arguments(__doc__, EXAMPLES, results="stages").parse_args()
    began, sizes = time.monotonic(), {"layers": 2, "tower": 1, "tokens": 256} if args.quick else {}
    deep.start(threads=1)
    steps = 2 if args.quick else 5
    cases = [Case("plain layers", **sizes), Case("recomputed", checkpointing=True, **sizes)]
    table = Table(
        "Steps plain and compiled",
        ["case", "s of the first two steps", "s plain", "s compiled", "plain ÷ compiled"],
        [measure(case, steps) for case in cases],
    )
    deep.stop()
    notes = [
        f"One thread, fp32, ZeRO-1. Both trainings are in one process and step in turn; seconds are the processor's, "
        f"medians of {steps}. The first step of each is not among them: there the layers are compiled.",
        "With recomputation, compiled layers compute their attention twice and plain ones once.",
    ]
    save(
        out_of(args), "compile", [], [table], seconds=time.monotonic() - began, quick=args.quick, notes=notes,
        seeds={"weights and pack": 0},
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    run(main)
