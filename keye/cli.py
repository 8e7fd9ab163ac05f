"""The `keye` command: one subcommand per thing that needs no training."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from keye import errors

VIDEO_SUFFIXES = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif", ".mpg", ".mpeg", ".ts"}


def build_parser() -> argparse.ArgumentParser:
    """The parser; each subcommand sets `call`, a function of the parsed arguments that returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="keye", description="Adaptive slow-fast video encoding and what is built on it."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    add_encode(commands)
    return parser


def add_encode(commands: argparse._SubParsersAction) -> None:
    """`keye encode`: plan videos, print what they cost, save plans and pictures."""
    parser = commands.add_parser(
        "encode",
        help="plan a video: which frames are slow, which fast, what it costs",
        description="Plan videos: which frames are slow, which fast, and how many tokens each costs.",
    )
    parser.add_argument("videos", nargs="+", metavar="VIDEO", help="a file, or a folder of videos or of frames")
    preset = parser.add_mutually_exclusive_group()
    preset.add_argument("--released", action="store_true", help="the settings of keye-vl-utils 1.5.2")
    preset.add_argument("--report", action="store_true", help="the settings of the technical report")
    preset.add_argument("--model", metavar="DIR", help="the settings and the vision tower of a trained model")
    parser.add_argument("--measure", help="patch_l1, patch_cosine or ssim")
    parser.add_argument("--threshold", type=float, help="slow below this similarity with the latest slow frame")
    parser.add_argument("--policy", help="adaptive, all_slow or uniform:N")
    parser.add_argument("--fast-ratio", type=float, help="tokens of a fast frame as a share of a slow one's")
    parser.add_argument("--max-tokens", type=int, help="budget of a whole video")
    parser.add_argument("--min-tokens-per-frame", type=int)
    parser.add_argument("--max-tokens-per-frame", type=int)
    parser.add_argument("--fps", type=float, help="frames sampled per second")
    parser.add_argument("--max-frames", type=int, help="at most so many frames, spread evenly")
    parser.add_argument("--frames", action="store_true", help="print a line for every frame")
    parser.add_argument("--json", metavar="PATH", help="save the plan; a folder when there are several videos")
    parser.add_argument("--plot", metavar="PATH", help="draw the plan; a folder when there are several videos")
    parser.add_argument(
        "--pixels", metavar="PATH", help="save patches (and features) as safetensors; a folder likewise"
    )
    parser.set_defaults(call=encode)


SETTINGS = (
    "measure",
    "threshold",
    "policy",
    "fast_ratio",
    "max_tokens",
    "min_tokens_per_frame",
    "max_tokens_per_frame",
    "fps",
    "max_frames",
)


def make_encoder(arguments: argparse.Namespace):
    """The SlowFastEncoder that the arguments describe."""
    from keye.encoder import SlowFastEncoder

    given = {name: getattr(arguments, name) for name in SETTINGS if getattr(arguments, name) is not None}
    if arguments.model:
        encoder = SlowFastEncoder.from_pretrained(arguments.model)
        return SlowFastEncoder(**{**encoder.settings, **given}, tower=encoder.tower) if given else encoder
    make = SlowFastEncoder.released if arguments.released else SlowFastEncoder
    return (SlowFastEncoder.report if arguments.report else make)(**given)


def encode(arguments: argparse.Namespace) -> int:
    """Plan every video; a video that cannot be read is reported and makes the exit code 2, the others go on."""
    encoder = make_encoder(arguments)
    videos = [video for given in arguments.videos for video in _videos(given)]
    failures = 0
    for number, video in enumerate(videos):
        try:
            _encode_one(encoder, video, arguments, len(videos) > 1)
        except errors.VideoError as error:
            failures += 1
            print(f"error: {error}", file=sys.stderr)
        if number + 1 < len(videos):
            print()
    if failures and len(videos) > 1:
        print(f"{failures} of {len(videos)} videos could not be planned", file=sys.stderr)
    return 2 if failures else 0


def _videos(given: str) -> list[str]:
    """The videos in a folder, or the thing itself: a file, a folder of frames, or something missing (named later)."""
    path = Path(given)
    inside = (
        sorted(str(file) for file in path.iterdir() if file.suffix.lower() in VIDEO_SUFFIXES) if path.is_dir() else []
    )
    return inside or [given]


def _encode_one(encoder, video: str, arguments: argparse.Namespace, several: bool) -> None:
    start = time.perf_counter()
    encoded = encoder(video) if arguments.pixels or arguments.model else None
    plan = encoded.plan if encoded else encoder.plan(video)
    seconds = time.perf_counter() - start
    print(plan.summary())
    if encoded and encoded.features is not None:
        print(f"{'features':<8} {list(encoded.features.shape)}")
    print(f"{'took':<8}{seconds:.2f} s")
    if arguments.frames:
        print(plan.frame_table())
    if arguments.json:
        plan.save(path := _output(arguments.json, video, ".json", several))
        print(f"{'plan':<8}{path}")
    if arguments.plot:
        plan.plot(path := _output(arguments.plot, video, ".png", several))
        print(f"{'figure':<8}{path}")
    if arguments.pixels:
        from safetensors.torch import save_file

        tensors = {"pixel_values": encoded.pixel_values, "grid_thw": encoded.grid_thw}
        if encoded.features is not None:
            tensors["features"] = encoded.features
        path = _output(arguments.pixels, video, ".safetensors", several)
        save_file(tensors, path, metadata={"plan": plan.to_json()})
        print(f"{'pixels':<8}{path}")


def _output(given: str, video: str, suffix: str, several: bool) -> Path:
    """Where to write: the path as given, or a file named after the video in the folder given; folders are made."""
    path = Path(given)
    if several or path.is_dir():
        path = path / (Path(video).name + suffix)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `keye`; the entry point of the installed command."""
    parsed = build_parser().parse_args(arguments)
    try:
        return parsed.call(parsed)
    except errors.KeyeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: interrupted by the user", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
