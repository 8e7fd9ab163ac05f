"""The phases of post-training on one start model: SFT, MPO, GSPO, hints, a second iteration, and controls.

Every way starts with the annealed model of a tiny pre-training run and trains on the questions of its world. All models
answer the same held-out questions, which are drawn for this study: greedily and four times at temperature 1. The
controls are GRPO, GSPO with a random reward, and supervised training for the processor time of GSPO. Differences are
paired by question; their intervals are by bootstrap over the questions, each with its mean over the seeds.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from keye.errors import RecipeError, run
from keye.files import write_atomically
from scripts.bench.common.intervals import paired_interval
from scripts.bench.common.record import ROOT, Claim, Table, arguments, out_of, save

EXAMPLES = """examples:
  python -m scripts.bench.rl.phases --run runs/demo            a run of scripts/demo; resumes where it was stopped
  python -m scripts.bench.rl.phases --run runs/demo --jobs 2   two ways at the same time
  python -m scripts.bench.rl.phases --run runs/demo --quick    shows that it runs
"""
SCRATCH = ROOT / ".cache" / "bench" / "rl" / "phases"
FAMILIES = ("read", "count", "order", "when", "find", "image_read")  # those that tiny.toml trains on
OTHERS = ("motion", "image_ground", "image_place")  # not trained on: do they suffer?
SEEDS = (0, 1, 2)
EACH, QUICK_EACH = 60, 2
GRPO_RATE = "gspo.learning_rate=1e-4"
TEST_SEED = 102  # of the held-out questions
SAMPLES, NEW_TOKENS = 4, 32
BEFORE = "before"
TINY, POST = ROOT / "rl/recipes/tiny.toml", ROOT / "rl/recipes/tiny_post.toml"
COMMON = (f"gspo.families={json.dumps(FAMILIES)}", "heldout.limit=1", "heldout.samples=1", "gspo.checkpoint_every=1000")
QUICK = ("gspo.steps=1", "gspo.prompts=4", "gspo.mini_batches=1", "gspo.max_new_tokens=6")
SFT_STEPS = 65  # they take the processor time of 45 steps of GSPO, see the table


@dataclass(frozen=True)
class Way:
    """One way to train.

    train: (folder, seed, quick) → name of a phase's model → processor seconds until it was there; None with one model.
    models: name in the tables → folder of the model. needs: the way whose model it starts with.
    """

    train: Callable[[Path, int, bool], dict[str, float] | None]
    models: dict[str, str]
    needs: str = ""


def _gspo(out: Path, seed: int, quick: bool, *given: str) -> None:
    from rl.phases import post_train
    from rl.recipe import load

    post_train(load(TINY, [*COMMON, f"seed={seed}", *given, *(QUICK if quick else ())]), out)


def _chain(out: Path, seed: int, quick: bool) -> dict[str, float]:
    from rl.phases import post_train

    recipe, began, taken = _post(seed, quick, f"sft.steps={SFT_STEPS}"), _cpu(), {}
    for label, phase in zip(CHAIN, recipe.phases, strict=True):
        post_train(recipe, out, phase)
        taken[label] = _cpu() - began
    return taken


def _post(seed: int, quick: bool, *given: str) -> Any:
    """tiny_post.toml on the families of this study."""
    from rl.recipe import load

    families = json.dumps(FAMILIES)
    more = (f"sft.families={families}", f"mpo.families={families}", f"seed={seed}")
    small = ("sft.steps=2", "mpo.steps=2", "mpo.sampling.limit=24", *QUICK)
    recipe = load(POST, [*COMMON, *more, *given, *(small if quick else ())])
    [source] = recipe.sft.data.sources
    data = replace(recipe.sft.data, sources=(replace(source, families=FAMILIES),))
    return replace(recipe, sft=replace(recipe.sft, data=data))


def _random_reward(out: Path, seed: int, quick: bool) -> None:
    from rl.rewards import Judgement, register

    draw = random.Random(seed)

    @register("coin")
    class Coin:
        """1 or 0 with equal probability, whatever the answer."""

        def __call__(self, judgement: Judgement) -> float:
            return float(draw.random() < 0.5)

    _gspo(out, seed, quick, "rewards.coin=1.0", "rewards.accuracy=0.0", "rewards.format=0.0")


def _hints(update: str) -> Callable[[Path, int, bool], None]:
    def train(out: Path, seed: int, quick: bool) -> None:
        from keye.world.hints import world_hints

        hinted = out / "hinted.jsonl"
        if not hinted.exists():
            lines = [json.loads(raw) for raw in (out / "world/train.jsonl").read_text(encoding="utf-8").splitlines()]
            rows = [_absolute(line, out / "world") for line in lines if line.get("family") in FAMILIES]
            rows = [row | {"hints": world_hints(row), "trusted": True} for row in rows]
            write_atomically(hinted, "".join(json.dumps(row) + "\n" for row in rows))
        _gspo(out, seed, quick, f'hints.update="{update}"', 'gspo.manifest="hinted.jsonl"')

    return train


def _absolute(line: dict[str, Any], world: Path) -> dict[str, Any]:
    """A line whose media do not depend on the folder of its manifest."""

    def located(part: dict[str, Any]) -> dict[str, Any]:
        kind = part["type"]
        return part | {kind: str((world / part[kind]).resolve())} if kind in ("image", "video") else part

    content = [located(part) for part in line["messages"][0]["content"]]
    return line | {"messages": [line["messages"][0] | {"content": content}, *line["messages"][1:]]}


def _second(out: Path, seed: int, quick: bool) -> None:
    from rl.iterate import Rounds, iterate

    first = out / "gspo"
    if not first.exists():
        first.symlink_to((out.parent / "gspo/gspo").resolve())
    recipe = _post(seed, quick, "sft.steps=30", "gspo.steps=45")
    iterate(recipe, out, Rounds(number=1, limit=24 if quick else 800))


CHAIN = ("SFT", "SFT → MPO", "SFT → MPO → GSPO")
WAYS: dict[str, Way] = {
    "gspo": Way(_gspo, {"GSPO": "gspo/model"}),
    "random": Way(_random_reward, {"GSPO, random reward": "gspo/model"}),
    "chain": Way(_chain, dict(zip(CHAIN, ("sft/model", "mpo/model", "gspo/model"), strict=True))),
    "hinted": Way(_hints("hinted"), {"GSPO with hints, hinted update": "gspo/model"}),
    "original": Way(_hints("original"), {"GSPO with hints, original update": "gspo/model"}),
    "grpo": Way(lambda *a: _gspo(*a, 'gspo.loss="grpo"', GRPO_RATE), {"GRPO": "gspo/model"}),
    "second": Way(_second, {"second iteration after GSPO": "rounds/1/gspo/model"}, needs="gspo"),
}  # fmt: skip


# --- one way ----------------------------------------------------------------------------------------------------------


def one(name: str, seed: int, source: Path, scratch: Path, quick: bool) -> dict[str, Any]:
    """Train a way and measure its models."""
    out = scratch / str(seed) / name
    out.mkdir(parents=True, exist_ok=True)
    for part in ("annealing", "world"):
        if not (out / part).exists():
            (out / part).symlink_to((source / part).resolve())
    from stages.distributed import engine

    engine.start(threads=1)
    models = {BEFORE: "annealing/model"} if name == BEFORE else WAYS[name].models
    began, taken = _cpu(), None
    if name != BEFORE:
        taken = WAYS[name].train(out, seed, quick)
    cpu = taken or dict.fromkeys(models, _cpu() - began)
    each = QUICK_EACH if quick else EACH
    found = {label: measure(out / folder, scratch / "test/heldout.jsonl", each) for label, folder in models.items()}
    engine.stop()
    return {"cpu": cpu, "models": found, "hints": _hint_shares(out / "gspo/metrics.jsonl")}


def _cpu() -> float:
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def measure(model: Path, manifest: Path, each: int) -> list[dict[str, Any]]:
    """Of each question: id, family, accuracy of the greedy answer and mean accuracy of the sampled ones."""
    from rl.preference.phase import Answerer
    from rl.questions.heldout import ask
    from rl.questions.prompts import load_prompts
    from rl.rewards import rewards_from
    from stages.distributed.weights import open_start

    answerer = Answerer(open_start(model), "fp32", 256)
    prompts = load_prompts(manifest, unique=True).prompts
    chosen = [p for f in (*FAMILIES, *OTHERS) for p in [q for q in prompts if q.family == f][:each]]
    reward = rewards_from({"accuracy": 1.0})
    rows, rejected = ask(answerer.rollout, chosen, answerer.encode, reward, SAMPLES, 1.0, NEW_TOKENS, lambda _: None)
    if rejected:
        raise RecipeError(f"{manifest}: {next(iter(rejected.values()))}")
    return [{"id": r.id, "family": r.family, "greedy": r.greedy_accuracy, "sampled": r.sampled_accuracy} for r in rows]


def _hint_shares(metrics: Path) -> dict[str, float]:
    """Mean over the steps of each metric of hints."""
    if not metrics.exists():
        return {}
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    names = sorted({name for row in rows for name in row if name.startswith("hints/")})
    return {name: fmean(row[name] for row in rows if row.get(name) is not None) for name in names}


def train_all(args: argparse.Namespace, seeds: Sequence[int], scratch: Path) -> dict[tuple[int, str], dict[str, Any]]:
    """Every way with every seed, each in a process of its own, `args.jobs` at a time; finished ones are read."""

    def work(seed: int, name: str) -> None:
        file = scratch / str(seed) / f"{name}.json"
        if file.exists():
            return
        options = ["--run", str(args.run), "--scratch", str(scratch), "--one", str(seed), name]
        command = [sys.executable, "-m", "scripts.bench.rl.phases", *options, *(["--quick"] if args.quick else [])]
        began = time.monotonic()
        with (scratch / f"{seed}-{name}.log").open("w") as log:
            done = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=os.environ)
        if done.returncode:
            raise RecipeError(f"seed {seed}, {name} ended with {done.returncode}: see {log.name}")
        print(f"seed {seed}, {name}: {time.monotonic() - began:.0f} s", flush=True)

    names = [BEFORE, *WAYS]
    later = [name for name in names if name in WAYS and WAYS[name].needs]
    for part in ([name for name in names if name not in later], later):
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda pair: work(*pair), [(seed, name) for seed in seeds for name in part]))
    return {
        (seed, name): json.loads((scratch / str(seed) / f"{name}.json").read_text(encoding="utf-8"))
        for seed in seeds for name in names
    }  # fmt: skip


# --- the page ---------------------------------------------------------------------------------------------------------


def table_of(
    found: dict[tuple[int, str], dict[str, Any]], seeds: Sequence[int], families: Sequence[str]
) -> dict[str, np.ndarray]:
    """Accuracies in percent: model → float [seeds, questions, 2 (sampled, greedy)]."""
    made: dict[str, np.ndarray] = {}
    for name in (BEFORE, *WAYS):
        for label in found[seeds[0], name]["models"]:
            rows = [[r for r in found[s, name]["models"][label] if r["family"] in families] for s in seeds]
            made[label] = np.array([[[100 * r["sampled"], 100 * r["greedy"]] for r in part] for part in rows])
    return made


def against(made: dict[str, np.ndarray], one: str, other: str, kind: int = 0) -> str:
    """The paired difference of two models with its 95 % interval."""
    difference = (made[one] - made[other])[..., kind].mean(0)
    low, high = paired_interval(difference)
    return f"{difference.mean():+.1f} ({low:+.1f} … {high:+.1f})"


def low_of(made: dict[str, np.ndarray], one: str, other: str) -> float:
    return paired_interval((made[one] - made[other])[..., 0].mean(0))[0]


def tables(
    found: dict[tuple[int, str], dict[str, Any]], seeds: Sequence[int]
) -> tuple[list[Table], dict[str, np.ndarray]]:
    """Accuracy of every model, by family, the comparisons, and the shares of hints."""
    made, others = (table_of(found, seeds, families) for families in (FAMILIES, OTHERS))
    cpu = {
        label: fmean(found[s, name]["cpu"][label] for s in seeds)
        for name in (BEFORE, *WAYS)
        for label in found[seeds[0], name]["models"]
    }
    rows = [
        (
            label, f"{x[..., 0].mean():.1f}", " · ".join(f"{one:.1f}" for one in x[..., 0].mean(1)),
            against(made, label, BEFORE) if label != BEFORE else "–", f"{x[..., 1].mean():.1f}",
            against(made, label, BEFORE, 1) if label != BEFORE else "–",
            against(others, label, BEFORE) if label != BEFORE else f"{others[BEFORE][..., 0].mean():.1f}",
            f"{cpu[label]:.0f}",
        )
        for label, x in made.items()
    ]  # fmt: skip
    columns = (
        "model", "sampled", "by seed", "gain (95 %)", "greedy", "gain (95 %)", "other families, gain", "processor s",
    )  # fmt: skip
    pairs = [(a, b) for a, b in COMPARED if a in made and b in made]
    compared = [(f"{a} − {b}", against(made, a, b), against(made, a, b, 1)) for a, b in pairs]
    family_rows = []
    for label in made:
        one = [table_of(found, seeds, (family,))[label][..., 0].mean() for family in (*FAMILIES, *OTHERS)]
        family_rows.append((label, *(f"{x:.0f}" for x in one)))
    shares = []
    for update in ("hinted", "original"):
        means = [fmean(found[s, update]["hints"].get(f"hints/{key}", 0) for s in seeds) for key in HINTS]
        shares.append((update, *(f"{100 * mean:.1f}" for mean in means)))
    return [
        Table("Held-out accuracy, percent", columns, rows),
        Table("Paired differences, points (95 %)", ("models", "sampled", "greedy"), compared),
        Table("Sampled accuracy by family, percent", ("model", *FAMILIES, *OTHERS), family_rows),
        Table("Questions without a right answer while GSPO trains with hints, percent",
              ("update", "failed", "asked again", *(f"still wrong after level {n}" for n in range(1, 6))), shares),
    ], made  # fmt: skip


HINTS = ("failed", "tried", *(f"wrong_{level}" for level in range(1, 6)))
COMPARED = (
    ("GSPO", "GRPO"), ("GSPO", "GSPO, random reward"), ("GSPO", "SFT"), ("SFT → MPO", "SFT"),
    ("SFT → MPO → GSPO", "SFT → MPO"), ("GSPO with hints, hinted update", "GSPO"),
    ("GSPO with hints, original update", "GSPO"),
    ("GSPO with hints, hinted update", "GSPO with hints, original update"), ("second iteration after GSPO", "GSPO"),
)  # fmt: skip


def claims(made: dict[str, np.ndarray]) -> list[Claim]:
    """Each phase against the model that it starts with, and GSPO against its controls."""
    wanted = [("GSPO", BEFORE), ("SFT", BEFORE), *COMPARED]
    return [
        Claim(
            f"{a} − {b}, held-out accuracy in points", "above 0 (95 %)", against(made, a, b), met=low_of(made, a, b) > 0
        )
        for a, b in wanted
    ]


def draw_test(source: Path, out: Path, each: int) -> None:
    """Held-out questions of the run's world with a seed that no run has."""
    from keye.world import generate

    if (out / "heldout.jsonl").exists():
        return
    settings = json.loads((source / "world/world.json").read_text(encoding="utf-8"))["settings"]
    counts = dict.fromkeys((*FAMILIES, *OTHERS), each)
    generate(out, "heldout", counts=counts, seed=TEST_SEED, **settings)


def main() -> None:
    parser = arguments(__doc__, EXAMPLES, results="rl")
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="a run with annealing/model and world")
    parser.add_argument("--scratch", type=Path, help="folder of the runs (default: .cache/bench/rl/phases)")
    parser.add_argument("--jobs", type=int, default=1, help="ways that train at the same time, one thread each (1)")
    parser.add_argument("--seeds", type=int, nargs="+", help="seeds (0 1 2; 0 with --quick)")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not (args.run / "annealing/model/config.json").is_file():
        raise RecipeError(f"{args.run} has no annealing/model: give a run of scripts/demo with --run")
    scratch = args.scratch or (SCRATCH.with_name("phases_quick") if args.quick else SCRATCH)
    scratch = scratch.resolve()
    if args.one:
        seed, name = int(args.one[0]), args.one[1]
        found = one(name, seed, args.run, scratch, args.quick)
        write_atomically(scratch / str(seed) / f"{name}.json", json.dumps(found))
        return
    seeds = tuple(args.seeds or ((0,) if args.quick else SEEDS))
    scratch.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    draw_test(args.run, scratch / "test", QUICK_EACH if args.quick else EACH)
    results = train_all(args, seeds, scratch)
    listed, made = tables(results, seeds)
    questions = made[BEFORE].shape[1]
    notes = [
        f"{questions} held-out questions of the trained families ({', '.join(FAMILIES)}), drawn with seed {TEST_SEED}; "
        f"{SAMPLES} sampled answers at temperature 1 and a greedy one each. One start model; the seeds are of the "
        "order of questions and of sampling. Intervals are over questions, each with its mean over the seeds. "
        f"Recipes: rl/recipes/tiny.toml (GSPO and its variants) and rl/recipes/tiny_post.toml (SFT, MPO, the chain and "
        f"the second iteration), on the same families; SFT has {SFT_STEPS} steps, so that it is the control at equal "
        "compute. Processor seconds are those of a model's whole way from the start model, without evaluation; the "
        "second iteration adds to those of GSPO. Chosen on another seed and other held-out questions (seed 103): the "
        "learning rates, of 1e-4, 2e-4 and 4e-4 for GSPO and GRPO, of 1e-4 to 1e-3 for SFT, 5e-5 or 2e-4 for MPO.",
        "Random reward: each answer earns 1 or 0 with equal probability. Hints are those of keye.world.hints; the "
        "start model has never read a hint (the part `hints` measures one that has).",
    ]
    save(out_of(args), "phases", claims(made), listed, seconds=time.monotonic() - began, quick=args.quick,
         seeds={"training": ", ".join(map(str, seeds)), "held-out questions": TEST_SEED}, notes=notes)  # fmt: skip


if __name__ == "__main__":
    run(main)
