"""`python -m keye.world OUT`: draw SlowFastWorld into a directory."""

import argparse

from keye.errors import ManifestError, run
from keye.world import FAMILIES, generate

_EXAMPLES = """examples:
  python -m keye.world world                                        100 training samples of every family
  python -m keye.world world --split heldout --each 50              50 held-out samples of every family
  python -m keye.world world --counts count=500,order=500 --seed 7
  python -m keye.world world --size 224x336 --duration 6 --difficulty 0.8
"""


def parse_counts(text: str) -> dict[str, int]:
    """`count=500,order=20` → {"count": 500, "order": 20}; ManifestError for anything else."""
    try:
        pairs = [(name.strip(), int(number)) for name, number in (part.split("=") for part in text.split(","))]
    except ValueError as error:
        raise ManifestError(f"--counts {text!r} is not understood; write it like count=500,order=20") from error
    if len(dict(pairs)) < len(pairs):
        raise ManifestError(f"--counts {text!r} gives a family twice; write each family once")
    return dict(pairs)


def parse_size(text: str) -> tuple[int, int]:
    """`HEIGHTxWIDTH` → (height, width) in pixels; ManifestError for anything else."""
    try:
        height, width = map(int, text.lower().split("x"))
    except ValueError as error:
        raise ManifestError(f"--size {text!r} is not understood; write height x width like 112x112") from error
    return height, width


def main() -> None:
    """Parse the command line and draw one split."""
    parser = argparse.ArgumentParser(
        prog="python -m keye.world",
        description="Generate SlowFastWorld: H.264 clips, stills and a JSONL manifest of questions with known answers.",
        epilog=f"families: {', '.join(FAMILIES)}\n\n{_EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", help="directory to write to")
    parser.add_argument("--split", default="train", help="train or heldout (default train)")
    parser.add_argument("--each", type=int, default=100, help="samples of each family (default 100)")
    parser.add_argument("--counts", help="samples of some families, like count=500,order=20, instead of --each")
    parser.add_argument("--seed", type=int, default=0, help="0 or more; the same seed draws the same world (default 0)")
    parser.add_argument("--size", default="112x112", help="height x width in pixels (default 112x112)")
    parser.add_argument("--duration", type=float, default=8.0, help="seconds (default 8; find clips are twice as long)")
    parser.add_argument("--fps", type=int, default=4, help="frames a second, even (default 4)")
    parser.add_argument("--difficulty", type=float, default=0.3, help="0 (easy) to 1 (hard), default 0.3")
    parser.add_argument("--workers", type=int, help="processes (default one per core)")
    given = parser.parse_args()
    path = generate(
        given.out,
        given.split,
        counts=parse_counts(given.counts) if given.counts else dict.fromkeys(FAMILIES, given.each),
        seed=given.seed,
        size=parse_size(given.size),
        duration=given.duration,
        difficulty=given.difficulty,
        fps=given.fps,
        workers=given.workers,
    )
    print(f"wrote {path}")


if __name__ == "__main__":
    run(main)
