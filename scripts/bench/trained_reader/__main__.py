"""Trains a small network under every policy at equal tokens and equal compute, and reports paired intervals.

The network gets what a plan shows (pictures, times, kinds) and the question, and chooses among the options. It learns
the split `train`; the recipe is chosen on `dev` with every frame slow only (--dev); `heldout` is asked once for each
seed of each policy. An interrupted call continues. Results: docs/results/trained_reader.md.
"""

import argparse
import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from keye.errors import KeyeError, run
from keye.evaluation.study.settings import CEILING, REFERENCE, Setting
from keye.files import atomic_file, write_atomically
from scripts.bench.common.record import RESULTS, ROOT, command, machine
from scripts.bench.trained_reader import clips, page, training
from scripts.bench.trained_reader.clips import FAMILIES_ASKED, Seen
from scripts.bench.trained_reader.network import Eye, Reader
from scripts.bench.trained_reader.training import Recipe

EXAMPLES = """examples:
  python -m scripts.bench.trained_reader --dev          train with every frame slow and look at dev
  python -m scripts.bench.trained_reader                draw, train and ask; continues a former call
  python -m scripts.bench.trained_reader --tables       the page again, from saved predictions
  python -m scripts.bench.trained_reader --clips 8 --steps 2 --out DIR --cache DIR     shows that it runs
"""
POLICIES = (REFERENCE, "released", "random", "uniform", "two_stream", "downsampled")
CACHE = ROOT / ".cache" / "bench" / "trained_reader"
ALL_SLOW = Setting(CEILING, None)


def main() -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=layout)
    parser.add_argument("--families", nargs="+", choices=FAMILIES_ASKED, default=list(FAMILIES_ASKED), metavar="NAME")
    parser.add_argument("--policies", nargs="+", default=list(POLICIES), metavar="NAME", help="of keye ablate")
    parser.add_argument("--budgets", nargs="+", type=int, default=[480, 240], help="of the default (480 240)")
    parser.add_argument("--clips", type=int, default=160, help="training clips of a family (160)")
    parser.add_argument("--questions", type=int, default=120, help="held-out questions of a family (120)")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help=f"of each training ({Recipe.steps})")
    parser.add_argument("--looks", type=int, default=Recipe.looks, help=f"steps of an eye ({Recipe.looks})")
    parser.add_argument("--batch", type=int, default=Recipe.batch, help=f"clips of a step ({Recipe.batch})")
    parser.add_argument("--rate", type=float, default=Recipe.rate, help=f"learning rate ({Recipe.rate})")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=0, help="of this call; the same command continues")
    parser.add_argument("--dev", action="store_true", help="every frame slow, seed 0, asked on dev; writes nothing")
    parser.add_argument("--tables", action="store_true", help="only the page, from the saved predictions")
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--out", type=Path, default=RESULTS, help="default docs/results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.dev:
        look(args)
        return
    if not args.tables:
        measure(args)
    page.write(args.out / "trained_reader", args.out / "trained_reader.md")


def settings_of(args: argparse.Namespace) -> list[Setting]:
    """Every frame slow, and every policy at every budget; the reference is always among them."""
    policies = list(dict.fromkeys([REFERENCE, *args.policies]))
    return [ALL_SLOW, *(Setting(policy, budget) for budget in args.budgets for policy in policies)]


def drawn(args: argparse.Namespace, split: str, budget: int | None) -> list[Path]:
    """The cached files of a split with the settings of one budget, drawn if they are missing."""
    settings, paths = [one for one in settings_of(args) if one.budget == budget], []
    reference = next((one for one in settings if one.is_reference), None)
    resolved = json.dumps([[one.label, one.resolved()] for one in settings], sort_keys=True)
    for family in args.families:
        number = args.clips if split == "train" else page.clips_of(family, args.questions)
        key = hashlib.sha256(f"{resolved} {family} {split} {number}".encode()).hexdigest()[:12]
        path = args.cache / f"{split}-{family}-{key}.npz"
        if not path.exists():
            began = time.process_time()
            path.parent.mkdir(parents=True, exist_ok=True)
            clips.draw_family(path, family, split, number, settings, reference)
            print(f"drawn {path.name}: {time.process_time() - began:.0f} s of a core", flush=True)
        paths.append(path)
    return paths


def look(args: argparse.Namespace) -> None:
    """Train with every frame slow and print accuracy on `dev`."""
    recipe = Recipe(args.steps, args.batch, args.rate, args.looks)
    train, dev = (clips.load(drawn(args, split, None), ALL_SLOW) for split in ("train", "dev"))
    began = time.process_time()
    eye = training.train_eye(train, recipe, 0, log=True)
    print(f"  {time.process_time() - began:.0f} s of a core", flush=True)
    reader = training.train(train, eye.look(train.pictures), recipe, 0, log=True)
    seconds = time.process_time() - began
    found = training.accuracies(training.choices(reader, dev, eye.look(dev.pictures)), dev)
    print(f"{recipe}  {seconds:.0f} s of a core  dev {found}", flush=True)


def measure(args: argparse.Namespace) -> None:
    """Train and ask what is missing, and write the predictions."""
    out, began = args.out / "trained_reader", time.monotonic()
    settings, recipe = settings_of(args), Recipe(args.steps, args.batch, args.rate, args.looks)
    parameters = sum(value.numel() for part in (Eye(), Reader()) for value in part.parameters())
    wanted = {
        "questions": page.identity(args.families, args.questions), "recipe": dataclasses.asdict(recipe),
        "training_clips": args.clips, "parameters": parameters, "seeds": sorted(args.seeds),
        "settings": {one.label: one.resolved() for one in settings},
    }  # fmt: skip
    key = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:12]
    parts = args.cache / f"runs-{key}"
    parts.mkdir(parents=True, exist_ok=True)
    for setting, seed in _jobs(settings, args):
        path = parts / f"{setting.label.replace('=', '-')}-{seed}.json"
        if path.exists():
            continue
        if args.minutes and time.monotonic() - began > 60 * args.minutes:
            print("time is up; the same command continues", flush=True)
            break
        train, heldout = (clips.load(drawn(args, split, setting.budget), setting) for split in ("train", "heldout"))
        eye = eye_of(args, recipe, seed, parts / f"eye-{seed}.pt")
        write_atomically(path, json.dumps(answer(eye, train, heldout, recipe, setting, seed)))
    done = [json.loads(path.read_text()) for path in sorted(parts.glob("*.json"))]
    if not done:
        raise KeyeError("no reader has been trained; give more --minutes")
    facts = {"command": command(), "date": time.strftime("%Y-%m-%d"), "machine": machine()}
    page.save(out, done, {**wanted, **facts, "seconds": sum(one["seconds"] for one in done)})


def _jobs(settings: Sequence[Setting], args: argparse.Namespace) -> Iterator[tuple[Setting, int]]:
    """Settings and seeds, so that an early end leaves few budgets with all seeds rather than the opposite."""
    for budget in (None, *args.budgets):
        for seed in args.seeds:
            yield from ((one, seed) for one in settings if one.budget == budget)


def eye_of(args: argparse.Namespace, recipe: Recipe, seed: int, path: Path) -> Eye:
    """The eye of a seed, which all settings share; trained if it is not in `path`."""
    eye = Eye()
    if path.exists():
        eye.load_state_dict(torch.load(path))
        return eye.eval()
    began = time.process_time()
    eye = training.train_eye(clips.load(drawn(args, "train", None), ALL_SLOW), recipe, seed)
    with atomic_file(path) as part:
        torch.save(eye.state_dict(), part)
    print(f"eye of seed {seed}: {time.process_time() - began:.0f} s of a core", flush=True)
    return eye


def answer(eye: Eye, train: Seen, heldout: Seen, recipe: Recipe, setting: Setting, seed: int) -> dict:
    """Train a reader and ask it: its choices, those of the controls, and what the plans cost."""
    began = time.process_time()
    reader = training.train(train, eye.look(train.pictures), recipe, seed)
    seconds = time.process_time() - began
    found = training.answers(eye, reader, heldout)
    print(f"{setting.label} seed {seed}: {seconds:.0f} s of a core, {training.accuracies(found['none'], heldout)}",
          flush=True)  # fmt: skip
    place = heldout.clip.numpy()
    entries = np.diff(heldout.starts.numpy())
    means = {"tokens": heldout.tokens, "entries": entries, "slow": heldout.share, "events": heldout.events,
             "event_tokens": heldout.event_tokens}  # fmt: skip
    return {
        "setting": setting.label, "seed": seed, "seconds": seconds, "ids": heldout.names.tolist(),
        "majority": training.majority(train, heldout).tolist(),
        "chosen": {name: chosen.tolist() for name, chosen in found.items()},
        **{name: np.round(values[place], 4).tolist() for name, values in means.items()},
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(run(main))
