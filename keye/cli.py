"""The `keye` command: encode, chat and serve, and the commands that entry points of `keye.commands` add."""

import argparse
import contextlib
import importlib
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from keye import errors
from keye.encoder_config import EncoderConfig
from keye.field_docs import field_docs, field_types
from keye.visualize.tables import print_facts, print_table, seconds

VIDEO_SUFFIXES = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif", ".mpg", ".mpeg", ".ts"}

EXAMPLES = """examples:
  keye encode clip.mp4                                 what it costs
  keye encode clip.mp4 --frames --plot plan.png        every frame, and a picture of the plan
  keye encode clip.mp4 --html plan.html --start 1:30 --end 2:00
  keye encode clip.mp4 --policy adaptive_budget:tokens=8000
  keye encode videos/ --json plans/ --workers 4 --cache ~/.cache/keye
  keye encode frames/ --released --max-tokens 16000 --pixels clip.safetensors
  keye encode https://example.org/clip.mp4 --url
"""


CHAT_EXAMPLES = """examples:
  keye chat runs/demo/gspo/model clip.mp4                      a conversation about a clip
  keye chat MODEL clip.mp4 --ask "What happens first?"         one answer, for scripts
  keye chat MODEL a.mp4 b.png --ask "Which is older?" --think --json
  keye chat MODEL --system "Answer in French." --temperature 0.7
"""

SERVE_EXAMPLES = """examples:
  keye serve runs/demo/gspo/model                              http://127.0.0.1:8000/v1, clips inside of requests
  keye serve MODEL --media-root videos                         requests may name files in this folder
  keye serve MODEL --url --max-bytes 100_000_000               and public http(s) URLs
  KEYE_API_KEY=… keye serve MODEL --host 0.0.0.0               other machines, with a key
"""

SETTING_HELP = {
    "measure": "how frames are compared: MEASURES",
    "policy": "who is slow: POLICIES; options after a colon, as in uniform:4, adaptive:max_gap=16,"
    " adaptive_budget:share=0.25 or two_stream:slow=10,fast_tokens=16",
}
SAMPLED = ("fps", "max_frames")  # settings that are listed with the options of sampling


class _Help(argparse.RawDescriptionHelpFormatter):
    """Help that looks up known names when it is shown: importing them takes longer than all the rest."""

    def _get_help_string(self, action: argparse.Action) -> str:
        from keye.slowfast.measures import known_measures
        from keye.slowfast.policies import known_policies

        known = {"MEASURES": known_measures, "POLICIES": known_policies}
        return re.sub("MEASURES|POLICIES", lambda found: ", ".join(known[found[0]]()), action.help)


COMMANDS = "keye.commands"
"""Entry points: commands with a parser of their own, such as those of `stages` and `rl`, which keye does not import."""


def further_commands() -> dict[str, EntryPoint]:
    """Name → the `main` of every installed command beside those below."""
    return {point.name: point for point in entry_points(group=COMMANDS)}


def build_parser() -> argparse.ArgumentParser:
    """The parser; each subcommand sets `call`, a function of the parsed arguments that returns the exit code."""
    more = ", ".join(sorted(further_commands()))
    parser = argparse.ArgumentParser(
        prog="keye",
        description="Adaptive slow-fast video encoding and what is built on it.",
        epilog=f"further commands, each with --help: {more}" if more else None,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    add_encode(commands)
    add_chat(commands)
    add_serve(commands)
    return parser


def add_encode(commands: argparse._SubParsersAction) -> None:
    """`keye encode`: plan videos, print what they cost, save plans, pictures and pixels."""
    parser = commands.add_parser(
        "encode",
        help="plan a video: which frames are slow, which fast, what it costs",
        description="Plan videos: which frames are slow, which fast, and how many tokens each costs.",
        epilog=EXAMPLES,
        formatter_class=_Help,
    )
    parser.add_argument("videos", nargs="+", metavar="VIDEO", help="a file, a folder of videos or of frames, or a URL")
    encoder = parser.add_argument_group("the encoder")
    preset = encoder.add_mutually_exclusive_group()
    preset.add_argument("--released", action="store_true", help="the settings of keye-vl-utils 1.5.2")
    preset.add_argument("--report", action="store_true", help="the settings of the technical report")
    preset.add_argument("--model", metavar="DIR", help="the settings and the vision tower of a trained model")
    _add_settings(encoder, [name for name in EncoderConfig.names() if name not in SAMPLED])
    sampling = parser.add_argument_group("which frames are looked at")
    _add_settings(sampling, SAMPLED)
    sampling.add_argument("--num-frames", type=int, metavar="N", help="so many, spread evenly, whatever the length")
    sampling.add_argument("--start", type=_time, metavar="TIME", help="from here on: seconds, or 1:30, or 1:02:03.5")
    sampling.add_argument("--end", type=_time, metavar="TIME", help="up to here")
    sampling.add_argument("--url", action="store_true", help="download http(s) URLs, though not from private addresses")
    output = parser.add_argument_group("what is written; PATH is a folder when there are several videos")
    output.add_argument("--frames", action="store_true", help="print a line for every frame")
    output.add_argument("--json", metavar="PATH", help="the plan")
    output.add_argument("--plot", metavar="PATH", help="a picture of the plan (.png, .pdf or .svg)")
    output.add_argument("--html", metavar="PATH", help="a page to look along the video, frame by frame")
    output.add_argument("--pixels", metavar="PATH", help="patches (and features) as safetensors")
    many = parser.add_argument_group("many videos")
    many.add_argument("--workers", type=int, metavar="N", help="processes (default: one per processor, at most 8)")
    many.add_argument("--max-seconds", type=float, metavar="X", help="give a video up that takes longer")
    many.add_argument("--max-memory", type=_bytes, metavar="N", help="give a video up that needs more bytes, as in 2G")
    many.add_argument("--cache", metavar="DIR", help="remember plans and pixels here, by content and settings")
    parser.set_defaults(call=encode)


def _add_settings(group: argparse._ArgumentGroup, names: Iterable[str]) -> None:
    """An option for each of these fields of `EncoderConfig`, with its type and docstring."""
    metavars = {int: "N", float: "X", str: "NAME"}
    for name in names:
        kind, text = field_types(EncoderConfig)[name], field_docs(EncoderConfig)[name]
        text = SETTING_HELP.get(name, (text[0].lower() + text[1:]).rstrip(".")).replace("%", "%%")
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=metavars[kind], help=text)


def add_chat(commands: argparse._SubParsersAction) -> None:
    """`keye chat`: ask a model about clips and images."""
    parser = commands.add_parser(
        "chat",
        help="ask a model about clips and images",
        description="Talk with a model about clips and images; /help in the conversation lists its commands.",
        epilog=CHAT_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_model(parser)
    parser.add_argument("media", nargs="*", metavar="CLIP", help="clips and images that the first question is about")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--think", dest="thinking", action="store_const", const=True, help="ask for a thought first")
    mode.add_argument("--no-think", dest="thinking", action="store_const", const=False, help="ask for none")
    parser.add_argument("--system", metavar="TEXT", help="the system prompt")
    parser.add_argument("--max-new-tokens", type=int, default=1024, metavar="N", help="of one answer (1024)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0, the default, draws nothing")
    parser.add_argument("--ask", action="append", metavar="QUESTION", help="answer this and leave; may be repeated")
    parser.add_argument("--json", action="store_true", help="with --ask: one line of JSON for each answer")
    parser.add_argument("--url", action="store_true", help="download http(s) URLs, though not from private addresses")
    parser.set_defaults(call=_with_model("keye.inference.terminal", "chat"))


def add_serve(commands: argparse._SubParsersAction) -> None:
    """`keye serve`: a model behind an OpenAI-compatible address."""
    parser = commands.add_parser(
        "serve",
        help="a model behind an OpenAI-compatible address",
        description="Answer POST /v1/chat/completions, streamed or whole, with image_url and video_url parts.",
        epilog=SERVE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_model(parser)
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen at (127.0.0.1: this machine alone)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (8000)")
    parser.add_argument("--name", metavar="NAME", help="what the model is called in requests (its directory)")
    parser.add_argument("--media-root", metavar="DIR", help="requests may name files in this folder; without it none")
    parser.add_argument("--url", action="store_true", help="requests may name http(s) URLs of public addresses")
    parser.add_argument(
        "--api-key", metavar="KEY", help="requests must send it; other users see it in `ps`: better set KEYE_API_KEY"
    )
    parser.add_argument("--api-key-file", metavar="FILE", help="a file that holds the key, in place of --api-key")
    parser.add_argument("--max-bytes", type=int, default=1 << 26, metavar="N", help="of one clip or image (64 MiB)")
    parser.add_argument("--max-new-tokens", type=int, default=4096, metavar="N", help="most of one answer (4096)")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="requests answered side by side (8)")
    parser.add_argument("--queue", type=int, default=16, metavar="N", help="requests that may wait; more get 429 (16)")
    parser.set_defaults(call=_with_model("keye.inference.serve", "serve"))


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a model directory")
    parser.add_argument("--device", default="auto", metavar="D", help="cpu, cuda, cuda:1 (the GPU if there is one)")
    parser.add_argument("--dtype", default="auto", metavar="T", help="float32, bfloat16 or float16 (as saved)")


def _with_model(module: str, name: str) -> Callable[[argparse.Namespace], int]:
    """A command that needs transformers, which is loaded only when it is called."""

    def call(arguments: argparse.Namespace) -> int:
        try:
            command = getattr(importlib.import_module(module), name)
        except ModuleNotFoundError as error:
            if error.name != "transformers":
                raise
            reason = "a model needs transformers, which is not installed: pip install 'keye[model]'"
            raise errors.KeyeError(reason) from error
        return command(arguments)

    return call


def _time(text: str) -> float:
    """Seconds of "90", "1:30" or "1:02:03.5"."""
    match = re.fullmatch(r"(?:(?:(\d+):)?(\d+):)?(\d+(?:\.\d*)?)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no time; give seconds, or 1:30, or 1:02:03.5")
    hours, minutes, rest = (float(part or 0) for part in match.groups())
    return 3600 * hours + 60 * minutes + rest


def _bytes(text: str) -> int:
    """A number of bytes: "500000000", "500M" or "2G", in powers of 1024."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)B?", text.replace("_", "").upper())
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of bytes; give one such as 500M or 2G")
    return round(float(match[1]) * 1024 ** ("KMGT".index(match[2]) + 1)) if match[2] else round(float(match[1]))


SAMPLING = ("start", "end", "num_frames")


def make_encoder(arguments: argparse.Namespace):
    """The SlowFastEncoder that the arguments describe."""
    from keye.encoder import SlowFastEncoder
    from keye.video.fetch import UrlRules

    given = {name: getattr(arguments, name) for name in EncoderConfig.names() if getattr(arguments, name) is not None}
    if arguments.url:
        given["urls"] = UrlRules()
    if arguments.model:
        encoder = SlowFastEncoder.from_pretrained(arguments.model)
        return SlowFastEncoder(**{**encoder.settings, **given}, tower=encoder.tower) if given else encoder
    make = SlowFastEncoder.released if arguments.released else SlowFastEncoder
    return (SlowFastEncoder.report if arguments.report else make)(**given)


def encode(arguments: argparse.Namespace) -> int:
    """Plan every video; one that cannot be read is reported at the end and makes the exit code 2, the others go on."""
    from keye.batch.cache import Cache
    from keye.batch.workers import iter_many, progress_bar

    videos = [video for given in arguments.videos for video in _videos(given)]
    names = _names(videos)
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
    shown, failures = [None] * len(videos), []
    progress = progress_bar(len(videos), len(videos) > 1 and sys.stderr.isatty())
    with contextlib.closing(running), progress as advance:
        for done in running:
            try:
                if done.failure:
                    done.failure.raise_()
                shown[done.index] = _Shown(names[done.index], done.result, arguments, len(videos) > 1)
            except errors.VideoError as error:
                failures.append((done.index, str(error).replace("urls=UrlRules()", "--url")))
            advance(done)
    took = [("took", f"{time.perf_counter() - began:.2f} s")]
    if cache is not None:
        damaged = f", {cache.rebuilt} were damaged" if cache.rebuilt else ""
        took.append(("cache", f"{cache.hits} of {cache.hits + cache.misses} were there{damaged}"))
    if len(videos) == 1:
        for one in filter(None, shown):
            print_facts([*one.facts, *took])
            one.print_frames()
    else:
        _print_all(shown, names, took)
    for index, reason in sorted(failures):
        print(f"error: {reason if videos[index] in reason else f'{videos[index]}: {reason}'}", file=sys.stderr)
    if failures and len(videos) > 1:
        print(f"{len(failures)} of {len(videos)} videos could not be planned", file=sys.stderr)
    return 2 if failures else 0


def _videos(given: str) -> list[str]:
    """The videos in a folder, or the thing itself: a file, a folder of frames, a URL, or something missing."""
    path = Path(given)
    inside = (
        sorted(str(file) for file in path.iterdir() if file.suffix.lower() in VIDEO_SUFFIXES) if path.is_dir() else []
    )
    return inside or [given]


def _names(videos: Sequence[str]) -> list[str]:
    """What to call each video and what is written about it: its file's name, or the whole path if that is not one."""
    twice = Counter(Path(video).name for video in videos)
    names = [video if twice[Path(video).name] > 1 or not Path(video).name else Path(video).name for video in videos]
    from keye.video.fetch import path_name

    return [path_name(name) for name in names]


class _Shown:
    """What is kept of one encoded video to be printed when all are done; its files are written at once."""

    def __init__(self, name: str, result: object, arguments: argparse.Namespace, several: bool):
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
        for option, (what, suffix, write) in writers.items():
            if given := getattr(arguments, option):
                path = _output(given, name, suffix, several)
                _written(path, write)
                self.facts.append((what, str(path)))

    def print_frames(self) -> None:
        if self.rows is not None:
            print_table(("time", "frame", "type", "similarity", "size", "tokens"), self.rows, left=(2,))


def _print_all(shown: Sequence[_Shown | None], names: Sequence[str], took: list[tuple[str, str]]) -> None:
    """A row for every video, their sum, then warnings and frames."""
    good = [one for one in shown if one]
    rows = []
    for one, name in zip(shown, names, strict=True):
        count = len(one.warnings) if one else 0
        rows.append([*one.row, str(count or "")] if one else [name, "", "", "", "", "failed", ""])
    total = [
        f"{len(good)} videos",
        seconds(sum(one.duration for one in good)),
        *(f"{sum(int(one.row[column]) for one in good)}" for column in (2, 3)),
        f"{sum(one.tokens for one in good):,}",
        "",
        str(sum(len(one.warnings) for one in good) or ""),
    ]
    print_table(("video", "duration", "slow", "fast", "tokens", "saved", "warnings"), rows, total=total)
    print_facts([*(("warning", text) for one in good for text in one.warnings), *took])
    for one in good:
        if one.rows is not None:
            print(f"\n{one.name}")
            one.print_frames()


def _written(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file; where that cannot be it is no fault of the video's, so the command ends."""
    try:
        write(path)
    except errors.VideoError as error:
        if isinstance(error.__cause__, OSError):
            raise errors.KeyeError(str(error)) from error
        raise


def _save_pixels(encoded: object, path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {"pixel_values": encoded.pixel_values, "grid_thw": encoded.grid_thw}
    if encoded.features is not None:
        tensors["features"] = encoded.features
    with errors.writing(path, "the pixels"):
        try:
            save_file(tensors, path, metadata={"plan": encoded.plan.to_json()})
        except SafetensorError as error:  # its own kind of error, also for a path that cannot be written to
            raise OSError(str(error)) from error


def _output(given: str, name: str, suffix: str, several: bool) -> Path:
    """Where to write: the path as given, or a file named after the video in the folder given; folders are made."""
    path = Path(given)
    if several or path.is_dir():
        path = path / (re.sub(r"[^\w.\- ()+,]+", "_", name).strip("_")[-150:] + suffix)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise errors.KeyeError(f"the folder {path.parent} cannot be made ({error.strerror}); give another") from error
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `keye`; the entry point of the installed command."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    further = further_commands() if arguments else {}
    if arguments and arguments[0] in further:
        sys.argv = [f"keye {arguments[0]}", *arguments[1:]]
        errors.run(further[arguments[0]].load())
    known = ("encode", "chat", "serve", *sorted(further))
    if arguments and not arguments[0].startswith("-") and arguments[0] not in known:
        print(
            f"error: {arguments[0]} is no command; use one of {', '.join(known)}. If a command of the guides is "
            "missing, install the package again (pip install -e '.[train]')",
            file=sys.stderr,
        )
        return 2
    parsed = build_parser().parse_args(arguments)
    try:
        code = parsed.call(parsed)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of a pipe, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes nowhere
        return 141
    except errors.KeyeError as error:
        print(f"error: {str(error).replace('urls=UrlRules()', '--url')}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: interrupted by the user", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
