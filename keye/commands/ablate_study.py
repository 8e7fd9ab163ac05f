"""The study of `keye ablate`: its options, and what they run."""

import argparse
import shlex
import sys
from collections.abc import Sequence

from keye.commands.bench import parse_slices
from keye.errors import KeyeError

OUT = "runs/study"
BUDGETS = (512, 2048, 8192)
POLICIES = ("default", "released", "random", "uniform", "two_stream", "downsampled", "sparse", "all_slow")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a study."""
    study = parser.add_argument_group(
        "study", "settings at equal tokens on SlowFastBench; the same command continues an interrupted study"
    )
    study.add_argument("--benchmark", metavar="SPLIT", help="dev for choices, heldout for results, train")
    study.add_argument(
        "--policy",
        nargs="+",
        metavar="NAME",
        help="default, released, random, uniform, two_stream, downsampled, sparse, all_slow (all of these without the"
        " option), or policies such as ladder or adaptive:max_gap=8",
    )
    study.add_argument(
        "--budget", nargs="+", type=int, metavar="N", help=f"tokens of a clip (default: {' '.join(map(str, BUDGETS))})"
    )
    study.add_argument("--ratio", nargs="+", type=float, metavar="R", help="fast ratios")
    study.add_argument("--fps", nargs="+", type=float, metavar="N", help="frames per second")
    study.add_argument("--floor", nargs="+", type=int, metavar="N", help="fewest tokens of a frame")
    study.add_argument("--multiple", nargs="+", type=float, metavar="M", help="slow_multiple of a binding budget")
    study.add_argument(
        "--product",
        action="store_true",
        help="every combination of policies, thresholds, ratios, measures, … (without it: the default with one of them"
        " changed, at the middle budget)",
    )
    study.add_argument(
        "--slice",
        action="append",
        default=[],
        metavar="NAME=VALUE,…",
        help="only clips of a length, height, motion or load, as in keye bench",
    )
    study.add_argument("--clips", metavar="DIR", help="folder of the real clips, for the families real_…")
    study.add_argument("--no-observer", action="store_true", help="only --model answers, not the ideal observer")
    study.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")
    study.add_argument("--tables", metavar="DIR", help="write tables and figures from the predictions in DIR again")
    study.add_argument("--page", metavar="FILE", help="where to write the page of a study (default: ablation.md)")


def run_tables(args: argparse.Namespace) -> None:
    """`keye ablate --tables`."""
    from keye.evaluation.study import write_tables

    for path in write_tables(args.tables, args.out, args.page):
        print(f"wrote {path}")


def run_benchmark(args: argparse.Namespace, thresholds: Sequence[float], families: Sequence[str] | None) -> None:
    """`keye ablate --benchmark`."""
    from keye.evaluation.study import models_of, run_study, settings_of, split_specs, write_tables

    for name in ("manifest", "controls", "videos"):
        if getattr(args, name):
            raise KeyeError(f"--{name} does not go with --benchmark; leave it out")
    if args.workers is not None and args.workers < 0:
        raise KeyeError(f"--workers {args.workers} is below 0; give 0 to work in one process")
    if args.limit is not None and args.limit < 1:
        raise KeyeError(f"--limit {args.limit} is too small; give at least 1")
    factors = {"threshold": thresholds, "ratio": args.ratio, "measure": args.measure, "fps": args.fps,
               "floor": args.floor, "multiple": args.multiple}  # fmt: skip
    settings = settings_of(
        split_specs(args.policy) if args.policy else POLICIES,
        args.budget or BUDGETS,
        {name: values for name, values in factors.items() if values},
        args.product,
    )
    out = args.out or OUT
    run_study(
        out, args.benchmark, settings, families, parse_slices(args.slice), args.limit,
        models=models_of(args.model or ()), observer=not args.no_observer, real=args.clips, workers=args.workers,
        command=shlex.join(["keye", "ablate", *sys.argv[1:]]),
    )  # fmt: skip
    for path in write_tables(out, text=args.page):
        print(f"wrote {path}")
