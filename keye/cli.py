"""The `keye` command: encode, chat, serve and bench, and the commands of the entry points `keye.commands`."""

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points

from keye import errors
from keye.commands import bench, encode

CHAT_EXAMPLES = """examples:
  keye chat runs/demo/gspo/model clip.mp4                      a conversation about a clip
  keye chat MODEL clip.mp4 --ask "What happens first?"         one answer, for scripts
  keye chat MODEL a.mp4 b.png --ask "Which is older?" --think --json
  keye chat MODEL --system "Answer in French." --temperature 0.7
"""

SERVE_EXAMPLES = """examples:
  keye serve runs/demo/gspo/model                              http://127.0.0.1:8000/v1, clips sent in requests
  keye serve MODEL --media-root videos                         requests may name files in this folder
  keye serve MODEL --url --max-bytes 100_000_000               requests may name public http(s) URLs
  KEYE_API_KEY=… keye serve MODEL --host 0.0.0.0               for other machines, with a key
  KEYE_API_KEY=… keye serve MODEL --allow-reload runs/mine/gspo/policy    for the rollouts of keye posttrain
"""

COMMANDS = "keye.commands"
"""Entry points: commands with their own parser. Those of `stages` and `rl` are found here, as keye imports neither."""

SUMMARIES = {
    "ablate": "compare settings: a sweep over clips, or a study on SlowFastBench",
    "convert": "make, read and write model directories",
    "cost": "estimate memory and time of a recipe",
    "data": "check training data before a run",
    "dream": "train and walk in a video diffusion model with a temporary memory",
    "evaluate": "measure a model's accuracy on questions",
    "merge": "average model directories",
    "posttrain": "tune a model with SFT, preference optimization and GSPO",
    "pretrain": "train a model in four stages",
    "reasoning": "make reasoning data in five steps",
    "report": "write a report of a training run",
    "trace": "find the tokens and blocks that carry an answer",
}
"""What `keye --help` says about the commands of entry points, without importing them."""


def further_commands() -> dict[str, EntryPoint]:
    """Name → `main` of every installed command other than encode, chat, serve and bench."""
    return {point.name: point for point in entry_points(group=COMMANDS)}


def build_parser() -> argparse.ArgumentParser:
    """The parser; each subcommand sets `call`, a function of the parsed arguments that returns the exit code."""
    further = [f"  {name:<20}{SUMMARIES.get(name, '')}".rstrip() for name in sorted(further_commands())]
    parser = argparse.ArgumentParser(
        prog="keye",
        description="Adaptive slow-fast video encoding, and training and use of video-language models.",
        epilog="\n".join(["further commands, each with --help:", *further]) if further else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    encode.add_parser(commands)
    add_chat(commands)
    add_serve(commands)
    bench.add_parser(commands)
    return parser


def add_chat(commands: argparse._SubParsersAction) -> None:
    """Add `keye chat`, which asks a model about clips and images."""
    parser = commands.add_parser(
        "chat",
        help="ask a model about clips and images",
        description="Ask a model about clips and images; /help in the conversation lists its commands.",
        epilog=CHAT_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_model(parser)
    parser.add_argument("media", nargs="*", metavar="CLIP", help="clips and images for the first question")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--think", dest="thinking", action="store_const", const=True, help="think before the answer")
    mode.add_argument("--no-think", dest="thinking", action="store_const", const=False, help="answer without thinking")
    parser.add_argument("--system", metavar="TEXT", help="the system prompt")
    parser.add_argument(
        "--max-new-tokens", type=int, default=1024, metavar="N", help="maximum tokens per answer (default: %(default)s)"
    )
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0, the default, is greedy")
    parser.add_argument("--ask", action="append", metavar="QUESTION", help="answer this and exit; may be repeated")
    parser.add_argument("--json", action="store_true", help="with --ask: one line of JSON for each answer")
    parser.add_argument("--url", action="store_true", help="download http(s) URLs, except from private addresses")
    parser.set_defaults(call=_with_model("keye.inference.terminal", "chat"))


def add_serve(commands: argparse._SubParsersAction) -> None:
    """Add `keye serve`, an OpenAI-compatible server."""
    parser = commands.add_parser(
        "serve",
        help="serve a model with an OpenAI-compatible API",
        description="Serve POST /v1/chat/completions, with image_url and video_url parts and streaming.",
        epilog=SERVE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_model(parser)
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on (127.0.0.1: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free port (default: %(default)s)")
    parser.add_argument("--name", metavar="NAME", help="the model's name in requests (default: its directory's name)")
    parser.add_argument("--media-root", metavar="DIR", help="requests may name files in this folder (default: none)")
    parser.add_argument("--url", action="store_true", help="requests may name http(s) URLs of public addresses")
    parser.add_argument(
        "--api-key", metavar="KEY", help="requests must send it; other users see it in `ps`, so prefer KEYE_API_KEY"
    )
    parser.add_argument("--api-key-file", metavar="FILE", help="a file with the key, instead of --api-key")
    parser.add_argument(
        "--max-bytes", type=int, default=1 << 26, metavar="N", help="largest clip or image (default: 64 MiB)"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=4096, metavar="N", help="maximum tokens per answer (default: %(default)s)"
    )
    parser.add_argument(
        "--batch", type=int, default=8, metavar="N", help="requests answered in one batch (default: %(default)s)"
    )
    parser.add_argument(
        "--queue", type=int, default=16, metavar="N", help="requests that may wait; more get 429 (default: %(default)s)"
    )
    parser.add_argument(
        "--allow-reload", metavar="DIR", help="requests with the key may load the weights of a folder of DIR"
    )
    parser.set_defaults(call=_with_model("keye.inference.serve", "serve"))


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a model directory")
    parser.add_argument(
        "--device", default="auto", metavar="D", help="cpu, cuda or cuda:1 (default: the GPU if there is one)"
    )
    parser.add_argument("--dtype", default="auto", metavar="T", help="float32, bfloat16 or float16 (default: as saved)")


def _with_model(module: str, name: str) -> Callable[[argparse.Namespace], int]:
    """A command that needs transformers, which is loaded only when it is called."""
    return lambda arguments: getattr(importlib.import_module(module), name)(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `keye`; the entry point of the installed command."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    further = further_commands() if arguments else {}
    if arguments and arguments[0] in further:
        sys.argv = [f"keye {arguments[0]}", *arguments[1:]]
        errors.run(lambda: further[arguments[0]].load()())
    known = ("encode", "chat", "serve", "bench", *sorted(further))
    if arguments and not arguments[0].startswith("-") and arguments[0] not in known:
        print(
            f"error: {arguments[0]} is not a command; use one of {', '.join(known)}. If a command of the guides is "
            "missing, install the package again (pip install -e '.[train]')",
            file=sys.stderr,
        )
        return 2
    parsed = build_parser().parse_args(arguments)
    try:
        code = parsed.call(parsed)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of a pipe, such as head, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # discards what is still buffered
        return 141
    except ModuleNotFoundError as error:
        missing = errors.missing_package(error)
        if missing is None:
            raise
        print(f"error: {missing}", file=sys.stderr)
        return 2
    except errors.KeyeError as error:
        print(f"error: {encode.in_options(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        again = "; run the same command again to continue" if parsed.call is bench.call else ""
        print(f"stopped: interrupted by the user{again}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
