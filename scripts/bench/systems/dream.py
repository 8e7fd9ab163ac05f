"""SlowFast-VGen: what does a temporary LoRA remember of a place, and of a clip that has left the context?

Walks: a small video diffusion model is trained for each seed. On walks that leave a place and return, the way out is
watched, the rest is generated with each kind of memory and compared with the drawn truth. The slow-fast loop is
compared with the same number of steps without memories. Reader: a trained model of the demo is asked about clips that
it no longer sees. Settings of the writes were chosen on other walks (seed 500, six walks).
"""

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from keye.dream.model import DreamConfig
from keye.dream.picture import draw_walk
from keye.errors import run
from keye.files import write_atomically
from scripts.bench.common.intervals import paired_interval
from scripts.bench.common.record import ROOT, Claim, Table, arguments, out_of, save
from scripts.bench.systems.dream_reader import ARMS as READER
from scripts.bench.systems.dream_reader import FAMILIES, read_arm
from scripts.bench.systems.dream_walks import ARMS, LOOPED, draw_walks, dream_frames, trained_model, walk_arm
from stages.dream.recipe import DreamRecipe, LoopRecipe
from stages.optimizer import OptimizerConfig

EXAMPLES = """examples:
  python -m scripts.bench.systems.dream --run runs/demo       three seeds; finished arms are read, not repeated
  python -m scripts.bench.systems.dream --seeds 0             one seed
  python -m scripts.bench.systems.dream --page                only the results, from the arms that are finished
  python -m scripts.bench.systems.dream --quick               shows that it runs
"""
SCRATCH = ROOT / ".cache" / "bench" / "systems" / "dream"
MEASURES = ("PSNR", "PSNR from memory", "PSNR of the last view", "consistency", "cuts", "seconds")
DREAMED = ("no memory", "temporary LoRA", "copy last frame")


def recipe_of(seed: int, quick: bool) -> DreamRecipe:
    """The recipe of a seed: 1,000 steps of 32 windows."""
    optimizer = OptimizerConfig(learning_rate=3e-3, warmup=50, weight_decay=0.01, betas=(0.9, 0.99))
    loop = LoopRecipe(rounds=2, episodes=4, updates=12)
    recipe = DreamRecipe("dream", optimizer, seed=seed, steps=1000, loop=loop)
    if not quick:
        return recipe
    fast = dataclasses.replace(recipe.fast, steps=1, draws=2, sampling_steps=2)
    loop = LoopRecipe(rounds=1, episodes=1, updates=1, group=1, draws=1)
    small = DreamConfig(width=16, depth=1, heads=2)
    return dataclasses.replace(recipe, steps=3, batch=4, fast=fast, loop=loop, model=small)


def measured(path: Path, make: Callable[[], Any], page: bool) -> Any:
    """What `make` gives, from `path` if it has been made; None if it has not and only the page is wanted."""
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    if page:
        return None
    print(f"{path.parent.name}: {path.stem}", flush=True)
    found = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(found))
    return found


def walk_results(seed: int, count: int, quick: bool, scratch: Path, page: bool) -> dict[str, Any]:
    """Arm → measures of the walks of a seed. Keys: an arm, "dreamed: " + arm, and model + ": " + arm for the loop."""
    recipe, folder, walks = recipe_of(seed, quick), scratch / f"seed-{seed}", draw_walks(seed, count)
    jobs = {arm: ("no loop", arm, True) for arm in ARMS}
    jobs |= {f"dreamed: {arm}": ("no loop", arm, False) for arm in DREAMED}
    jobs |= {f"{kind}: {arm}": (kind, arm, True) for kind in LOOPED for arm in ARMS if arm in DREAMED[:2]}
    found = {}
    for key, (kind, arm, watched) in jobs.items():
        name = arm if kind == "no loop" and watched else key  # the same arm is measured once

        def make(kind: str = kind, arm: str = arm, watched: bool = watched) -> list[dict[str, float]]:
            return walk_arm(trained_model(recipe, folder, kind), walks, arm, recipe.fast, seed, watched)

        found[key] = measured(folder / f"{_plain(name)}.json", make, page)
    return {key: rows for key, rows in found.items() if rows is not None}


def spent(scratch: Path, seconds: float) -> float:
    """Seconds of all calls that have finished, with this one."""
    path = scratch / "seconds.json"
    total = seconds + (json.loads(path.read_text()) if path.exists() else 0.0)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(total))
    return total


def reader_results(run: Path | None, seed: int, each: int, steps: int, scratch: Path, page: bool) -> dict[str, Any]:
    """Arm → results of the reader, of the arms that are finished or, with a run, all."""
    found = {}
    for arm in READER:
        path = scratch / f"seed-{seed}" / f"reader_{_plain(arm)}.json"
        if run is not None or path.exists():
            found[arm] = measured(path, lambda arm=arm: read_arm(run, arm, seed, each, steps), page)
    return {arm: rows for arm, rows in found.items() if rows is not None}


def _plain(name: str) -> str:
    return "".join(character if character.isalnum() else "_" for character in name)


def summary(seeds: Sequence[dict[str, Any]], key: str, measure: str) -> str:
    """The mean over seeds and walks of a measure."""
    values = [row[measure] for found in seeds if key in found for row in found[key]]
    return f"{np.nanmean(values):.2f}" if values else "–"


def difference(seeds: Sequence[dict[str, Any]], one: str, other: str, measure: str) -> str:
    """One arm minus another on the same walks, with its 95 % interval."""
    found = [found for found in seeds if one in found and other in found]
    pairs = [
        a[measure] - b[measure] for rows in found for a, b in zip(rows[one], rows[other], strict=True)
    ]  # fmt: skip
    pairs = [value for value in pairs if np.isfinite(value)]
    if not pairs:
        return "–"
    low, high = paired_interval(np.array(pairs))
    return f"{np.mean(pairs):+.2f} ({low:+.2f} … {high:+.2f}), {len(pairs)} walks"


def walk_tables(seeds: Sequence[dict[str, Any]]) -> list[Table]:
    """Watched walks, dreamed walks and the loop."""
    memory = "PSNR from memory"
    against = [
        (arm, *(summary(seeds, arm, name) for name in MEASURES), difference(seeds, arm, "no memory", memory))
        for arm in ARMS
    ]
    dreamed = [
        (arm, *(summary(seeds, f"dreamed: {arm}", name) for name in ("consistency", "cuts", "seconds")))
        for arm in DREAMED
    ]
    loops = [
        (
            kind,
            *(summary(seeds, f"{kind}: {arm}", memory) for arm in DREAMED[:2]),
            difference(seeds, f"{kind}: temporary LoRA", f"{kind}: no memory", memory),
        )
        for kind in LOOPED
    ]
    return [
        Table(
            "Watched way out, generated way back: means over walks; PSNR in dB, processor seconds of a walk",
            ("arm", *MEASURES, "PSNR from memory against no memory"),
            against,
        ),
        Table(
            "All but the first frame generated: agreement with itself, not with a truth",
            ("arm", "consistency", "cuts", "seconds"),
            dreamed,
        ),
        Table(
            "The slow-fast loop: PSNR from memory of three models",
            ("model", "no memory", "temporary LoRA", "gain by the memory"),
            loops,
        ),
    ]


def reader_right(found: Sequence[dict[str, Any]]) -> dict[str, dict[str, list[int]]]:
    """Arm → family → 1 or 0 for each question, over the seeds that have all arms; empty without such a seed."""
    seeds = [part for part in found if len(part) == len(READER)]
    return {
        arm: {family: [value for part in seeds for value in part[arm]["right"][family]] for family in FAMILIES}
        for arm in (READER if seeds else ())
    }


def against_nothing(right: dict[str, dict[str, list[int]]], arm: str) -> str:
    """Difference of an arm to no memory in points, with its 95 % interval over questions."""
    one, none = (100.0 * np.concatenate([right[each][family] for family in FAMILIES]) for each in (arm, "nothing"))
    low, high = paired_interval(one - none)
    return f"{(one - none).mean():+.1f} ({low:+.1f} … {high:+.1f})"


def reader_table(found: Sequence[dict[str, Any]]) -> list[Table]:
    """Right answers by family of every arm of the reader."""
    right = reader_right(found)
    if not right:
        return []
    rows = []
    for arm, cells in right.items():
        shares = [f"{100 * np.mean(cells[family]):.0f}" for family in FAMILIES]
        every = 100 * np.mean([value for values in cells.values() for value in values])
        rows.append((arm, *shares, f"{every:.1f}", against_nothing(right, arm)))
    one = next(part["nothing"] for part in found if len(part) == len(READER))
    size = f"{one['bytes']:,} bytes of memory, {one['tokens']} tokens of the same size"
    return [
        Table(
            "Questions about a clip that has left the context, right answers in %, "
            f"{len(right['nothing'][FAMILIES[0]])} clips a family; {size}",
            ("arm", *FAMILIES, "all", "all, against nothing (95 %)"),
            rows,
        )
    ]


def claims(seeds: Sequence[dict[str, Any]], readers: Sequence[dict[str, Any]]) -> list[Claim]:
    """What was measured, without a goal."""
    memory, right = "PSNR from memory", reader_right(readers)
    return [
        Claim("temporary LoRA against no memory, PSNR from memory in dB", "",
              difference(seeds, "temporary LoRA", "no memory", memory)),
        Claim("temporary LoRA against the memory of another walk", "",
              difference(seeds, "temporary LoRA", "temporary LoRA of another walk", memory)),
        Claim("both directions against the published write", "",
              difference(seeds, "both directions (ours)", "temporary LoRA", memory)),
        Claim("loop against the same steps without memory, both with a temporary LoRA", "",
              difference(seeds, "loop: temporary LoRA", "same steps without memory: temporary LoRA", memory)),
        *(Claim(f"a clip that has left the context: {arm} against nothing, points", "", against_nothing(right, arm))
          for arm in READER[:3] if right),
    ]  # fmt: skip


def picture(seed: int, quick: bool, scratch: Path, out: Path) -> None:
    """Draw the first circling walk of a seed with each arm."""
    recipe = recipe_of(seed, quick)
    model = trained_model(recipe, scratch / f"seed-{seed}", "no loop")
    walks = draw_walks(seed, 4)
    shown = {}
    for arm in ARMS:
        settings = dataclasses.replace(recipe.fast, write=ARMS[arm])
        shown[arm] = dream_frames(model, walks[1], walks[3], arm, settings, seed * 1000 + 1)
    out.mkdir(parents=True, exist_ok=True)
    draw_walk(walks[1], shown, out / "dream.png", "the way out is watched, the last chunk (red) generated")


def main() -> None:
    parser = arguments(__doc__, EXAMPLES, results="systems")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds (default 0 1 2)")
    parser.add_argument("--walks", type=int, default=8, help="walks of a seed (default 8)")
    parser.add_argument(
        "--run", type=Path, default=Path("runs/demo"), help="a run of the demo, for the reader (default runs/demo)"
    )
    parser.add_argument("--clips", type=int, default=6, help="clips of a family and seed, for the reader (default 6)")
    parser.add_argument("--page", action="store_true", help="measure nothing; only the results of what is finished")
    args = parser.parse_args()
    began = time.monotonic()
    scratch = SCRATCH.with_name("dream_quick") if args.quick else SCRATCH
    count, chosen = (2, args.seeds[:1]) if args.quick else (args.walks, args.seeds)
    seeds = [walk_results(seed, count, args.quick, scratch, args.page) for seed in chosen]
    each, steps = (1, 1) if args.quick else (args.clips, 30)
    reader_run = args.run if (args.run / "annealing/model").is_dir() else None
    if reader_run is None:
        print(f"without the reader: {args.run} is no finished demo; name one with --run", flush=True)
    readers = [reader_results(reader_run, seed, each, steps, scratch, args.page) for seed in chosen]
    out = out_of(args)
    if not args.page:
        picture(chosen[0], args.quick, scratch, out)
    notes = [
        f"A model of half a million parameters, 1,000 steps of 32 windows for each seed; {count} walks a seed, half of"
        " them circling. A write is 20 Adam steps of 8 draws, rank 32, learning rate 3e-3. PSNR from memory counts"
        " pixels that were seen before and that the four past frames do not show.",
        "The reader's memory is written with the model's own answers to questions of all families in other words, rank"
        ' 2 on the query and value matrices, 30 steps. "Of other families" has no probe of the question\'s family;'
        ' "the answers as text" has all probes and answers in the context, which the model was not trained for.',
    ]
    tables = [*walk_tables(seeds), *reader_table(readers)]
    save(
        out, "dream", claims(seeds, readers), tables,
        seconds=spent(scratch, time.monotonic() - began), quick=args.quick,
        seeds={"weights, walks and noise": ", ".join(map(str, chosen))}, notes=notes,
    )  # fmt: skip


if __name__ == "__main__":
    run(main)
