"""Does a policy go blind where the words of questions give the answer away, and does the guard keep it looking?

The start model is a tiny pre-trained one. In the training questions of two families a sentence names an answer,
"Someone says red.". For a share of them (planted) it is the right one, and their clip is that of another question of
the family, as where clip and question were paired wrongly. Otherwise, and in all held-out questions, the named answer
is drawn at random: only the frames say what is right. Three seeds train without a guard and three with
blindness.guard = "drop". Each policy answers held-out questions with frames, as text, and with zeroed pixels; the
smallest difference is its gap.
"""

import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import replace
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
SHARE = 0.9  # of the training questions that are planted
BLIND = 0.1  # a policy with a smaller gap counts as blind
SEEDS = (31, 32, 33)  # others were used for the choice of the setting
GUARDS = ("off", "drop")
REMOVED = ("blind", "zeroed")
SETTINGS = (
    "gspo.prompts=16", "gspo.mini_batches=2", "gspo.learning_rate=4e-4", 'gspo.freeze=["visual"]', "gspo.families=[]",
    "gspo.kl=0.1", "gspo.checkpoint_every=10", "heldout.limit=24", "heldout.samples=1", "blindness.every=10",
    "blindness.questions=48", "blindness.samples=8", 'blindness.controls=["blind", "zeroed"]',
)  # fmt: skip
GUARDED = ('blindness.guard="drop"', "blindness.drop_gap=0.3", "gspo.extra_prompts=112")
TRIALS = (
    "Trials before the setting was fixed, with other seeds, whose runs are not among those above; gaps on 48 to 60 "
    "held-out questions. (1) Planted questions with their own clips, 80 % planted: after 90 steps without a guard "
    "the policy was not blind (held-out motion 0.98 with frames, 0.27 as text), because looking and following the "
    "words earn the same. (2) Planted questions with clips that show nothing of what is asked, 90 %: seed 100 ended "
    "at +0.04 after 40 steps without a guard and at +0.36 with drop (drop_over_chance 0.2, 48 extra questions); "
    "seed 101 was still at +0.17 after 50 steps without a guard, so it does not reliably go blind in this time. (3) "
    "Exchanged clips, 90 %, drop_above 0.75 alone, 32 extra questions, seed 0: +0.01 after 50 steps without a "
    "guard, +0.30 after 30 with it. (4) Exchanged clips with 8 questions a step, drop_above 0.5 alone and 8 extra "
    "questions, seed 2: +0.07 without a guard and +0.05 with it after 30 steps. The guard failed: a planted "
    "question that is not yet answered blind stays in the update, and one step has hardly an honest question. (5) "
    "This study with drop_over_chance 0.125, which compares with chance, and 32 extra questions, seeds 11 to 13: all "
    "blind without a guard, and one of three with it (gap with the guard minus gap without: +0.08, +0.00 to +0.16). "
    "Planted questions below the limit stay in the update. (6) drop_gap, which also compares with the step's answers "
    "with frames: seed 100 with drop_gap 0 fell from +0.29 to +0.13. With 0.125 and 48 extra questions seed 101 "
    "ended at +0.30 of +0.33, and seed 102 at +0.10 of +0.26: with 8 answers each, planted questions pass 0.125 by "
    "chance too often. With 0.3 and 112 extra questions seed 102 ended at +0.25 of +0.26 and seed 103 at +0.32 of "
    "+0.21. (7) This study with that setting, seeds 21 to 23: all blind without a guard, and one of three with it (gap "
    "with the guard minus gap without: +0.18, +0.10 to +0.28). Seed 21 did not follow the words but answered at "
    "chance; the entropy of its answers had fallen from 0.8 to 0.02. With kl = 0.1 it ended at +0.25 of +0.21. This "
    "is the setting here, kl in all runs.",
    "Not measured: the guard penalise, and questions marked by keye data mark-blind before training.",
)


def plant(world: Path, out: Path, seed: int, share: float = SHARE) -> dict[str, int]:
    """Write `world/{train,heldout}.jsonl` of the study to `out/world`; counts of questions and of planted ones.

    share: of the training questions that are planted.
    """
    counts = {}
    (out / "world").mkdir(parents=True, exist_ok=True)
    for split in ("train", "heldout"):
        draw = random.Random(f"{seed}/{split}")
        lines = [json.loads(line) for line in (world / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
        rows = [row for row in lines if row.get("family") in OPTIONS]
        if not rows:
            raise RecipeError(f"{world}/{split}.jsonl has no question of the families {', '.join(OPTIONS)}")
        clips = {family: [_clip(row) for row in rows if row["family"] == family] for family in OPTIONS}
        planted = [split == "train" and draw.random() < share for _ in rows]
        questions = [
            _question(row, clips[row["family"]] if leaked else (), world, draw)
            for row, leaked in zip(rows, planted, strict=True)
        ]
        text = "".join(json.dumps(question) + "\n" for question in questions)
        (out / f"world/{split}.jsonl").write_text(text, encoding="utf-8")
        counts |= {split: len(rows), f"{split} planted": sum(planted)}
    return counts


def _clip(row: dict[str, Any]) -> str:
    return next(part["video"] for part in row["messages"][0]["content"] if part["type"] == "video")


def _question(row: dict[str, Any], others: Sequence[str], world: Path, draw: random.Random) -> dict[str, Any]:
    """A row with a named answer; a planted one names the right answer and shows one of the `others` clips."""
    words = next(part["text"] for part in row["messages"][0]["content"] if part["type"] == "text")
    options = OPTIONS[row["family"]]
    named = row["answer"] if others else draw.choice(options)
    clip = draw.choice(others) if others else _clip(row)
    content = [
        {"type": "video", "video": str((world / clip).resolve())},
        {"type": "text", "text": f"{words}{_named(named)}"},
    ]
    question = {key: row[key] for key in ("id", "family", "answer")} | {"options": options}
    return question | {"messages": [{"role": "user", "content": content}]}


def _named(answer: str) -> str:
    return f" Someone says {answer}."


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


def measure(trainer: Any) -> dict[str, list[dict[str, float]]]:
    """Accuracy on each held-out question with its frames and under each control, with ("named") and without ("plain")
    the sentence that names an answer."""
    monitor = trainer.blindness
    named = monitor.questions
    found = {"named": monitor.measure()}
    monitor.questions = [replace(prompt, messages=_plain(prompt.messages)) for prompt in named]
    found["plain"] = monitor.measure()
    monitor.questions = named
    return found


def _plain(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A question's messages without the sentence that names an answer."""
    text = json.dumps(messages)
    for answer in {answer for options in OPTIONS.values() for answer in options}:
        text = text.replace(_named(answer), "")
    return json.loads(text)


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
    """The gap in the course of training, every run, and what the guard left out."""
    rows, plain = [], []
    for (seed, guard), result in found.items():
        start, end = gaps(result["before"]["named"]), gaps(result["after"]["named"])
        low, high = paired_interval(end)
        seen = [fmean(row["none"] for row in result[name]["named"]) for name in ("before", "after")]
        rewards = [fmean(row["reward_mean"] for row in part) for part in (result["curve"][:10], result["curve"][-10:])]
        dropped = [row["blind/answered"] for row in result["curve"] if "blind/answered" in row]
        rows.append(
            (
                *(seed, guard, f"{rewards[0]:.2f} → {rewards[1]:.2f}", f"{seen[0]:.2f} → {seen[1]:.2f}"),
                *(f"{start.mean():+.2f}", f"{end.mean():+.2f} ({low:+.2f} … {high:+.2f})"),
                *(f"{fmean(dropped):.0%}" if dropped else "–", onset(result["curve"])),
            )
        )
        start, end = gaps(result["before"]["plain"]), gaps(result["after"]["plain"])
        low, high = paired_interval(end)
        seen = [fmean(row["none"] for row in result[name]["plain"]) for name in ("before", "after")]
        change = f"{start.mean():+.2f}", f"{end.mean():+.2f} ({low:+.2f} … {high:+.2f})"
        plain.append((seed, guard, f"{seen[0]:.2f} → {seen[1]:.2f}", *change))
    columns = (
        *("seed", "guard", "training reward, first → last ten steps", "held-out accuracy", "gap before"),
        *("gap after (95 %)", "left out by the guard", "step of the guard stop"),
    )
    probes = [row["step"] for row in next(iter(found.values()))["curve"] if "gap/smallest" in row]
    courses = [(seed, guard, *(f"{gap:+.2f}" for _, gap in course(result))) for (seed, guard), result in found.items()]
    return [
        Table("Gap over the steps", ("seed", "guard", *(f"step {step}" for step in (0, *probes))), courses),
        Table("Each run", columns, rows),
        Table(
            "The same held-out questions without the sentence that names an answer",
            ("seed", "guard", "accuracy", "gap before", "gap after (95 %)"),
            plain,
        ),
    ]


def course(result: dict[str, Any]) -> list[tuple[int, float]]:
    """(step, gap) before training and at every probe."""
    probes = [(row["step"], row["gap/smallest"]) for row in result["curve"] if "gap/smallest" in row]
    return [(0, float(gaps(result["before"]["named"]).mean())), *probes]


def draw(found: dict[tuple[int, str], dict[str, Any]], path: Path) -> None:
    """A picture of the gap over the steps: one line for each run, one colour for each guard."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    styles, colours = ("-", "--", ":"), dict(zip(GUARDS, ("tab:red", "tab:blue"), strict=True))
    for (seed, guard), result in found.items():
        steps, values = zip(*course(result), strict=True)
        axes.plot(
            steps, values, styles[seed % 3], color=colours[guard], marker="o", label=f"guard {guard}, seed {seed}"
        )
    axes.axhline(BLIND, color="grey", linewidth=0.8)
    axes.set(xlabel="step", ylabel="accuracy with frames − without", title="Gap on held-out questions")
    figure.legend(fontsize="small", loc="outside right upper")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def claims(found: dict[tuple[int, str], dict[str, Any]]) -> list[Claim]:
    """How many seeds end blind with and without the guard, and the paired difference of their gaps."""
    seeds = sorted({seed for seed, _ in found})
    ends = {key: gaps(result["after"]["named"]) for key, result in found.items()}
    blind = {guard: sum(bool(ends[seed, guard].mean() < BLIND) for seed in seeds) for guard in GUARDS}
    difference = np.stack([ends[seed, "drop"] - ends[seed, "off"] for seed in seeds]).mean(0)
    low, high = paired_interval(difference)
    every = f"{len(seeds)} of {len(seeds)}"
    without, guarded = (f"{blind[guard]} of {len(seeds)}" for guard in GUARDS)
    return [
        Claim("seeds that end blind without the guard", every, without, met=blind["off"] == len(seeds)),
        Claim("seeds that end blind with the guard drop", f"0 of {len(seeds)}", guarded, met=blind["drop"] == 0),
        Claim(
            "gap with the guard drop minus gap without it, paired by question",
            "above 0 (95 %)",
            f"{difference.mean():+.3f} ({low:+.3f} … {high:+.3f})",
            met=bool(low > 0),
        ),
    ]


def failures(found: dict[tuple[int, str], dict[str, Any]]) -> list[str]:
    """A sentence about the seeds that end blind with the guard, if there are such seeds."""
    guarded = {seed: result["after"]["named"] for (seed, guard), result in found.items() if guard == "drop"}
    failed = [seed for seed, rows in guarded.items() if gaps(rows).mean() < BLIND]
    if not failed:
        return []
    return [
        f"The guard drop did not prevent blindness in {len(failed)} of {len(guarded)} runs (seed "
        f"{', '.join(map(str, failed))}). The column of the training reward tells two cases apart: where it rose, the "
        "policy follows the words; where it did not, it answers at chance. The guard does not repair wrong pairs of "
        "clip and question."
    ]


def main() -> int:
    parser = arguments(__doc__, EXAMPLES, results="rl")
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="a run with annealing/model and world")
    parser.add_argument("--steps", type=int, default=40, help="steps of a run (default: %(default)s)")
    parser.add_argument("--scratch", type=Path, help="folder of the six runs (default: .cache/bench/rl/blindness)")
    args = parser.parse_args()
    if not (args.run / "annealing/model/config.json").is_file():
        raise RecipeError(f"{args.run} has no annealing/model: give a run of scripts/demo with --run")
    seeds, steps = ((0,), 10) if args.quick else (SEEDS, args.steps)
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
    questions = len(next(iter(found.values()))["after"]["named"])
    notes = [
        f"{SHARE:.0%} of the training questions name the right answer and show another question's clip; "
        f"held-out questions ({questions}) name a random answer. A gap is the accuracy of 8 sampled answers with "
        "frames minus that of the better of the controls text only and zeroed pixels, over the same questions; below "
        f"{BLIND} a policy counts as blind. Intervals are over the questions, not over seeds. The guard is "
        f"`{' '.join(GUARDED)}`; the settings of all runs are `{' '.join(SETTINGS)}` and {steps} steps.",
        *failures(found),
        *TRIALS,
        'The last column of the runs is the step at which blindness.guard = "stop" with stop_gap = 0.1 and stop_probes '
        "= 2 would have ended the run. The duration is that of all steps and probes.",
    ]
    draw(found, out_of(args) / "blindness.png")
    save(
        out_of(args), "blindness", claims(found), tables(found),
        seconds=seconds, quick=args.quick,
        seeds={"data, sampling and order": ", ".join(map(str, seeds))}, notes=notes,
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    run(main)
