"""Does a policy go blind where the words of questions give the answer away, and does the guard keep it looking?

The start model is a tiny pre-trained one. In the training questions of two families a sentence names an answer,
"Someone says red.". For a share of them it is the right one, and their clip is that of another question, as where the
sampled frames miss the event. Otherwise, and in all held-out questions, the named answer is drawn at random: only the
frames say what is right. Three seeds train without a guard and three with blindness.guard = "drop". At the end each
policy answers held-out questions with frames, as text, and with zeroed pixels; the smallest difference is its gap.
"""

import json
import random
import shutil
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from keye.errors import RecipeError, run
from keye.files import write_atomically
from scripts.bench.common.intervals import paired_interval
from scripts.bench.common.record import ROOT, Claim, Table, arguments, out_of, save

EXAMPLES = """examples:
  python -m scripts.bench.rl.blindness --run runs/demo            a run of scripts/demo; resumes where it was stopped
  python -m scripts.bench.rl.blindness --run runs/demo --quick    shows that it runs
"""
SCRATCH = ROOT / ".cache" / "bench" / "rl" / "blindness"
OPTIONS = {
    "find": ("white", "purple", "blue", "yellow", "red", "green"),
    "motion": ("left", "right", "up", "down"),
}
SHARE = 0.9  # of the training questions that name the right answer
BLIND = 0.1  # a policy with a smaller gap counts as blind
GUARDS = ("off", "drop")
REMOVED = ("blind", "zeroed")
SETTINGS = (
    "gspo.prompts=16", "gspo.mini_batches=2", "gspo.learning_rate=4e-4", 'gspo.freeze=["visual"]', "gspo.families=[]",
    "gspo.checkpoint_every=10", "heldout.limit=30", "heldout.samples=1", "blindness.every=10",
    "blindness.questions=60", "blindness.samples=4", 'blindness.controls=["blind", "zeroed"]',
)  # fmt: skip
GUARDED = ('blindness.guard="drop"', "blindness.drop_above=0.75", "gspo.extra_prompts=32")


def plant(world: Path, out: Path, seed: int) -> dict[str, int]:
    """Write `world/{train,heldout}.jsonl` of the study to `out/world`; counts of questions and of planted ones."""
    counts = {}
    (out / "world").mkdir(parents=True, exist_ok=True)
    for split in ("train", "heldout"):
        draw = random.Random(f"{seed}/{split}")
        lines = (json.loads(line) for line in (world / f"{split}.jsonl").read_text(encoding="utf-8").splitlines())
        rows = [row for row in lines if row.get("family") in OPTIONS]
        if not rows:
            raise RecipeError(f"{world}/{split}.jsonl has no question of the families {', '.join(OPTIONS)}")
        planted = [split == "train" and draw.random() < SHARE for _ in rows]
        clips = {family: [_clip(row) for row in rows if row["family"] == family] for family in OPTIONS}
        text = "".join(
            json.dumps(_question(row, leaked, clips[row["family"]], world, draw)) + "\n"
            for row, leaked in zip(rows, planted, strict=True)
        )
        (out / f"world/{split}.jsonl").write_text(text, encoding="utf-8")
        counts |= {split: len(rows), f"{split} planted": sum(planted)}
    return counts


def _clip(row: dict[str, Any]) -> str:
    return next(part["video"] for part in row["messages"][0]["content"] if part["type"] == "video")


def _question(row: dict[str, Any], leaked: bool, clips: list[str], world: Path, draw: random.Random) -> dict[str, Any]:
    """A row with a named answer; a planted one names the right answer and shows another question's clip."""
    words = next(part["text"] for part in row["messages"][0]["content"] if part["type"] == "text")
    named = row["answer"] if leaked else draw.choice(OPTIONS[row["family"]])
    clip = draw.choice(clips) if leaked else _clip(row)
    content = [
        {"type": "video", "video": str((world / clip).resolve())},
        {"type": "text", "text": f"{words} Someone says {named}."},
    ]
    question = {key: row[key] for key in ("id", "family", "answer")}
    return question | {"messages": [{"role": "user", "content": content}]}


def train(start: Path, out: Path, seed: int, guard: str, steps: int) -> dict[str, Any]:
    """One run: its metrics, and the answers of the first and the last policy; it resumes after an end."""
    from rl.recipe import load
    from rl.trainer import GspoTrainer

    if not (out / "annealing").exists():
        shutil.rmtree(out, ignore_errors=True)
        plant(start / "world", out, seed)
        (out / "annealing").symlink_to((start / "annealing").resolve())
    given = [*SETTINGS, f"seed={seed}", f"gspo.steps={steps}", *(GUARDED if guard == "drop" else ())]
    trainer = GspoTrainer(load(ROOT / "rl/recipes/tiny.toml", given), out)
    first = out.parent / f"before-{seed}.json"
    if not first.exists():  # both guards start with the same policy and ask the same questions
        first.write_text(json.dumps(measure(trainer)), encoding="utf-8")
    trainer.train()
    rows = [json.loads(line) for line in (out / "gspo/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {"before": json.loads(first.read_text(encoding="utf-8")), "after": measure(trainer), "curve": rows}


def measure(trainer: Any) -> list[dict[str, float]]:
    """Accuracy of the policy on each held-out question with its frames and under each control."""
    return trainer.blindness.measure()


def gaps(rows: list[dict[str, float]]) -> np.ndarray:
    """Of each question: accuracy with frames minus that under the control with the higher mean, float [N]."""
    control = max(REMOVED, key=lambda name: fmean(row[name] for row in rows))
    return np.array([row["none"] - row[control] for row in rows])


def onset(curve: list[dict[str, Any]]) -> str:
    """The step at which the guard "stop" would end the run: the second probe in succession with a small gap."""
    probes = [row for row in curve if "gap/smallest" in row]
    low = [row["gap/smallest"] < BLIND for row in probes]
    return next((str(probes[i]["step"]) for i in range(1, len(low)) if low[i] and low[i - 1]), "–")


def tables(found: dict[tuple[int, str], dict[str, Any]]) -> list[Table]:
    """Every run, then the gap in the course of training."""
    rows = []
    for (seed, guard), result in found.items():
        start, end = gaps(result["before"]), gaps(result["after"])
        low, high = paired_interval(end)
        last = result["curve"][-10:]
        seen = [fmean(row["none"] for row in result[name]) for name in ("before", "after")]
        rewards = [fmean(row["reward_mean"] for row in part) for part in (result["curve"][:10], last)]
        rows.append(
            (
                *(seed, guard, f"{rewards[0]:.2f} → {rewards[1]:.2f}", f"{seen[0]:.2f} → {seen[1]:.2f}"),
                *(f"{start.mean():+.2f}", f"{end.mean():+.2f} ({low:+.2f} … {high:+.2f})", onset(result["curve"])),
            )
        )
    columns = (
        *("seed", "guard", "training reward, first → last ten steps", "held-out accuracy"),
        *("gap before", "gap after (95 %)", "step of the guard stop"),
    )
    steps = [row["step"] for row in next(iter(found.values()))["curve"] if "gap/smallest" in row]
    curves = [
        (seed, guard, *(f"{row['gap/smallest']:+.2f}" for row in result["curve"] if "gap/smallest" in row))
        for (seed, guard), result in found.items()
    ]
    return [
        Table("Each run", columns, rows),
        Table("Gap at the probes", ("seed", "guard", *(f"step {step}" for step in steps)), curves),
    ]


def claims(found: dict[tuple[int, str], dict[str, Any]]) -> list[Claim]:
    """How many seeds end blind with and without the guard, and the paired difference of their gaps."""
    seeds = sorted({seed for seed, _ in found})
    ends = {key: gaps(result["after"]) for key, result in found.items()}
    blind = {guard: sum(ends[seed, guard].mean() < BLIND for seed in seeds) for guard in GUARDS}
    difference = np.stack([ends[seed, "drop"] - ends[seed, "off"] for seed in seeds]).mean(0)
    low, high = paired_interval(difference)
    return [
        Claim(
            "Seeds that end blind without the guard",
            f"{len(seeds)} of {len(seeds)}",
            f"{blind['off']} of {len(seeds)}",
            met=blind["off"] == len(seeds),
        ),
        Claim(
            "Seeds that end blind with the guard", f"0 of {len(seeds)}", f"{blind['drop']} of {len(seeds)}",
            met=blind["drop"] == 0,
        ),
        Claim(
            "Gap with the guard minus gap without it, paired by question",
            "above 0 (95 %)",
            f"{difference.mean():+.2f} ({low:+.2f} … {high:+.2f})",
            met=low > 0,
        ),
    ]  # fmt: skip


def main() -> int:
    parser = arguments(__doc__, EXAMPLES, results="rl")
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="a run with annealing/model and world")
    parser.add_argument("--steps", type=int, default=30, help="steps of a run (default: %(default)s)")
    parser.add_argument("--scratch", type=Path, help="folder of the six runs (default: .cache/bench/rl/blindness)")
    args = parser.parse_args()
    if not (args.run / "annealing/model/config.json").is_file():
        raise RecipeError(f"{args.run} has no annealing/model: give a run of scripts/demo with --run")
    seeds, steps = ((0,), 10) if args.quick else ((0, 1, 2), args.steps)
    scratch = args.scratch or (SCRATCH.with_name("blindness_quick") if args.quick else SCRATCH)
    from stages.distributed import engine

    engine.start(threads=1)
    found = {}
    for seed in seeds:
        for guard in GUARDS:
            out = scratch / f"{seed}-{guard}"
            if not (out / "result.json").exists():
                result = train(args.run, out, seed, guard, steps)
                write_atomically(out / "result.json", json.dumps(result))
            found[seed, guard] = json.loads((out / "result.json").read_text(encoding="utf-8"))
    seconds = sum(row["seconds"] + row.get("seconds_probes", 0) for one in found.values() for row in one["curve"])
    questions = len(next(iter(found.values()))["after"])
    notes = [
        f"{SHARE:.0%} of the training questions name the right answer and show another question's clip; held-out "
        f"questions ({questions}) name a random answer. A gap is the accuracy of 4 sampled answers with frames minus "
        "that of the better of the controls text only and zeroed pixels, over the same questions; below "
        f"{BLIND} a policy counts as blind. The guard is `{' '.join(GUARDED)}`; the settings of all runs are "
        f"`{' '.join(SETTINGS)}` and {steps} steps.",
        'The last column is the step at which blindness.guard = "stop" with stop_gap = 0.1 and stop_probes = 2 would '
        "have ended the run. The duration is that of all steps and probes.",
    ]
    save(
        out_of(args), "blindness", claims(found), tables(found),
        seconds=seconds, quick=args.quick,
        seeds={"data, sampling and order": ", ".join(map(str, seeds))}, notes=notes,
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    run(main)
