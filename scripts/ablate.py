"""Sweep the threshold over clips, and over the held-out questions of a trained model: CSV, JSON and a picture.

python scripts/ablate.py --threshold 0.1:0.9:0.1 --videos DIR --out runs/ablation
python scripts/ablate.py --videos DIR --model runs/demo/annealing/model --manifest runs/demo/world/heldout.jsonl
"""

import argparse
import json
from pathlib import Path

from keye.encoder import SlowFastEncoder
from keye.errors import KeyeError, run
from keye.evaluation import ablation

SUFFIXES = {".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v", ".gif"}


def thresholds(text: str) -> list[float]:
    """`first:last:step`, both ends included, or a list with commas."""
    try:
        if ":" not in text:
            return [float(part) for part in text.split(",")]
        first, last, step = (float(part) for part in text.split(":"))
    except ValueError:
        raise KeyeError(
            f"--threshold {text} is not first:last:step (0.1:0.9:0.1) or a list (0.5,0.6); write one"
        ) from None
    if step <= 0 or last < first:
        raise KeyeError(f"--threshold {text} is empty; give first <= last and a step above 0")
    return [round(first + i * step, 6) for i in range(int((last - first) / step + 1e-6) + 1)]


def clips(places: list[str]) -> list[Path]:
    """The clips named, and those in the folders named."""
    found: list[Path] = []
    for place in map(Path, places):
        if place.is_dir():
            found += sorted(p for p in place.iterdir() if p.suffix.lower() in SUFFIXES)
        else:
            found.append(place)
    if not found:
        raise KeyeError(f"no clips in {', '.join(places)}; name files or a folder with some")
    return found


def accuracy_of(model_dir: str, manifest: str, families: list[str] | None, limit: int | None):
    """threshold → (accuracy, standard error, questions) of the model on the manifest's questions about videos."""
    from evaluate import load

    from keye import KeyeProcessor
    from keye.evaluation import evaluate
    from keye.world import read_manifest

    # A still costs the same at every threshold. A bad line is said before a model is loaded.
    about = dict.fromkeys(sample["family"] for sample in read_manifest(manifest) if '"video"' in json.dumps(sample))
    families = families or list(about)
    model, own = load(model_dir)

    def measure(threshold: float) -> tuple[float, float, int]:
        processor = KeyeProcessor(own.tokenizer, {**own.encoder, "threshold": threshold}, own.image, own.chat_template)
        score = evaluate(model, processor, manifest, families, limit).overall
        return score.accuracy, score.stderr, score.n

    return measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threshold", default="0.1:0.9:0.1", help="first:last:step or a list with commas")
    parser.add_argument("--videos", nargs="+", required=True, help="clips or folders of clips")
    parser.add_argument("--out", default="runs/ablation", help="where to write")
    parser.add_argument("--measure", default="patch_l1", help="how frames are compared")
    parser.add_argument("--max-tokens", type=int, default=65_536, help="budget of a clip")
    parser.add_argument("--max-tokens-per-frame", type=int, default=768)
    parser.add_argument("--max-frames", type=int, default=120, help="frames of a clip that are looked at")
    parser.add_argument("--model", help="a trained model's directory; its accuracy is measured, too")
    parser.add_argument("--manifest", help="held-out questions for --model")
    parser.add_argument("--families", help="only these, with commas")
    parser.add_argument("--limit", type=int, help="at most so many questions of each family")
    args = parser.parse_args()
    if bool(args.model) != bool(args.manifest):
        raise KeyeError("--model and --manifest go together; give both or neither")
    settings = {
        "measure": args.measure,
        "max_tokens": args.max_tokens,
        "max_tokens_per_frame": args.max_tokens_per_frame,
        "max_frames": args.max_frames,
    }
    measure = None
    if args.model:
        measure = accuracy_of(args.model, args.manifest, args.families and args.families.split(","), args.limit)
    rows, details = ablation.sweep(clips(args.videos), thresholds(args.threshold), settings, measure)
    default = SlowFastEncoder(measure=args.measure).threshold
    ablation.save(args.out, rows, details, {**settings, "default_threshold": default})
    print(f"written: {args.out}/ablation.csv, ablation.json and ablation.png")


if __name__ == "__main__":
    run(main)
