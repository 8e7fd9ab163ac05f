"""Make, read and write Keye model directories.

  keye convert init Qwen3-8B --vision siglip-so400m-patch14-384 --out keye     a decoder and SigLIP → Keye
  keye convert init SmolLM2 --gguf SmolLM2.Q4_1.gguf --tower tiny --out keye   a GGUF file and a random tower → Keye
  keye convert from-released Keye-VL-1_5-8B --out keye                         the released model → Keye
  keye convert to-released keye --out served --like Keye-VL-1_5-8B             Keye → the form of serving engines
  keye convert check keye                                                      compare weights with config.json

Conversions copy one tensor at a time from file to file; an output directory appears once it is complete. `model.path`
of a recipe and `keye chat` accept the directories that `init` and `from-released` write.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from keye.errors import CheckpointError, run, writing

DTYPES = ("float32", "bfloat16", "float16")


def memory_mb(field: str) -> float:
    """`VmHWM` (peak) or `VmRSS` (now) of this process in MB.

    Not getrusage, whose peak is inherited from the process that started this one.
    """
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise CheckpointError(f"/proc/self/status has no {field}; --figures needs Linux")
    return int(found[1]) * 1024 / 1e6


def peak_of_conversion(source: Path, out: Path, direction: str = "from-released") -> dict[str, float]:
    """Measure time and memory of a conversion, in a process of its own.

    Args:
        direction: "from-released" or "to-released".

    Returns:
        `seconds`, `before_mb` (resident memory after all imports), `peak_mb`, and `largest_shard_mb`,
        `largest_tensor_mb` and `total_mb` of the source.

    Raises:
        CheckpointError: the conversion failed; the message is the conversion's.
    """
    figures = Path(f"{out}.figures.json")
    command = [sys.executable, "-m", "keye.commands.convert", direction, str(source)]
    command += ["--out", str(out), "--figures", str(figures)]
    places = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise CheckpointError(
            done.stderr.strip().removeprefix("error: ") or f"{direction} ended with {done.returncode}"
        )
    values = json.loads(figures.read_text())
    figures.unlink()
    return values


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with size, speed and remaining time; yields a function of (bytes written, bytes in total).

    The first call shows it, so that a command that refuses its arguments prints the reason only.
    """
    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    bar = Progress(*columns, console=Console(stderr=True))

    def update(done: int, total: int) -> None:
        if not bar.tasks:
            bar.add_task(title, total=None)
            bar.start()
        bar.update(bar.task_ids[0], completed=done, total=total)

    try:
        yield update
    finally:
        if bar.tasks:
            bar.stop()


def init(args: argparse.Namespace, progress: Callable[[int, int], None]) -> object:
    import torch

    from keye.checkpoint.convert import initialise
    from keye.model.config import KeyeConfig

    return initialise(
        args.text,
        args.vision or KeyeConfig.preset(args.tower).vision_config,
        out=args.out,
        tokenizer=args.tokenizer,
        gguf_file=args.gguf,
        dtype=getattr(torch, args.dtype) if args.dtype else None,
        max_shard=args.max_shard_mb * 1_000_000,
        seed=args.seed,
        progress=progress,
    )


def from_released(args: argparse.Namespace, progress: Callable[[int, int], None]) -> object:
    from keye.checkpoint.convert import convert_released

    size = args.max_shard_mb * 1_000_000
    return convert_released(args.source, args.out, allow_missing=args.allow_missing, max_shard=size, progress=progress)


def to_released(args: argparse.Namespace, progress: Callable[[int, int], None]) -> object:
    from keye.checkpoint.convert import export_released

    size = args.max_shard_mb * 1_000_000
    return export_released(args.source, args.out, like=args.like, max_shard=size, progress=progress)


def convert(args: argparse.Namespace, action: Callable[..., object]) -> int:
    """Run one conversion with a progress bar, print its report, and write the `--figures`."""
    import keye.checkpoint.convert
    import keye.processor.processor  # noqa: F401  # imports of the conversion, before memory is measured

    before, began = memory_mb("VmRSS") if args.figures else 0.0, time.perf_counter()
    with progress_bar(args.command) as progress:
        report = action(args, progress)
    print(report)
    print(args.out)
    if args.figures:
        stored = keye.checkpoint.convert.open_checkpoint(args.source).values()
        shards = {t.path for t in stored}
        figures = {
            "seconds": time.perf_counter() - began,
            "before_mb": before,
            "peak_mb": memory_mb("VmHWM"),
            "largest_shard_mb": max(path.stat().st_size for path in shards) / 1e6,
            "largest_tensor_mb": max(t.size for t in stored) / 1e6,
            "total_mb": sum(t.size for t in stored) / 1e6,
        }
        with writing(args.figures, "the figures"):
            args.figures.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


def check(args: argparse.Namespace) -> int:
    from keye.checkpoint.convert import check as compare

    report = compare(args.source)
    print(report)
    return 0 if report.clean else 1


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help: str) -> argparse.ArgumentParser:
        examples = [line for line in __doc__.splitlines() if line.startswith(f"  keye convert {name} ")]
        return commands.add_parser(
            name,
            help=help,
            description=f"{help[0].upper()}{help[1:]}.",
            epilog="\n".join(["examples:", *examples]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    make = command("init", "make a Keye model of a decoder and a vision tower")
    make.add_argument("text", type=Path, metavar="DECODER", help="directory of a Qwen3, Qwen2 or Llama model")
    tower = make.add_mutually_exclusive_group()
    tower.add_argument("--vision", type=Path, metavar="DIR", help="directory of a SigLIP model")
    presets = ("tiny", "small", "keye_8b")
    tower.add_argument(
        "--tower",
        default="keye_8b",
        choices=presets,
        help="size of a vision tower with random weights (default: %(default)s)",
    )
    make.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="directory of the tokenizer, if it is not the decoder's"
    )
    make.add_argument(
        "--gguf", metavar="FILE", help="a GGUF file in the decoder's directory (pip install 'keye[gguf]')"
    )
    make.add_argument("--dtype", choices=DTYPES, help="type of the written weights (default: the decoder's)")
    make.add_argument("--seed", type=int, default=0, help="seed of random weights (default: %(default)s)")

    read = command("from-released", "convert the released model to Keye")
    read.add_argument("source", type=Path, metavar="RELEASED", help="directory of Keye-VL-1.5-8B")
    read.add_argument("--allow-missing", action="store_true", help="continue if weights are missing")

    write = command("to-released", "convert a Keye model to released names, config and settings, for serving engines")
    write.add_argument("source", type=Path, metavar="MODEL", help="directory of a Keye model")
    write.add_argument(
        "--like", type=Path, metavar="RELEASED", help="released directory whose code and settings are copied"
    )

    for part in (make, read, write):
        part.add_argument("--out", type=Path, required=True, metavar="DIR", help="the directory to write")
        part.add_argument(
            "--max-shard-mb", type=int, default=5000, metavar="MB", help="size of a weight file (default: %(default)s)"
        )
    for part in (read, write):
        part.add_argument("--figures", type=Path, metavar="FILE", help="write time and peak memory as JSON")
    make.set_defaults(figures=None)

    look = command("check", "compare the weights of a directory with its config.json; exit code 1 if they differ")
    look.add_argument("source", type=Path, metavar="MODEL", help="directory of a Keye model")
    return parser


def main() -> int:
    args = build_parser().parse_args()
    for key in ("text", "source", "vision", "tokenizer", "like"):
        path = getattr(args, key, None)
        if path is not None and not path.is_dir():
            raise CheckpointError(f"{path}: no such directory; name one that holds a model")
    if args.command == "check":
        return check(args)
    return convert(args, {"init": init, "from-released": from_released, "to-released": to_released}[args.command])


if __name__ == "__main__":
    run(main)
