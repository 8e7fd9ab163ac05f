"""Time and memory of planning an hour at 720p, which compares 7,200 frames at default and 1,365 at released settings.

Each contender runs once, in its own process, as in `plan`. Processor time changes less than time on a shared machine.
"""

import time

from keye.errors import run
from scripts.bench.common.record import Claim, arguments, out_of, save
from scripts.bench.encoder.media.films import film
from scripts.bench.encoder.plan import hour_table, measure, rounds_of

NAMES = ("ours", "ours released", "bare SLICE")
NOTE = (
    "Default settings compare up to max_tokens / 4 frames: all 7,200 of the hour at 2 fps. Released settings compare"
    " the 1,365 that max_tokens / min_tokens_per_frame allows. The file has no B-frames, which can be skipped, so that"
    " nearly every picture is decoded either way; frames that are not compared are neither converted to RGB nor"
    " resized. Bare decoding with threads SLICE takes more processor time than the plans' threads. The clock includes"
    " the time that other programs took."
)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--resume", action="store_true", help="resume an interrupted bench")
    args = parser.parse_args()
    began = time.monotonic()
    seconds, size = (72, (180, 320)) if args.quick else (3600, (720, 1280))
    path = film(seconds, False, size)
    if not args.resume:
        rounds_of(path).unlink(missing_ok=True)
    hours = {name: measure(name, path) for name in NAMES}
    ours, released, bare = hours.values()
    about = "of the plan of an hour at 720p, default against released settings"
    seconds_of = f"{ours['cpu']:.0f} s against {released['cpu']:.0f} s; bare decoding {bare['cpu']:.0f} s"
    memory_of = f"{ours['peak_mb']:.0f} MB against {released['peak_mb']:.0f} MB"
    claims = [
        Claim(f"processor time {about}", "", seconds_of, f"{ours['cpu'] / released['cpu']:.2f} ×"),
        Claim(f"peak memory {about}", "", memory_of, f"{ours['peak_mb'] / released['peak_mb']:.2f} ×"),
    ]
    took, tables = time.monotonic() - began, [hour_table(hours)]
    save(out_of(args), "hour", claims, tables, seconds=took, quick=args.quick, seeds={"films": 3}, notes=[NOTE])


if __name__ == "__main__":
    run(main)
