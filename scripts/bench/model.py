"""What the model claims, measured: parity with transformers, speed beside Qwen2.5-VL, packing, memory, a GPU's share.

Every part is a script beside this one (model_<part>.py) and leaves a JSON file under docs/results/model; model.md
beside that folder is written from these files, so a part can be run again alone. `--part` without a name only writes
the document.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from keye.errors import run  # noqa: E402
from scripts.bench.record import RESULTS, arguments, document, out_of, run_parts  # noqa: E402

PARTS = ("parity", "speed", "packing", "memory")
GPU = "gpu"
EXAMPLES = """examples:
  python scripts/bench/model.py                     all parts that need no GPU; minutes, on a machine left alone
  python scripts/bench/model.py --part speed        one of them
  python scripts/bench/model.py --part              only the document, from what was measured before
  python scripts/bench/model.py --quick             a fraction of every part, into .cache: shows that it runs
  python scripts/bench/model.py --gpu               the 8B layers, on a machine with a GPU; eight minutes at most
  python scripts/bench/model.py --gpu --small --device cpu
"""
HEAD = """# The model, measured

Against transformers: its SigLIP, Qwen3, Qwen2 and Llama for what must be the same, its Qwen2.5-VL at the same widths,
depth and tokens for speed. All of it again: `python scripts/bench/model.py`; one part: `--part NAME`; on a machine with
a GPU: `--gpu`. Without a GPU the part `gpu` stays as it was measured, or is named below as not measured: TFLOP/s, the
share of the matrix ceiling and the memory of the 8B layers, and the fused attention backends, cannot be had elsewhere.
Weights and tokens are random from fixed seeds; what is compared does not depend on what a model has learnt."""


def main() -> int:
    parser = arguments(__doc__, EXAMPLES, results="model")
    parser.add_argument("--part", nargs="*", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--gpu", action="store_true", help="the part that needs a GPU, and only that")
    parser.add_argument("--small", action="store_true", help="with --gpu: small shapes, which prove nothing")
    parser.add_argument("--device", default="cuda", help="with --gpu: cuda, or cpu with --small")
    args = parser.parse_args()
    args.quick |= args.gpu and args.small
    out = out_of(args).resolve()
    options = ["--out", str(out)]
    if args.gpu:
        options += ["--device", args.device, *(["--small"] if args.small else [])]
    elif args.quick:
        options.append("--quick")
    chosen = (GPU,) if args.gpu else args.part
    failed = run_parts({part: f"model_{part}" for part in chosen}, options)
    if out.is_dir():
        path = out.parent / "model.md" if out == RESULTS / "model" else out / "model.md"
        path.write_text(document(out, (*PARTS, GPU), HEAD), encoding="utf-8")
        print(f"\nwritten: {path}")
    if failed:
        again = "--gpu" if args.gpu else f"--part {' '.join(failed)}"
        print(f"error: {', '.join(failed)} failed, see above; run again with {again}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    run(main)
