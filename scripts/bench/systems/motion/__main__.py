"""SlowFast Networks: pathways at equal operations on clips that alias, and the tiny model with a motion pathway."""

from pathlib import Path

import torch

from keye.errors import KeyeError, run
from scripts.bench.common.record import ROOT, arguments, forget_other_code, out_of, save
from scripts.bench.systems.motion import alias, vlm

EXAMPLES = """examples:
  python -m scripts.bench.systems.motion                      half an hour of one core; continues what was stopped
  python -m scripts.bench.systems.motion --run runs/demo      the run of a demo whose model is trained further
  python -m scripts.bench.systems.motion --finished           only the record, of what earlier calls have finished
  python -m scripts.bench.systems.motion --quick              two steps of each
"""


def main() -> None:
    parser = arguments(__doc__, EXAMPLES, results="systems")
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="a finished demo (default: runs/demo)")
    parser.add_argument("--finished", action="store_true", help="train nothing: record what is finished")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = ROOT / ".cache" / "bench" / "systems" / ("motion_quick" if args.quick else "motion")
    if not args.finished:
        forget_other_code(folder, ("keye/motion", "scripts/bench/systems/motion/clips.py"))
        alias.measure(folder, args.quick)
        if (args.run / "annealing" / "model").is_dir():
            vlm.measure(args.run, folder, args.quick)
        else:
            print(f"without the tiny model: {args.run} is no finished demo; name one with --run", flush=True)
    claims, tables, notes, seconds = [], [], [], 0.0
    for part in (alias, vlm):
        found = part.finished(folder)
        if found is None:
            notes.append(part.MISSING)
            continue
        seconds += found[1]
        more, table = part.report(found[0])
        claims += more
        tables.append(table)
        notes.append(part.NOTE)
        if part is vlm:
            notes.append(vlm.added_operations(folder))
    if args.finished:
        notes.append("Written from the arms that earlier calls have finished.")
    notes.append("Seconds are CPU seconds of one thread, of all arms.")
    if not tables:
        raise KeyeError("nothing is finished; run without --finished")
    save(
        out_of(args), "motion", claims, tables, seconds=seconds, quick=args.quick,
        seeds={
            "discs: weights and order of training": ", ".join(map(str, alias.SEEDS)), "held-out discs": alias.TEST_SEED,
            "tiny model: order of training": ", ".join(map(str, vlm.SEEDS)),
        },
        notes=notes,
    )  # fmt: skip


if __name__ == "__main__":
    run(main)
