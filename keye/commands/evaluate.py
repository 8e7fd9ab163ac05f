"""Evaluate a trained model on a manifest or on a public benchmark."""

import argparse
import os
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from keye.commands.encode import SettingsHelp, add_settings
from keye.encoder_config import EncoderConfig
from keye.errors import KeyeError, run
from keye.evaluation import CONTROLS, Control, ManifestBenchmark, control_table, evaluate, gather
from keye.evaluation.controls import asked, partners
from keye.evaluation.public import BENCHMARKS, open_benchmark
from keye.evaluation.public.frames import FrameChoice
from keye.evaluation.public.run import evaluate_public
from keye.evaluation.public.scores import save_scores, summary
from keye.slowfast.policies import get_policy

if TYPE_CHECKING:
    from keye.model.keye import KeyeForConditionalGeneration
    from keye.processor.processor import KeyeProcessor

PATIENCE = timedelta(days=7)
"""How long a process that has finished waits for the others: clips differ in length. The default is half an hour."""

_EXAMPLES = """examples:
  keye evaluate runs/demo/annealing/model runs/demo/world/heldout.jsonl
  keye evaluate MODEL heldout.jsonl --control blind --train train.jsonl --out blind.json
  keye evaluate MODEL heldout.jsonl --control zeroed                     the same tokens with zero pixels
  keye evaluate MODEL heldout.jsonl --control all --out answers.json     every control, in one table
  keye evaluate MODEL heldout.jsonl --families count,order --limit 50
  keye evaluate MODEL heldout.jsonl --policy ladder --max-tokens 2000    with other settings of the encoder
  keye evaluate MODEL --benchmark video_mme --data Video-MME --out runs/mme        the same command continues
  keye evaluate MODEL --benchmark video_mme --data Video-MME --subtitles --control all
  keye evaluate MODEL --benchmark mvbench --data MVBench --frames official --families action_count
  torchrun --nproc_per_node 2 -m keye.commands.evaluate MODEL heldout.jsonl     divide the questions among two processes
"""


def main() -> None:
    args = _parser().parse_args()
    if (args.manifest is None) == (args.benchmark is None):
        raise KeyeError("evaluate needs a manifest or --benchmark with --data; give one of them")
    if args.policy is not None:
        get_policy(args.policy, 0.5)  # refuses a wrong one before the model is read
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1:
        join_processes()
    (_on_manifest if args.benchmark is None else _on_benchmark)(args, rank, world_size)
    if world_size > 1:
        torch.distributed.destroy_process_group()


def join_processes() -> None:
    """Start the gloo group of the processes that `torchrun` started."""
    # Imported later, its functions would have the group as a default argument. The group's threads would then survive
    # `destroy_process_group`, and one that frees a tensor while the interpreter ends aborts the process.
    import torch.distributed.nn  # noqa: F401

    torch.distributed.init_process_group("gloo", timeout=PATIENCE)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Measure accuracy per task family, with the chance and majority baselines.",
        epilog=_EXAMPLES,
        formatter_class=SettingsHelp,
    )
    parser.add_argument("model", help="a model directory")
    parser.add_argument("manifest", nargs="?", help="JSON Lines manifest of questions")
    parser.add_argument("--train", help="training manifest for the majority answers")
    parser.add_argument("--families", help="only these families, separated by commas")
    parser.add_argument("--limit", type=int, metavar="N", help="at most N questions of each family")
    parser.add_argument(
        "--control",
        dest="controls",
        action="append",
        choices=("none", "all", *CONTROLS),
        help="; ".join(f"{name}: {what}" for name, what in CONTROLS.items())
        + "; all: none and each of them, in one table and one report each; may be repeated",
    )
    parser.add_argument(
        "--blind", dest="controls", action="append_const", const="blind", help="same as --control blind"
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    parser.add_argument(
        "--batch-size", type=int, metavar="N", help="questions per batch (default: 16; 1 of a benchmark)"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="maximum tokens per answer (default: 32, or the benchmark's)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="random seed (default: %(default)s)")
    parser.add_argument(
        "--out", metavar="PATH", help="write the report as JSON; of a benchmark, the folder of its predictions"
    )
    public = parser.add_argument_group("public benchmarks")
    public.add_argument("--benchmark", choices=tuple(BENCHMARKS), help="a public benchmark instead of a manifest")
    public.add_argument("--data", metavar="DIR", help="the official directory of the benchmark")
    public.add_argument("--subtitles", action="store_true", help="show the subtitles of the clips")
    public.add_argument(
        "--frames",
        choices=("plan", "official"),
        default="plan",
        help="plan, the default: sampled as the encoder does; official: the frames that the authors take",
    )
    public.add_argument("--num-frames", type=int, metavar="N", help="this number of frames, spread evenly")
    mode = public.add_mutually_exclusive_group()
    mode.add_argument("--think", dest="thinking", action="store_const", const=True, help="think before the answer")
    mode.add_argument("--no-think", dest="thinking", action="store_const", const=False, help="answer without thinking")
    public.add_argument("--skip-missing", action="store_true", help="leave out questions whose clip does not exist")
    add_settings(parser.add_argument_group("encoder (default: as saved with the model)"), EncoderConfig.names())
    return parser


def _on_manifest(args: argparse.Namespace, rank: int, world_size: int) -> None:
    public = ("data", "subtitles", "num_frames", "skip_missing")
    given = [f"--{name.replace('_', '-')}" for name in public if getattr(args, name)]
    given += ["--frames official"] if args.frames != "plan" else []
    given += ["--think" if args.thinking else "--no-think"] if args.thinking is not None else []
    if given:
        raise KeyeError(f"{given[0]} is for public benchmarks; leave it out, or give --benchmark instead of a manifest")
    controls = _controls(args)
    questions = ManifestBenchmark(args.manifest, _families(args), args.limit)
    if "other" in controls:
        partners([question for question in questions if asked("other", question)])  # before any work
    model, processor = load(args.model)
    processor = _with_settings(processor, args)
    reports = {}
    for control in controls:
        report = evaluate(
            model,
            processor,
            questions,
            control=control,
            temperature=args.temperature,
            train=args.train,
            batch_size=16 if args.batch_size is None else args.batch_size,
            max_new_tokens=32 if args.max_new_tokens is None else args.max_new_tokens,
            seed=args.seed,
            rank=rank,
            world_size=world_size,
            progress=rank == 0,
        )
        report.settings["encoder"] = processor.encoder
        reports[control] = gather(report)
        if rank == 0 and args.out:
            out = Path(args.out)
            path = out if control == "none" or len(controls) == 1 else out.with_stem(f"{out.stem}_{control}")
            reports[control].save(path)
            print(f"wrote {path}")
    if rank == 0:
        print(control_table(reports) if len(controls) > 1 else reports[controls[0]].table())


def _controls(args: argparse.Namespace) -> tuple[Control, ...]:
    """The controls to ask under; several are compared with "none"."""
    names = dict.fromkeys(args.controls or ["none"])
    if "all" in names:
        return ("none", *CONTROLS)
    return tuple(names) if len(names) == 1 else tuple({"none": None, **names})


def _families(args: argparse.Namespace) -> list[str] | None:
    return args.families.split(",") if args.families else None


def _with_settings(processor: "KeyeProcessor", args: argparse.Namespace) -> "KeyeProcessor":
    given = {name: getattr(args, name) for name in EncoderConfig.names() if getattr(args, name) is not None}
    return processor.with_encoder(**given) if given else processor


def _on_benchmark(args: argparse.Namespace, rank: int, world_size: int) -> None:
    if args.data is None:
        raise KeyeError(f"--benchmark {args.benchmark} needs --data; give its official directory")
    benchmark = open_benchmark(
        args.benchmark, args.data, families=_families(args), limit=args.limit, subtitles=args.subtitles,
        skip_missing=args.skip_missing,
    )  # fmt: skip
    if "other" in _controls(args):
        partners(list(benchmark))  # before any work
    model, processor = load(args.model)
    processor = _with_settings(processor, args)
    out = Path(args.out or Path("runs") / benchmark.name)
    runs = {}
    for control in _controls(args):
        folder = out if control == "none" else out / control
        runs[control] = evaluate_public(
            model,
            processor,
            benchmark,
            folder,
            FrameChoice(args.frames, args.num_frames),
            control=control,
            batch_size=1 if args.batch_size is None else args.batch_size,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            thinking=args.thinking,
            seed=args.seed,
            rank=rank,
            world_size=world_size,
            identity={"model": str(Path(args.model).absolute())},
            progress=rank == 0,
        )
    if rank == 0:
        print(summary(benchmark, runs))
        print(f"wrote {save_scores(out, benchmark, runs)}")


def load(path: str) -> "tuple[KeyeForConditionalGeneration, KeyeProcessor]":
    """Model (on this process's GPU if there is one) and processor of a directory.

    Raises:
        CheckpointError: the directory is not a model directory, or its model cannot be loaded.
    """
    from keye.inference.chat import load_model

    return load_model(path, f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")


if __name__ == "__main__":
    run(main)
