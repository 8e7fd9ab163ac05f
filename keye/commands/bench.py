"""`keye bench`: draw SlowFastBench into a folder, or check that it is drawn as it was frozen."""

import argparse

EXAMPLES = """examples:
  keye bench bench                                             200 held-out questions of every family
  keye bench bench --split dev --families find order --each 40
  keye bench bench --slice length=16s,1min --slice height=144p,240p      short and small clips only
  keye bench bench --clips .cache/clips                        also the families on real clips
  keye bench bench --show bench.html --policy ladder           look at questions, events and plans
  keye bench --check                                           compare the questions with the frozen checksums
  keye bench --list                                            the families and what they need
"""


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add `keye bench` to the subcommands of `keye`."""
    parser = commands.add_parser(
        "bench",
        help="draw SlowFastBench, the benchmark of this project",
        description="Draw SlowFastBench v1: clips and a manifest of questions for keye evaluate. The same command "
        "continues an interrupted drawing.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", nargs="?", metavar="DIR", help="folder to write to")
    parser.add_argument(
        "--split", default="heldout", help="dev for choices, heldout (default) for results, train to learn from"
    )
    parser.add_argument(
        "--families", nargs="+", metavar="NAME", help="only these families (see --list); spaces or commas between"
    )
    parser.add_argument("--each", type=int, default=200, metavar="N", help="questions of a family (default 200)")
    parser.add_argument(
        "--slice",
        action="append",
        default=[],
        metavar="NAME=VALUE,…",
        help="only clips of a length (16s, 1min, 10min, 1h), height (144p … 1080p), motion (still, grain, pan, real) or"
        " load (light, medium, heavy)",
    )
    parser.add_argument("--clips", metavar="DIR", help="folder of the real clips, for the families real_…")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default one per core)")
    parser.add_argument("--check", action="store_true", help="compare all questions with the frozen checksums")
    parser.add_argument(
        "--show",
        metavar="HTML",
        help="write a page of the drawn questions: a clip of each family, its events and its plan",
    )
    parser.add_argument("--policy", metavar="NAME", help="of the plans of --show, as in keye encode")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="budget of the plans of --show")
    parser.add_argument("--list", action="store_true", help="print the families and stop")
    parser.set_defaults(call=call)


def call(args: argparse.Namespace) -> int:
    """Run the command; returns 0."""
    from keye.errors import ManifestError
    from keye.world import slowfastbench

    named = [name for text in args.families or [] for name in text.split(",") if name]
    families = named or list(slowfastbench.FAMILIES)
    if args.list:
        for name in families:
            print(f"{name:<12} {slowfastbench.row_of(name).needs}")
    elif args.check:
        for name in families:
            for split in ("dev", "heldout"):
                slowfastbench.check_frozen(name, split)
        print(f"{len(families)} families are drawn as frozen in SlowFastBench v{slowfastbench.VERSION}")
    elif not args.out:
        raise ManifestError("no folder is given; write keye bench DIR, or --check or --list")
    elif args.show:
        show(args, named)
    else:
        path = slowfastbench.write(
            args.out, args.split, named, args.each, parse_slices(args.slice), args.clips, args.workers
        )
        print(f"wrote {path}")
        if not args.clips and not named:
            print("without the families real_…, which need --clips")
    return 0


def show(args: argparse.Namespace, families: list[str]) -> None:
    """Write the page of `--show`; ManifestError if the folder is not drawn yet or has no such family."""
    from pathlib import Path

    from rich.progress import track

    from keye.encoder import SlowFastEncoder
    from keye.errors import ManifestError
    from keye.visualize.questions import clip_of, first_clips, write_questions
    from keye.world.manifest import read_manifest

    manifest = Path(args.out) / f"{args.split}.jsonl"
    if not manifest.is_file():
        raise ManifestError(f"{manifest} does not exist; draw it first: keye bench {args.out} --split {args.split}")
    rows = [row for row in read_manifest(manifest) if not families or row.get("family") in families]
    if not rows:
        raise ManifestError(f"{manifest} has no question of {', '.join(families)}; draw it first, without --show")
    given = {"policy": args.policy, "max_tokens": args.max_tokens}
    encoder = SlowFastEncoder(**{name: value for name, value in given.items() if value is not None})
    clips = first_clips(rows)
    plans = (encoder.plan(manifest.parent / str(clip_of(about[0]))) for about in clips)
    shown = zip(clips, plans, strict=True)
    write_questions(args.show, track(shown, "plans", total=len(clips), transient=True))
    print(f"wrote {args.show}")


def parse_slices(texts: list[str]) -> dict[str, list[str]]:
    """`["length=16s,1min"]` → {"length": ["16s", "1min"]}; ManifestError for anything else."""
    from keye.errors import ManifestError

    found: dict[str, list[str]] = {}
    for text in texts:
        name, sign, values = text.partition("=")
        if not sign or not values:
            raise ManifestError(f"--slice {text!r} is not understood; write it like length=16s,1min")
        found.setdefault(name.strip(), []).extend(value.strip() for value in values.split(","))
    return found
