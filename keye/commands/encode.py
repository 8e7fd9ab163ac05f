"""`keye encode`: plan videos, print their tokens, save plans, figures, pages and pixels."""

import argparse
import contextlib
import itertools
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from keye import errors
from keye.encoder_config import EncoderConfig
from keye.field_docs import field_docs, field_types
from keye.visualize.tables import print_facts, print_table, seconds

if TYPE_CHECKING:
    from keye.encoded import EncodedVideo
    from keye.encoder import SlowFastEncoder
    from keye.slowfast.plan import VideoPlan

OPTIONS = {
    "urls=UrlRules()": "--url",
    "give SlowFastEncoder a tower=, or attach() one": "use --model DIR, a model with a tower",
    "contains no images; give a folder of": "has neither videos nor images; give a folder of videos (.mp4, …) or of",
}
"""Parts of messages of errors → what they say on the command line."""
VIDEO_SUFFIXES = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif", ".mpg", ".mpeg", ".ts"}

EXAMPLES = """examples:
  keye encode clip.mp4                                 tokens of a clip
  keye encode clip.mp4 --frames --plot plan.png        every frame, and a figure of the plan
  keye encode clip.mp4 --html plan.html --start 1:30 --end 2:00
  keye encode clip.mp4 --policy adaptive_budget:tokens=8000
  keye encode videos/ --json plans/ --workers 4 --cache ~/.cache/keye
  keye encode frames/ --released --max-tokens 16000 --pixels clip.safetensors
  keye encode https://example.org/clip.mp4 --url
"""

SETTING_HELP = {
    "measure": "how frames are compared: MEASURES",
    "policy": "which frames are slow: POLICIES; options follow a colon, as in uniform:4, adaptive:max_gap=16,"
    " adaptive_budget:share=0.25 or two_stream:slow=10,fast_tokens=16",
}
SAMPLING_SETTINGS = ("fps", "max_frames")  # settings that are listed with the options of sampling
SAMPLING = ("start", "end", "num_frames")


class SettingsHelp(argparse.RawDescriptionHelpFormatter):
    """Inserts the names of measures and policies when help is shown, since importing them is slow."""

    def _get_help_string(self, action: argparse.Action) -> str:
        from keye.slowfast.measures import known_measures
        from keye.slowfast.policies import known_policies

        known = {"MEASURES": known_measures, "POLICIES": known_policies}
        return re.sub("MEASURES|POLICIES", lambda found: ", ".join(known[found[0]]()), action.help)


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add `keye encode` to the subcommands of `keye`."""
    parser = commands.add_parser(
        "encode",
        help="plan videos: slow and fast frames, and their tokens",
        description="Plan videos: which frames are slow, which are fast, and how many tokens each has.",
        epilog=EXAMPLES,
        formatter_class=SettingsHelp,
    )
    parser.add_argument("videos", nargs="+", metavar="VIDEO", help="a file, a folder of videos or of frames, or a URL")
    encoder = parser.add_argument_group("encoder")
    preset = encoder.add_mutually_exclusive_group()
    preset.add_argument("--released", action="store_true", help="the settings of keye-vl-utils 1.5.2")
    preset.add_argument("--report", action="store_true", help="the settings of the technical report")
    preset.add_argument("--model", metavar="DIR", help="the settings and the vision tower of a trained model")
    add_settings(encoder, [name for name in EncoderConfig.names() if name not in SAMPLING_SETTINGS])
    sampling = parser.add_argument_group("sampling")
    add_settings(sampling, SAMPLING_SETTINGS)
    sampling.add_argument(
        "--num-frames", type=int, metavar="N", help="sample N frames, spread evenly, instead of --fps"
    )
    sampling.add_argument("--start", type=_time, metavar="TIME", help="start here: seconds, or 1:30, or 1:02:03.5")
    sampling.add_argument("--end", type=_time, metavar="TIME", help="end here")
    sampling.add_argument("--url", action="store_true", help="download http(s) URLs, except from private addresses")
    output = parser.add_argument_group("output; PATH is a folder when there are several videos")
    output.add_argument("--frames", action="store_true", help="print a line for every frame")
    output.add_argument("--json", metavar="PATH", help="write the plan as JSON")
    output.add_argument("--plot", metavar="PATH", help="draw the plan (.png, .pdf or .svg)")
    output.add_argument("--html", metavar="PATH", help="write a page to step through the video frame by frame")
    output.add_argument("--pixels", metavar="PATH", help="write patches (and features) as safetensors")
    many = parser.add_argument_group("many videos")
    many.add_argument("--workers", type=int, metavar="N", help="processes (default: one per CPU core, at most 8)")
    many.add_argument("--max-seconds", type=float, metavar="X", help="stop a video that takes longer")
    many.add_argument("--max-memory", type=_bytes, metavar="N", help="stop a video that needs more bytes, as in 2G")
    many.add_argument("--cache", metavar="DIR", help="cache plans and pixels here, by content and settings")
    parser.set_defaults(call=encode)


def add_settings(group: argparse._ArgumentGroup, names: Iterable[str]) -> None:
    """Add an option for each of these fields of `EncoderConfig`, with its type and docstring."""
    metavars = {int: "N", float: "X", str: "NAME"}
    for name in names:
        kind, text = field_types(EncoderConfig)[name], field_docs(EncoderConfig)[name]
        text = SETTING_HELP.get(name, (text[0].lower() + text[1:]).rstrip(".")).replace("%", "%%")
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=metavars[kind], help=text)


def _time(text: str) -> float:
    """Seconds of "90", "1:30" or "1:02:03.5"."""
    match = re.fullmatch(r"(?:(?:(\d+):)?(\d+):)?(\d+(?:\.\d*)?)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time; give seconds, or 1:30, or 1:02:03.5")
    hours, minutes, rest = (float(part or 0) for part in match.groups())
    return 3600 * hours + 60 * minutes + rest


def _bytes(text: str) -> int:
    """A number of bytes: "500000000", "500M" or "2G", in powers of 1024."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)B?", text.replace("_", "").upper())
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of bytes; give one such as 500M or 2G")
    return round(float(match[1]) * 1024 ** " KMGT".index(match[2] or " "))


def make_encoder(arguments: argparse.Namespace) -> "SlowFastEncoder":
    """The encoder of the parsed arguments."""
    from keye.encoder import SlowFastEncoder
    from keye.video.fetch import UrlRules

    given = {name: getattr(arguments, name) for name in EncoderConfig.names() if getattr(arguments, name) is not None}
    if arguments.url:
        given["urls"] = UrlRules()
    if arguments.model:
        encoder = SlowFastEncoder.from_pretrained(arguments.model)
        return SlowFastEncoder(**{**encoder.settings, **given}, tower=encoder.tower) if given else encoder
    if arguments.released:
        return SlowFastEncoder.released(**given)
    return SlowFastEncoder.report(**given) if arguments.report else SlowFastEncoder(**given)


def encode(arguments: argparse.Namespace) -> int:
    """Plan every video. Unreadable ones are reported at the end, and the exit code is then 2."""
    from keye.batch.cache import Cache
    from keye.batch.workers import iter_many, progress_bar

    videos = [video for path in arguments.videos for video in _videos(path)]
    names = _names(videos)
    stems = _stems(videos, names)
    cache = Cache(arguments.cache) if arguments.cache else None
    began = time.perf_counter()
    running = iter_many(
        make_encoder(arguments),
        videos,
        workers=arguments.workers,
        cache=cache,
        pixels=bool(arguments.pixels or arguments.model),
        max_seconds=arguments.max_seconds,
        max_memory=arguments.max_memory,
        **{name: getattr(arguments, name) for name in SAMPLING if getattr(arguments, name) is not None},
    )
    results: list[_Result | None] = [None] * len(videos)
    failures = []
    progress = progress_bar(len(videos), len(videos) > 1 and sys.stderr.isatty())
    with contextlib.closing(running), progress as advance:
        for done in running:
            try:
                if done.failure:
                    done.failure.raise_()
                results[done.index] = _Result(
                    names[done.index], stems[done.index], done.result, arguments, len(videos) > 1
                )
            except errors.VideoError as error:
                failures.append((done.index, str(error).replace("urls=UrlRules()", "--url")))
            advance(done)
    took = [("took", f"{time.perf_counter() - began:.2f} s")]
    if cache is not None:
        damaged = f", {cache.rebuilt} were damaged" if cache.rebuilt else ""
        took.append(("cache", f"{cache.hits} of {cache.hits + cache.misses} were cached{damaged}"))
    if len(videos) == 1:
        for result in filter(None, results):
            print_facts([*result.facts, *took])
            result.print_frames()
    else:
        _print_all(results, names, took)
    for index, reason in sorted((index, in_options(reason)) for index, reason in failures):
        print(f"error: {reason if videos[index] in reason else f'{videos[index]}: {reason}'}", file=sys.stderr)
    if failures and len(videos) > 1:
        print(f"{len(failures)} of {len(videos)} videos could not be planned", file=sys.stderr)
    return 2 if failures else 0


def in_options(message: str) -> str:
    """An error's message with options of the command line instead of Python arguments."""
    for argument, option in OPTIONS.items():
        message = message.replace(argument, option)
    return message


def _videos(path: str) -> list[str]:
    """The videos in a folder, or the path itself: a file, a folder of frames, a URL, or something missing."""
    folder = Path(path)
    inside = folder.iterdir() if folder.is_dir() else ()
    return sorted(str(file) for file in inside if file.suffix.lower() in VIDEO_SUFFIXES) or [path]


def _names(videos: Sequence[str]) -> list[str]:
    """The name of each video in tables and of its outputs: its file name, or its path where file names repeat."""
    from keye.video.fetch import path_name

    count = Counter(Path(video).name for video in videos)
    names = [video if count[Path(video).name] > 1 or not Path(video).name else Path(video).name for video in videos]
    return [path_name(name) for name in names]


def _stems(videos: Sequence[str], names: Sequence[str]) -> list[str]:
    """The name of each video's output files without their suffix; another one for every other video."""
    stems: dict[str, str] = {}
    taken: set[str] = set()
    numbers: dict[str, Iterator[int]] = {}
    for video, name in dict(zip(videos, names, strict=True)).items():
        stem = plain = re.sub(r"[^\w.\- ()+,]+", "_", name).strip("_")[-150:] or "video"
        while stem in taken:
            stem = f"{plain}-{next(numbers.setdefault(plain, itertools.count(2)))}"
        taken.add(stem)
        stems[video] = stem
    return [stems[video] for video in videos]


class _Result:
    """What is printed about an encoded video when all are done; its files are written here, right away."""

    def __init__(
        self, name: str, stem: str, result: "VideoPlan | EncodedVideo", arguments: argparse.Namespace, several: bool
    ) -> None:
        plan = getattr(result, "plan", result)
        slow, fast = plan.counts
        self.name, self.warnings, self.tokens, self.duration = name, plan.warnings, plan.tokens, plan.duration
        self.row = [name, seconds(plan.duration), str(slow), str(fast), f"{plan.tokens:,}", f"{plan.saved:.0%}"]
        self.rows = plan.frame_rows() if arguments.frames else None
        self.facts = plan.facts()
        if getattr(result, "features", None) is not None:
            self.facts.append(("features", str(list(result.features.shape))))
        writers: dict[str, tuple[str, str, Callable[[Path], object]]] = {
            "json": ("plan", ".json", plan.save),
            "plot": ("figure", ".png", plan.plot),
            "html": ("page", ".html", plan.to_html),
            "pixels": ("pixels", ".safetensors", lambda path: _save_pixels(result, path)),
        }
        for option, (label, suffix, write) in writers.items():
            if target := getattr(arguments, option):
                path = _output(target, stem, suffix, several)
                _write(path, write)
                self.facts.append((label, str(path)))

    def print_frames(self) -> None:
        if self.rows is not None:
            print_table(("time", "frame", "type", "similarity", "size", "tokens"), self.rows, left=(2,))


def _print_all(results: Sequence[_Result | None], names: Sequence[str], took: list[tuple[str, str]]) -> None:
    """A row for every video, the total, then warnings and frames."""
    good = [result for result in results if result]
    rows = [
        [*result.row, str(len(result.warnings) or "")] if result else [name, "", "", "", "", "failed", ""]
        for result, name in zip(results, names, strict=True)
    ]
    total = [
        f"{len(good)} videos",
        seconds(sum(result.duration for result in good)),
        *(f"{sum(int(result.row[column]) for result in good)}" for column in (2, 3)),
        f"{sum(result.tokens for result in good):,}",
        "",
        str(sum(len(result.warnings) for result in good) or ""),
    ]
    print_table(("video", "duration", "slow", "fast", "tokens", "saved", "warnings"), rows, total=total)
    print_facts([*(("warning", f"{result.name}: {text}") for result in good for text in result.warnings), *took])
    for result in good:
        if result.rows is not None:
            print(f"\n{result.name}")
            result.print_frames()


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file; a path that cannot be written to ends the command, since every video would fail."""
    try:
        write(path)
    except errors.VideoError as error:
        if isinstance(error.__cause__, OSError):
            raise errors.KeyeError(str(error)) from error
        raise


def _save_pixels(encoded: "EncodedVideo", path: Path) -> None:
    from safetensors.torch import save_file

    tensors = {"pixel_values": encoded.pixel_values, "grid_thw": encoded.grid_thw}
    if encoded.features is not None:
        tensors["features"] = encoded.features
    with errors.writing(path, "the pixels"):
        save_file(tensors, path, metadata={"plan": encoded.plan.to_json()})


def _output(target: str, stem: str, suffix: str, several: bool) -> Path:
    """The output path: `target`, or the file `stem` + `suffix` in the folder `target`; creates folders."""
    path = Path(target)
    if several or path.is_dir():
        path = path / (stem + suffix)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise errors.KeyeError(
            f"the folder {path.parent} cannot be created ({error.strerror}); give another path"
        ) from error
    return path
