"""Does annealing on a longer context let the model find in long clips what it could only find in short ones?

The tiny model goes through stage 2 at 256 tokens until it can say what colour flashed for half a second in a clip that
fits. Stage 3 then trains it at 4,096 tokens on longer clips, once with the RoPE base raised eightfold (report
§pre-training) and once with it kept, from the same weights on the same data. Four models answer the same held-out
questions on clips of up to sixteen times stage 2's context: stage 2, stage 2 with nothing changed but the base, and
both of stage 3. Settings were chosen on the world of seed 0, the results are of another.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, stdev

from keye.errors import KeyeError, run
from scripts.bench.common.record import ROOT, Claim, Table, arguments, forget_other_code, out_of, save
from scripts.bench.stages.documents import torchrun

SEED, QUESTION_SEEDS = 1, (101, 102)
SHORT, LONG = 256, 4096  # contexts of stage 2 and 3
TRAINED = {10: 100, 20: 100, 40: 100, 80: 100, 110: 60}  # setting's duration (find clips last twice as long) → clips
ASKED = (3, 5, 10, 20, 40, 80, 110)
SCALE, LIMIT = 8.0, 3600
SCRATCH = ROOT / ".cache" / "bench" / "stages_extension"
ARMS = ("stage 2", "stage 2, base × 8", "stage 3, base kept", "stage 3, base × 8")
EXAMPLES = """examples:
  python -m scripts.bench stages --part extension         about a quarter of an hour on two quiet cores
  python -m scripts.bench.stages.extension --seed 0       the world that the settings were chosen on
"""
HEAD = """
name = "extension"
seed = {seed}
[model]
{model}
vocab_size = 1024
[processor.encoder]
measure = "patch_l1"
threshold = 0.8
max_tokens = 60000
min_tokens_per_frame = 1
max_tokens_per_frame = 1
[processor.image]
min_tokens = 4
max_tokens = 4
"""
FIRST = """
[vision]
steps = {vision}
learning_rate = 3e-4
warmup = 10
pairs = 64
mixture = {{ video = 0.5, image = 0.5 }}
[multitask]
steps = {steps}
context = {context}
global_batch_size = 6
learning_rate = 2e-3
warmup = 20
mixture = {{ video = 0.85, image = 0.1, text = 0.05 }}
"""
SECOND = """
[annealing]
steps = {steps}
context = {context}
global_batch_size = 2
learning_rate = 1e-3
warmup = 5
zero = 1
rope_scale = {scale}
mixture = {{ video = 0.8, image = 0.1, text = 0.1 }}
"""


def draw(folder: Path, seed: int, quick: bool) -> None:
    """The clips to train on, into folders below `folder`, each once."""
    from keye.world import generate

    wanted = {
        "short3": (3, {"find": 900}),
        "short5": (5, {"find": 600}),
        "other": (3, {"caption": 1000, "order": 600, "text": 300}),
        **{f"long{duration}": (duration, {"find": number}) for duration, number in TRAINED.items()},
    }
    for name, (duration, counts) in wanted.items():
        if not (folder / name / "train.jsonl").exists():
            fewer = {family: number // 10 if quick else number for family, number in counts.items()}
            generate(folder / name, counts=fewer, seed=seed, duration=float(duration), **_look())


def _look() -> dict:
    """28 × 28 pixels, one visual token a frame: the clip's length is what is hard here."""
    return {"size": (28, 28), "difficulty": 0.1, "fps": 2, "progress": False}


def source(folder: Path, name: str, kind: str, stage: str, family: str = "", weight: float = 1.0) -> str:
    families = f'families = ["{family}"]\n' if family else ""
    return (
        f'[[data.sources]]\npath = "{(folder / name / "train.jsonl").resolve()}"\nkind = "{kind}"\n{families}'
        f'weight = {weight}\nstages = ["{stage}"]\n'
    )


def first_recipe(world: Path, seed: int, quick: bool) -> str:
    """Stages 0 and 2."""
    text = HEAD.format(seed=seed, model='preset = "tiny"')
    text += source(world, "other", "image", "vision", "caption") + source(world, "other", "video", "vision", "caption")
    text += source(world, "short3", "video", "multitask", weight=2.0) + source(world, "short5", "video", "multitask")
    for family in ("caption", "order"):
        text += source(world, "other", "video", "multitask", family, 1.5)
    text += source(world, "other", "image", "multitask") + source(world, "other", "text", "multitask")
    return text + FIRST.format(vision=4 if quick else 40, steps=8 if quick else 900, context=SHORT)


def second_recipe(world: Path, seed: int, model: Path, scale: float, quick: bool) -> str:
    """Stage 3 from stage 2's model, its RoPE base times `scale`."""
    text = HEAD.format(seed=seed, model=f'path = "{model.resolve()}"')
    text += source(world, "short5", "video", "annealing", weight=0.5)
    for duration in TRAINED:
        text += source(world, f"long{duration}", "video", "annealing", weight=1.0 + (duration > 20))
    text += source(world, "other", "image", "annealing") + source(world, "other", "text", "annealing")
    return text + SECOND.format(steps=2 if quick else 50, context=LONG, scale=scale)


def train(recipe: str, folder: Path) -> None:
    """`scripts/pretrain.py` on two processes; what it has done before it does not do again."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder.with_suffix(".toml")
    path.write_text(recipe, encoding="utf-8")
    torchrun(["scripts/pretrain.py", str(path), "--out", str(folder)], folder.with_suffix(".log"), 2, LIMIT)


def models(folder: Path) -> dict[str, tuple[Path, float]]:
    """Arm → directory of its model and the factor on its RoPE base."""
    stage2 = folder / "first" / "multitask" / "model"
    stage3 = [folder / name / "annealing" / "model" for name in ("kept", "raised")]
    return dict(zip(ARMS, ((stage2, 1.0), (stage2, SCALE), (stage3[0], 1.0), (stage3[1], 1.0)), strict=True))


def ask(folder: Path, seed: int, count: int) -> None:
    """All arms answer `count` new questions of `seed` at every length; `folder/answers-SEED.json` grows as they do."""
    import torch

    from keye import KeyeForConditionalGeneration, KeyeProcessor
    from keye.evaluation.benchmark import ManifestBenchmark
    from keye.evaluation.evaluate import generate_replies
    from keye.evaluation.match import match
    from keye.world import generate

    record = folder / f"answers-{seed}.json"
    known = json.loads(record.read_text()) if record.exists() else {}
    asked = {}
    for arm, (path, scale) in models(folder).items():
        asked[arm] = KeyeForConditionalGeneration.from_pretrained(path).eval()
        if scale != 1.0:
            theta = asked[arm].config.text_config.rope_parameters["rope_theta"]
            asked[arm].set_rope_theta(theta * scale)
    processor = KeyeProcessor.from_pretrained(path)
    for duration in ASKED:
        if str(duration) in known:
            continue
        place = folder / f"questions-{seed}" / str(duration)
        generate(place, "heldout", counts={"find": count}, seed=seed, duration=float(duration), **_look())
        right: dict[str, list[bool]] = {arm: [] for arm in asked}
        tokens = 0
        for question in ManifestBenchmark(place / "heldout.jsonl"):
            sample = processor.sample(question.messages, base_dir=question.base_dir, add_generation_prompt=True)
            tokens = max(tokens, len(sample))
            for arm, model in asked.items():
                with torch.no_grad():
                    reply = generate_replies(model, processor, [sample], max_new_tokens=8)[0]
                right[arm].append(match(reply.text, question.answer, options=question.options, finished=reply.finished))
        known[str(duration)] = {"tokens": tokens, "right": right}
        partial = record.with_suffix(".partial")
        partial.write_text(json.dumps(known))
        partial.rename(record)
        print(f"seed {seed}, {2 * duration} s: { ({arm: mean(r) for arm, r in right.items()}) }", flush=True)


def ask_all(folder: Path, count: int) -> dict[int, dict]:
    """Both seeds' questions, a process each."""
    command = [sys.executable, "-m", __spec__.name, "--ask", str(folder), str(count)]
    alone = os.environ | {"OMP_NUM_THREADS": "1"}
    started = [subprocess.Popen([*command, str(seed)], cwd=ROOT, env=alone) for seed in QUESTION_SEEDS]
    if any([process.wait() for process in started]):
        raise KeyeError("asking the questions failed, see above; the same command goes on from there")
    return {seed: json.loads((folder / f"answers-{seed}.json").read_text()) for seed in QUESTION_SEEDS}


def gain(one: list[bool], other: list[bool]) -> tuple[float, float]:
    """Mean difference of two arms on the same questions, and its standard error."""
    apart = [int(a) - int(b) for a, b in zip(one, other, strict=True)]
    return mean(apart), stdev(apart) / math.sqrt(len(apart))


def share(right: list[bool]) -> str:
    """Per cent right ± one standard error, never none for all or nothing right (Laplace)."""
    smoothed = (sum(right) + 1) / (len(right) + 2)
    return f"{100 * mean(right):.0f} ± {100 * math.sqrt(smoothed * (1 - smoothed) / len(right)):.0f}"


def judge(found: dict[int, dict]) -> tuple[list[Claim], Table]:
    """Claims over all lengths beyond stage 2's context, and the accuracy at every length."""
    rows, inside, beyond = [], [], {arm: [] for arm in ARMS}
    for duration in ASKED:
        answered = [answers[str(duration)] for answers in found.values()]
        tokens = max(one["tokens"] for one in answered)
        right = {arm: [answer for one in answered for answer in one["right"][arm]] for arm in ARMS}
        rows.append((f"{2 * duration} s", tokens, f"{tokens / SHORT:.1f} ×", *(share(right[arm]) for arm in ARMS)))
        if tokens > SHORT:
            for arm in ARMS:
                beyond[arm] += right[arm]
        else:
            inside += right[ARMS[0]]
    last = ARMS[-1]
    claims = [
        Claim(f"stage 2 finds the flash in clips within its {SHORT} tokens", "≥ 90 %", f"{share(inside)} %",
              met=mean(inside) >= 0.9)
    ]  # fmt: skip
    for other in ARMS[:-1]:
        more, error = gain(beyond[last], beyond[other])
        figure = f"{share(beyond[last])} against {share(beyond[other])} %"
        expected = other != ARMS[2]  # whether the base matters when trained is a finding, nothing was promised
        claims.append(
            Claim(
                f"find beyond stage 2's context: {last} against {other}",
                "more by over 2 standard errors" if expected else "–", figure,
                f"{100 * more:+.0f} ± {100 * error:.0f} points", more > 2 * error if expected else None,
            )
        )  # fmt: skip
    return claims, Table("Per cent of `find` answered right (chance 17)", ("clip", "tokens", "of context", *ARMS), rows)


def main() -> None:
    parser: argparse.ArgumentParser = arguments(__doc__, EXAMPLES, results="stages")
    parser.add_argument("--seed", type=int, default=SEED, help=f"of the world and the training ({SEED})")
    parser.add_argument("--fresh", action="store_true", help="forget what an earlier run left")
    parser.add_argument("--ask", nargs=3, metavar=("DIR", "COUNT", "SEED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.ask:
        ask(Path(args.ask[0]), int(args.ask[2]), int(args.ask[1]))
        return
    forget_other_code(SCRATCH)
    began = time.monotonic()
    folder = SCRATCH / f"{'quick-' if args.quick else ''}{args.seed}"
    if args.fresh:
        shutil.rmtree(folder, ignore_errors=True)
    took = folder / "seconds.json"
    before = json.loads(took.read_text()) if took.exists() else 0.0
    draw(folder / "world", args.seed, args.quick)
    train(first_recipe(folder / "world", args.seed, args.quick), folder / "first")
    start = folder / "first" / "multitask" / "model"
    for name, scale in (("raised", SCALE), ("kept", 1.0)):
        train(second_recipe(folder / "world", args.seed, start, scale, args.quick), folder / name)
    count = 6 if args.quick else 48
    claims, table = judge(ask_all(folder, count))
    seconds = before + time.monotonic() - began
    took.write_text(json.dumps(seconds))
    notes = [
        f"{count * len(QUESTION_SEEDS)} questions a length, {len(QUESTION_SEEDS)} seeds, the same for all models; ± is "
        f"one standard error, paired for differences. Stage 2 has seen clips of 6 and 10 s, stage 3 of up to "
        f"{2 * max(TRAINED)} s. A frame is one visual token in addition to its timestamp.",
    ]
    save(
        out_of(args), "extension", claims, [table], seconds=seconds, quick=args.quick, notes=notes,
        seeds={"world": args.seed, "questions": " and ".join(map(str, QUESTION_SEEDS))}
    )  # fmt: skip


if __name__ == "__main__":
    run(main)
