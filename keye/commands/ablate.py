"""Compare settings of the encoder: a sweep of the threshold over clips, or a study on SlowFastBench.

A sweep (--videos) measures tokens and detail of your clips, and the accuracy of a trained model. A study (--benchmark)
compares policies, budgets, measures, thresholds, ratios and rates at equal tokens, by the answers of an ideal observer
and of trained models. Results are written as they are measured, and the same command continues an interrupted run.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from keye.checks import fraction
from keye.commands.ablate_study import add_options, run_benchmark, run_tables
from keye.commands.encode import VIDEO_SUFFIXES
from keye.encoder import SlowFastEncoder
from keye.errors import KeyeError, run
from keye.evaluation import CONTROLS, Control, Report, ablation
from keye.slowfast.measures import get_measure

EXAMPLES = """examples:
  keye ablate --videos clips
  keye ablate --videos a.mp4 b.mp4 --threshold 0.1:0.9:0.1 --out runs/ablation
  keye ablate --videos clips --measure patch_cosine --threshold 0.5,0.8:0.98:0.02
  keye ablate --videos clips --model runs/demo/annealing/model --manifest runs/demo/world/heldout.jsonl
  keye ablate --benchmark dev                                          all policies at three budgets
  keye ablate --benchmark dev --families find order --slice length=1min --limit 40 --out runs/study
  keye ablate --benchmark dev --policy default ladder random uniform downsampled --budget 512 2048
  keye ablate --benchmark dev --policy default --threshold 0.2:0.8:0.2 --ratio 0.1 0.3 --measure mse lab --budget 2048
  keye ablate --benchmark dev --policy default random --model default=RUN1 default=RUN2 random=RUN3 random=RUN4
  keye ablate --tables runs/study                                      tables and figures from saved predictions
"""
RANGE = "0.1:0.9:0.1"
DIGITS = 6  # of thresholds, to which they are rounded
STEP = 10**-DIGITS


def thresholds(text: str) -> list[float]:
    """Numbers and ranges `first:last:step` (both ends included) with commas between them, in ascending order."""
    found: set[float] = set()
    for part in text.split(","):
        try:
            numbers = [float(number) for number in part.split(":")]
            first, last, step = numbers if ":" in part else (*numbers, *numbers, 1.0)
        except ValueError:
            raise KeyeError(
                f"--threshold {text} is not first:last:step (0.1:0.9:0.1) or a list (0.5,0.6); write one"
            ) from None
        first, last = fraction("--threshold", first), fraction("--threshold", last)
        if not (step >= STEP and last >= first):
            raise KeyeError(f"--threshold {text} is empty; give first <= last and a step of {STEP} or more")
        found |= {round(first + i * step, DIGITS) for i in range(int((last - first) / step + 1e-6) + 1)}
    return sorted(found)


def clips(places: list[str]) -> list[Path]:
    """The clips and the clips in folders of `places`."""
    found: list[Path] = []
    for place in map(Path, places):
        if place.is_dir():
            found += sorted(p for p in place.iterdir() if p.suffix.lower() in VIDEO_SUFFIXES)
        else:
            found.append(place)
    if not found:
        raise KeyeError(f"no clips in {', '.join(places)}; name files or a folder with some")
    return found


def accuracy_of(
    model_dir: str, manifest: str, families: list[str] | None, limit: int | None, measure: str | None
) -> tuple[Callable[..., Report], str]:
    """(threshold, control → the model's report on the manifest's questions about videos; the measure's name).

    measure: how frames are compared; None takes the model's own.
    """
    from keye import KeyeProcessor
    from keye.commands.evaluate import load
    from keye.evaluation import evaluate
    from keye.world import read_manifest

    # Stills cost the same at every threshold. A bad line is reported before the model is loaded.
    about_videos = dict.fromkeys(
        sample["family"] for sample in read_manifest(manifest) if '"video"' in json.dumps(sample)
    )
    families = families or list(about_videos)
    model, own = load(model_dir)
    encoder = {**own.encoder, "measure": measure or own.encoder["measure"]}

    def ask(threshold: float, control: Control = "none") -> Report:
        processor = KeyeProcessor(own.tokenizer, {**encoder, "threshold": threshold}, own.image, own.chat_template)
        return evaluate(model, processor, manifest, families, limit, control)

    return ask, encoder["measure"]


def stamp(path: str) -> list:
    """Path, sizes and modification times of a file, or of a model directory's weights, to notice a change."""
    files = sorted(Path(path).glob("*.safetensors")) if Path(path).is_dir() else [Path(path)]
    return [str(Path(path).absolute()), *([f.stat().st_size, f.stat().st_mtime_ns] for f in files)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--threshold",
        help=f"thresholds: first:last:step and numbers, separated by commas (default of a sweep: {RANGE})",
    )
    parser.add_argument("--videos", nargs="+", help="clips or folders of clips, for a sweep")
    parser.add_argument("--out", help="folder for the results (default: runs/ablation, or runs/study)")
    parser.add_argument(
        "--measure",
        nargs="+",
        metavar="NAME",
        help="how frames are compared (default: the model's, or change): patch_cosine, ssim, …; several in a study",
    )
    parser.add_argument(
        "--max-tokens", type=int, default=65_536, metavar="N", help="token budget of a clip (default: %(default)s)"
    )
    parser.add_argument(
        "--max-tokens-per-frame",
        type=int,
        default=768,
        metavar="N",
        help="maximum tokens per frame (default: %(default)s)",
    )
    parser.add_argument(
        "--max-frames", type=int, default=120, metavar="N", help="maximum frames per clip (default: %(default)s)"
    )
    parser.add_argument(
        "--model",
        nargs="+",
        metavar="DIR",
        help="also measure the accuracy of this model; in a study of several, POLICY=DIR for a model trained with a"
        " policy, and several of one policy for several seeds",
    )
    parser.add_argument("--manifest", metavar="FILE", help="held-out questions for --model of a sweep")
    parser.add_argument("--families", nargs="+", metavar="NAME", help="only these families")
    parser.add_argument(
        "--controls",
        nargs="*",
        choices=tuple(CONTROLS),
        metavar="NAME",
        help=f"also ask under these controls at every threshold; without a name, all: {', '.join(CONTROLS)}",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="at most N questions of each family")
    add_options(parser)
    args = parser.parse_args()
    modes = [f"--{name}" for name in ("videos", "benchmark", "tables") if getattr(args, name)]
    if len(modes) != 1:
        raise KeyeError(f"{' and '.join(modes) or 'nothing'} is given; give one of --videos, --benchmark and --tables")
    if args.tables:
        run_tables(args)
        return
    families = [name for text in args.families for name in text.split(",")] if args.families else None
    for name in args.measure or ():
        get_measure(name)
    if args.benchmark:
        run_benchmark(args, thresholds(args.threshold) if args.threshold else (), families)
    else:
        run_sweep(args, families)


def run_sweep(args: argparse.Namespace, families: list[str] | None) -> None:
    """`keye ablate --videos`."""
    for name in ("policy", "budget", "ratio", "fps", "floor", "multiple", "product", "slice", "clips", "page"):
        if getattr(args, name):
            raise KeyeError(f"--{name} is for a study; give --benchmark instead of --videos, or leave it out")
    if len(args.model or ()) > 1 or len(args.measure or ()) > 1:
        raise KeyeError("a sweep takes one --model and one --measure; give one, or --benchmark for a study")
    model, measure = (values[0] if values else None for values in (args.model, args.measure))
    if bool(model) != bool(args.manifest):
        raise KeyeError("--model and --manifest go together; give both or neither")
    controls = tuple(CONTROLS) if args.controls == [] else tuple(args.controls or ())
    if controls and not model:
        raise KeyeError("--controls needs --model and --manifest; give them, or leave it out")
    wanted, videos = thresholds(args.threshold or RANGE), clips(args.videos)
    name, ask, asked, out = measure or SlowFastEncoder().measure.name, None, None, args.out or "runs/ablation"
    if model:
        ask, name = accuracy_of(model, args.manifest, families, args.limit, measure)
        asked = {"model": stamp(model), "manifest": stamp(args.manifest), "families": families}
        asked |= {"limit": args.limit, "measure": name}
        asked |= {"controls": list(controls)} if controls else {}
    settings = {
        "measure": name,
        "max_tokens": args.max_tokens,
        "max_tokens_per_frame": args.max_tokens_per_frame,
        "max_frames": args.max_frames,
    }
    default = SlowFastEncoder(**settings).threshold
    rows, details = ablation.sweep(videos, wanted, settings, ask, out, asked, controls=controls)
    ablation.save(out, rows, details, {**settings, "default_threshold": default})
    for row in rows:
        print(ablation.line(row))
    print(f"wrote {out}/ablation.csv, ablation.json and ablation.png")


if __name__ == "__main__":
    run(main)
