"""Peak memory of planning and encoding a long 720p film, compared with the size of the result.

Every measurement runs in its own process, which imports and then opens the film; peaks come from the kernel (VmHWM) and
include imports. The goal is 1.3 times the size of the pixels, plus 0.5 GB for the plan.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

from keye.errors import run
from scripts.bench.common.process import in_process
from scripts.bench.common.record import Claim, Table, arguments, out_of, save
from scripts.bench.encoder.media.films import film
from scripts.bench.encoder.plan import peak_mb

PLAN_MB, FACTOR = 500, 1.3
NAMES = {
    "plan": "plan alone",
    "float32": "pixels, float32 (default)",
    "bfloat16": "pixels, bfloat16",
    "uint8": "pixels, bytes",
    "frames": "frames 384x384, bytes",
}
JUDGED = ("float32", "bfloat16")  # of fewer bytes come out than the frames must be kept in until their sizes are known


def contender(kind: str, path: Path) -> Callable[[], int]:
    """What a worker process does: the number of bytes that come out."""
    import torch

    from keye import SlowFastEncoder

    encoder = SlowFastEncoder()
    if kind == "plan":
        return lambda: 0 * len(encoder.plan(path))
    if kind == "frames":
        return lambda: sum(part.nbytes for part in _stacks(encoder.frames(path, size=384)))
    return lambda: encoder(path, dtype=getattr(torch, kind)).pixel_values.nbytes


def _stacks(chosen: object) -> tuple:
    return chosen.slow, chosen.fast


def work(kind: str, path: Path) -> None:
    """In a worker: one contender once; prints what it took as JSON."""
    action = contender(kind, path)
    before, began = peak_mb(), time.perf_counter()
    out = action()
    row = {"imports_mb": before, "peak_mb": peak_mb(), "out_mb": out / 2**20, "seconds": time.perf_counter() - began}
    print(json.dumps(row))


def measure(kind: str, path: Path) -> dict:
    """One contender on the film in a fresh process."""
    found = in_process(__spec__.name, ["--worker", kind, "--film", str(path)], f"{NAMES[kind]} on {path.name}")
    print(f"  {NAMES[kind]:28} {found['peak_mb']:7.0f} MB for {found['out_mb']:.0f} MB", flush=True)
    return found


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--worker", choices=NAMES, help=argparse.SUPPRESS)
    parser.add_argument("--film", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args.worker, args.film)
    began = time.monotonic()
    path = film(12, False, (180, 320)) if args.quick else film(600, False)
    rows = {kind: measure(kind, path) for kind in NAMES}
    claims = []
    for kind in JUDGED:
        peak, out = rows[kind]["peak_mb"], rows[kind]["out_mb"]
        goal = FACTOR * out + PLAN_MB
        claims.append(
            Claim(
                f"peak memory of plan and pixels, 10-minute 720p film, {NAMES[kind].removeprefix('pixels, ')}",
                f"≤ {FACTOR} × the pixels + {PLAN_MB} MB",
                f"{peak:.0f} MB against {goal:.0f} MB ({out:.0f} MB come out)",
                f"{(peak - PLAN_MB) / out:.2f} × without the plan",
                met=peak <= goal,
            )
        )
    table = Table(
        f"Peaks on {path.name}",
        ("what", "peak MB", "of which imports", "MB that come out", "s"),
        [
            (
                NAMES[kind],
                f"{row['peak_mb']:.0f}",
                f"{row['imports_mb']:.0f}",
                f"{row['out_mb']:.0f}",
                f"{row['seconds']:.1f}",
            )
            for kind, row in rows.items()
        ],
    )
    note = (
        "Frames are kept until every frame has its type, at up to twice the pixels that they may be needed at: of"
        " bytes, more memory is held for that than comes out, and no goal is set."
    )
    save(out_of(args), "memory", claims, [table], seconds=time.monotonic() - began, quick=args.quick, notes=[note])


if __name__ == "__main__":
    run(main)
