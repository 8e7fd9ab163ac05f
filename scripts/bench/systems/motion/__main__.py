"""SlowFast Networks: pathways at equal operations on clips that alias, and the tiny model with a motion pathway."""

import time
from pathlib import Path

import torch

from keye.errors import KeyeError, run
from scripts.bench.common.record import arguments, out_of, save
from scripts.bench.encoder.media.corpus import FOLDER
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
    began = time.monotonic()
    folder = FOLDER / ("motion_quick" if args.quick else "motion")
    folder.mkdir(parents=True, exist_ok=True)
    if not args.finished:
        alias.measure(folder, args.quick)
        if (args.run / "annealing" / "model").is_dir():
            vlm.measure(args.run, folder, args.quick)
        else:
            print(f"without the tiny model: {args.run} is no finished demo; name one with --run", flush=True)
    claims, tables, notes = [], [], []
    for part in (alias, vlm):
        found = part.finished(folder)
        if found is None:
            notes.append(part.MISSING)
            continue
        more, table = part.report(found)
        claims += more
        tables.append(table)
        notes.append(part.NOTE)
    if args.finished:
        notes.append("Written from the arms that earlier calls have finished; each takes about 30 s of CPU.")
    if not tables:
        raise KeyeError("nothing is finished; run without --finished")
    save(
        out_of(args), "motion", claims, tables, seconds=time.monotonic() - began, quick=args.quick,
        seeds={"weights and order of training": ", ".join(map(str, alias.SEEDS)), "held-out discs": alias.TEST_SEED},
        notes=notes,
    )  # fmt: skip


if __name__ == "__main__":
    run(main)
