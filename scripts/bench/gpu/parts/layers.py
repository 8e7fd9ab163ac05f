"""Part c: tower and decoder layers of the 8B shapes over packs of real plans, and what vision costs in a pass.

TFLOP/s, share of the measured ceiling and memory of a layer in every setting, beside transformers' Qwen2.5-VL at the
same shapes; then the complete model with half its layers over a multimodal pack, a text-only pack of the same length,
and the passes in between.
"""

from keye.errors import run
from scripts.bench.common.record import Table
from scripts.bench.gpu import stacks, waterfall
from scripts.bench.gpu.journal import Journal, parser
from scripts.bench.gpu.plans import plans_in
from scripts.bench.gpu.settings import Row, groups, sizes_of

PART = "layers"
PACKS = 8  # whose times show the imbalance
NOTES = [
    *stacks.NOTES,
    "The passes are those of a model with 18 decoder and 14 tower layers of the 8B shapes, without recomputation. "
    "Packs have three documents of drawn lengths. Imbalance: if each of the packs were on a rank of its own, ranks "
    "would wait for the slowest; the planner has not balanced them.",
]


def main() -> int:
    args = parser(__doc__, PART).parse_args()
    journal = Journal.open(args, PART)
    plans = plans_in(journal.plans, journal.small)
    sizes = sizes_of(journal.small, plans)
    kinds = groups(sizes, journal.device)
    ceiling = 0.0

    def measured() -> list[Row]:
        found = []
        for rows in kinds:
            if values := journal.found.get(rows[0].name):
                for row, kept in zip(rows, values["rows"], strict=True):
                    row.restore(kept)
                found += rows
        return found

    def tables() -> list[Table]:
        names = {row.name for row in measured()}
        made = [stacks.table_of(rows, ceiling) for rows in kinds if rows[0].name in names]
        return [stacks.ceiling_table(journal), *waterfall.tables_of(journal, ceiling), *made]

    journal.tables = tables
    ceiling = stacks.ceiling_of(journal, sizes)
    rounds = 2 if journal.small else sizes.rounds
    for name, compiler in (("compiled layers", sizes.compiler), ("plain layers", "")):
        journal.row(
            f"waterfall, {name}",
            lambda compiler=compiler: waterfall.measure(
                journal, plans, sizes.dtype, compiler, rounds, 2 if journal.small else PACKS
            ),
        )
    for rows in kinds:
        journal.row(rows[0].name, lambda rows=rows: stacks.measure_rows(rows, sizes, journal.device))
    claims = stacks.claims_of(measured(), ceiling) + waterfall.claims_of(journal, ceiling)
    journal.save(claims, NOTES)
    return 0


if __name__ == "__main__":
    run(main)
