"""Train a small video diffusion model of places, let a camera walk in it, and give it a temporary memory.

After SlowFast-VGen (arXiv 2410.23277): `train` is slow learning, `walk` writes a temporary LoRA after each chunk, and
`loop` trains the slow weights to use such memories. Each resumes if it is called again.
"""

import argparse
import json
import os
from pathlib import Path

from keye.errors import ArgumentError, CheckpointError, RecipeError, run, writing

EXAMPLES = """examples:
  keye dream train stages/dream/recipes/tiny.toml --out runs/dream           five minutes on one core
  keye dream train stages/dream/recipes/tiny.toml --set steps=20 --set batch=8 --out runs/short
  keye dream loop runs/dream --set loop.rounds=2                              writes runs/dream/loop/model
  keye dream walk runs/dream/model --out runs/dream/walk                      walk.png and walk.json
  keye dream walk runs/dream/model --path returning --seed 3 --write none temporary text past --out walk
  keye dream walk runs/dream/model --actions right,down,left,up --watch 3 --out walk
  torchrun --nproc_per_node 2 scripts/dream.py train stages/dream/recipes/tiny.toml --out runs/dream
"""
SHIPPED = Path(__file__).resolve().parents[1] / "dream" / "recipes" / "tiny.toml"
PATHS = ("circling", "returning")


def main() -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=layout)
    commands = parser.add_subparsers(metavar="train | loop | walk", required=True)
    train = commands.add_parser("train", help="slow learning: a recipe → a model")
    train.add_argument("settings", metavar="RECIPE", help="a TOML file, such as stages/dream/recipes/tiny.toml")
    train.add_argument("--out", help="directory of the run (default runs/<name of the recipe>)")
    train.add_argument("--print", action="store_true", help="print the recipe with its defaults; trains nothing")
    train.set_defaults(call=run_train)
    loop = commands.add_parser("loop", help="the slow-fast loop: a trained run → a model that uses its memory")
    loop.add_argument("run", help="directory of keye dream train")
    loop.add_argument("--out", help="directory of the loop (default RUN/loop)")
    loop.set_defaults(call=run_loop)
    walk = commands.add_parser("walk", help="walk through a drawn place, watch the way out and dream the way back")
    walk.add_argument("model", help="a model directory of train or loop")
    walk.add_argument("--path", choices=PATHS, default="circling", help="how the camera returns (default circling)")
    walk.add_argument("--actions", metavar="A,A,…", help="the way instead, of right, left, up and down")
    walk.add_argument("--watch", type=int, metavar="N", help="chunks that are seen, not dreamed (default: the way out)")
    walk.add_argument("--seed", type=int, default=0, help="of the place, the way and the noise")
    walk.add_argument(
        "--write", nargs="+", default=["none", "temporary"], metavar="W", help="none, temporary, text, past or both"
    )
    walk.add_argument("--recipe", help="for its table fast (default: recipe.toml of the model's run)")
    walk.add_argument("--out", default="walk", help="directory to write to (default walk)")
    walk.set_defaults(call=run_walk)
    for one in (train, loop, walk):
        one.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. fast.steps=10")
    for one in (train, loop):
        one.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    args = parser.parse_args()
    args.call(args)


def run_train(args: argparse.Namespace) -> None:
    """`keye dream train`."""
    from stages.dream.recipe import load
    from stages.typed_toml import to_toml

    recipe = load(args.settings, args.set)
    if args.print:
        print(to_toml(recipe), end="")
        return
    from stages.dream.slow import train

    out = args.out or f"runs/{recipe.name}"
    train(recipe, out, _join())
    print(f"wrote {out}/model; next: keye dream walk {out}/model --out {out}/walk")


def run_loop(args: argparse.Namespace) -> None:
    """`keye dream loop`."""
    from keye.dream.model import DreamModel
    from stages.dream.loop import loop
    from stages.dream.recipe import load

    if not (Path(args.run) / "recipe.toml").is_file():
        raise CheckpointError(f"{args.run} has no recipe.toml; name a directory that keye dream train wrote")
    recipe = load(Path(args.run) / "recipe.toml", args.set)
    out = args.out or f"{args.run}/loop"
    loop(DreamModel.from_pretrained(Path(args.run) / "model").to(_join()), recipe, out)
    print(f"wrote {out}/model")


def run_walk(args: argparse.Namespace) -> None:
    """`keye dream walk`."""
    import dataclasses

    import numpy as np

    from keye.dream.episode import WRITES
    from keye.dream.model import DreamModel
    from keye.dream.picture import draw_walk
    from keye.dream.scenes import circling_walk, returning_walk
    from keye.dream.scenes import walk as walk_of
    from stages.dream.recipe import load
    from stages.dream.walk import dream_walk, measures

    unknown = [write for write in args.write if write not in WRITES]
    if unknown:
        raise ArgumentError(f"--write {unknown[0]} is not one of {', '.join(WRITES)}")
    above = [folder / "recipe.toml" for folder in Path(args.model).resolve().parents[:2]]  # a loop is inside its run
    recipe = load(args.recipe or next((path for path in above if path.is_file()), SHIPPED), args.set)
    rng = np.random.default_rng(args.seed)
    if args.actions:
        path = walk_of(_actions(args.actions), rng)
    else:
        path = circling_walk(rng) if args.path == "circling" else returning_walk(rng)
    watched = path.outward if args.watch is None else args.watch
    if not 0 <= watched < len(path.actions):
        raise ArgumentError(f"--watch {watched}: the walk has {len(path.actions)} chunks; leave at least one to dream")
    path = dataclasses.replace(path, outward=watched)
    model, out = DreamModel.from_pretrained(args.model), Path(args.out)
    dreamed, found = {}, {}
    for write in args.write:
        settings = dataclasses.replace(recipe.fast, write=write)
        dreamed[write] = dream_walk(model, path, settings, args.seed, out / write)
        found[write] = measures(path, dreamed[write], settings.past)
        print(f"{write:10} " + ", ".join(f"{name} {value:.2f}" for name, value in found[write].items()))
    draw_walk(path, dreamed, out / "walk.png", f"{watched} chunks watched, the others dreamed")
    with writing(out / "walk.json", "the measures"):
        (out / "walk.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {out}/walk.png and {out}/walk.json")


def _actions(text: str) -> tuple[int, ...]:
    from keye.dream.scenes import ACTIONS

    names = [name.strip() for name in text.split(",")]
    wrong = [name for name in names if name not in ACTIONS]
    if wrong:
        raise ArgumentError(f"--actions: {wrong[0]!r} is not one of {', '.join(ACTIONS)}")
    return tuple(ACTIONS.index(name) for name in names)


def _join():  # noqa: ANN202 - torch is imported late
    """Join the processes of a launch, if there is one; the device of this process."""
    import torch
    import torch.distributed as dist

    cuda = torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if cuda:
        torch.cuda.set_device(local)
    if "RANK" in os.environ and not dist.is_initialized():
        try:
            dist.init_process_group("nccl" if cuda else "gloo")
        except ValueError as error:
            raise RecipeError(f"the launch is incomplete ({error}); use torchrun or unset RANK") from error
    return torch.device("cuda", local) if cuda else torch.device("cpu")


if __name__ == "__main__":
    run(main)
