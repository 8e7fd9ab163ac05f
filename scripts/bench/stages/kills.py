"""Does a training run that is killed at a random moment and resumed have the same result?

A reference run of three stages on two processes is not interrupted. Every trial starts the same run, kills one or all
of its processes with SIGKILL, repeats the command and compares loss, learning rate, gradient norm and tokens of every
step, and the weights of every stage, bit by bit. Every other kill happens at a random second between start and end,
which is often during start-up; the others happen within a second after a random step. Runs save at every second step,
so that many kills happen during a save.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from keye.errors import KeyeError, run
from scripts.bench.common.record import ROOT, Claim, Table, arguments, forget_other_code, out_of, save

EXAMPLES = """examples:
  python -m scripts.bench.stages.kills                  20 kills, about half an hour on two cores
  python -m scripts.bench.stages.kills --kills 5 --seed 3
"""
COMPARED = ("step", "loss", "lr", "grad_norm", "tokens", "not_finite")
VICTIMS = ("rank 0", "rank 1", "all")
LIMIT = 600  # seconds that a run may take
SCRATCH = ROOT / ".cache" / "bench" / "kills"
RECIPE = """
name = "kills"
[model]
preset = "tiny"
vocab_size = 512
[processor.encoder]
measure = "patch_l1"
threshold = 0.8
max_tokens = 256
min_tokens_per_frame = 4
max_tokens_per_frame = 16
[processor.image]
min_tokens = 4
max_tokens = 16
[data.world.settings]
duration = 3.0
[data.world.counts]
count = 24
image_read = 24
caption = 16
text = 24
[[data.sources]]
path = "{run}/world/train.jsonl"
kind = "image"
stages = ["vision", "multitask", "annealing"]
[[data.sources]]
path = "{run}/world/train.jsonl"
kind = "video"
stages = ["multitask", "annealing"]
[[data.sources]]
path = "{run}/world/train.jsonl"
kind = "text"
stages = ["multitask", "annealing"]
[vision]
steps = 6
learning_rate = 3e-4
pairs = 8
checkpoint_every = 2
[multitask]
steps = 12
learning_rate = 1e-3
warmup = 3
context = 512
global_batch_size = 4
checkpoint_every = 2
mixture = { video = 0.4, image = 0.4, text = 0.2 }
[annealing]
steps = 6
learning_rate = 5e-4
context = 2048
global_batch_size = 1
zero = 1
sequence_parallel = 2
checkpoint_every = 2
mixture = { video = 0.24, image = 0.50, text = 0.26 }
"""
STEPS = {"vision": 6, "multitask": 12, "annealing": 6}
STAGES = tuple(STEPS)


@dataclass(frozen=True)
class Trial:
    """One kill: when it was drawn to come, who was killed, what went on, and whether the end was the same."""

    moment: str
    victim: str
    doing: str
    curves: bool
    weights: bool


def launch(recipe: Path, folder: Path, log: Path) -> subprocess.Popen:
    """`scripts/pretrain.py` on two processes, as the leader of a process group of its own."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--"),
        *(str(ROOT / "scripts" / "pretrain.py"), str(recipe), "--out", str(folder)),
    ]
    with log.open("a") as out:
        return subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip


def finish(process: subprocess.Popen, log: Path) -> None:
    """Wait for a run to end; KeyeError with the end of its log when it fails."""
    code = process.wait(LIMIT)
    if code:
        tail = "\n".join(log.read_text().splitlines()[-15:])
        raise KeyeError(f"the run ended with exit code {code}; the end of {log}:\n{tail}")


def kill(process: subprocess.Popen, victim: str) -> None:
    """SIGKILL to the rank, or to the launcher and all it has started; then wait until all of it is gone."""
    family = psutil.Process(process.pid).children(recursive=True)
    ranks = [child for child in family if _rank(child) is not None]
    wanted = [child for child in ranks if victim in ("all", f"rank {_rank(child)}")]
    if victim == "all" or not wanted:  # not yet started, or already gone: then all of it
        os.killpg(process.pid, signal.SIGKILL)
    for child in wanted:
        child.kill()
    try:
        process.wait(60)  # the launcher ends the other rank
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    gone, alive = psutil.wait_procs(family, timeout=30)
    for child in alive:
        child.kill()


def _rank(process: psutil.Process) -> str | None:
    try:
        return process.environ().get("RANK") if "pretrain.py" in " ".join(process.cmdline()) else None
    except psutil.Error:
        return None


def doing(folder: Path) -> str:
    """What a run was at, by the files that it has left so far."""
    if not (folder / "tokenizer").exists():
        return "starting, drawing the world"
    for stage in STAGES:
        place = folder / stage
        if (place / "stage.json").exists():
            continue
        if any(not (step / "complete.json").exists() for step in (place / "checkpoints").glob("step-*")):
            return f"{stage}: saving"
        if (place / "model").exists():
            return f"{stage}: writing its model"
        return f"{stage}: training" if (place / "metrics.jsonl").exists() else f"{stage}: loading"
    return "ending"


def curves(folder: Path) -> dict[str, list[dict[str, float]]]:
    """What is compared of every step of every stage; the clock's figures are left out."""
    found = {}
    for stage in STAGES:
        lines = (folder / stage / "metrics.jsonl").read_text().splitlines()
        found[stage] = [{key: json.loads(line)[key] for key in COMPARED} for line in lines]
    return found


def weights(folder: Path) -> dict[str, str]:
    """A digest of every file of weights that the stages leave."""
    files = sorted(folder.glob("*/model/*.safetensors"))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def wait_for_moment(
    process: subprocess.Popen, folder: Path, by_clock: bool, draw: random.Random, seconds: float
) -> str:
    """Wait for a random moment of a run and return its description; "" if the run ended before."""
    if by_clock:
        second = draw.uniform(0.1, 1.0) * seconds
        moment, ends = f"{second:.1f} s after the start", time.monotonic() + second
        while time.monotonic() < ends and process.poll() is None:
            time.sleep(0.01)
    else:
        stage, step = draw.choice([(stage, step) for stage in STAGES for step in range(1, STEPS[stage] + 1)])
        later = draw.uniform(0, 1)
        moment, metrics = f"{later:.2f} s after step {step} of {stage}", folder / stage / "metrics.jsonl"
        while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= step):
            time.sleep(0.01)
        time.sleep(later)
    return moment if process.poll() is None else ""


def attempt(recipe: Path, folder: Path, whole: Path, number: int, draw: random.Random, seconds: float) -> Trial:
    """Start, kill, resume, compare with the reference run."""
    log, moment = folder.with_suffix(".log"), ""
    while not moment:  # a run that has ended before its moment is drawn again
        shutil.rmtree(folder, ignore_errors=True)
        log.unlink(missing_ok=True)
        victim = draw.choice(VICTIMS)
        process = launch(recipe, folder, log)
        moment = wait_for_moment(process, folder, number % 2 == 0, draw, seconds)
    state = doing(folder)
    kill(process, victim)
    finish(launch(recipe, folder, log), log)
    return Trial(moment, victim, state, curves(folder) == curves(whole), weights(folder) == weights(whole))


def measure(kills: int, seed: int, scratch: Path) -> tuple[list[Trial], float]:
    """The trials, and the seconds of the reference run. Earlier results in `scratch` are kept."""
    scratch.mkdir(parents=True, exist_ok=True)
    recipe, whole, record = scratch / "kills.toml", scratch / "whole", scratch / f"trials-{seed}.json"
    if not record.exists():
        recipe.write_text(RECIPE)
        shutil.rmtree(whole, ignore_errors=True)
        started = time.monotonic()
        finish(launch(recipe, whole, scratch / "whole.log"), scratch / "whole.log")
        record.write_text(json.dumps({"seconds": time.monotonic() - started, "trials": []}))
    kept = json.loads(record.read_text())
    trials, began = [Trial(**trial) for trial in kept["trials"]], time.monotonic()
    for number in range(len(trials), kills):
        # A seed a trial, so that a bench that goes on draws what it would have drawn.
        trial = attempt(recipe, scratch / "killed", whole, number, random.Random(f"{seed}/{number}"), kept["seconds"])
        trials.append(trial)
        record.write_text(json.dumps({"seconds": kept["seconds"], "trials": [asdict(trial) for trial in trials]}))
        done = number + 1 - len(kept["trials"])
        left = (time.monotonic() - began) / done * (kills - number - 1)
        same = "the same" if trial.curves and trial.weights else "ANOTHER END"
        line = f"{trial.victim}, {trial.moment} ({trial.doing}): {same}; {left:.0f} s left"
        print(f"{number + 1}/{kills}  {line}", flush=True)
    return trials[:kills], kept["seconds"]


def main() -> None:
    parser: argparse.ArgumentParser = arguments(__doc__, EXAMPLES, results="stages")
    parser.add_argument("--kills", type=int, default=20, help="how many (20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the victims (0)")
    args = parser.parse_args()
    began, count = time.monotonic(), 2 if args.quick else args.kills
    forget_other_code(SCRATCH)
    trials, seconds = measure(count, args.seed, SCRATCH)
    same = [trial for trial in trials if trial.curves and trial.weights]
    met = Counter(trial.doing for trial in trials)
    claim = Claim(
        f"runs killed at a random moment and started again: {count}",
        "all end with the curves and weights of the undisturbed run, to the bit",
        f"{len(same)} of {len(trials)}",
        met=len(same) == len(trials),
    )
    said = {True: "same", False: "differ"}
    rows = [(t.moment, t.victim, t.doing, said[t.curves], said[t.weights]) for t in trials]
    table = Table("Kills", ("when", "killed", "what went on", "curves", "weights"), rows)
    notes = [
        f"The undisturbed run took {seconds:.0f} s: 6 steps of vision, 12 of multitask, 6 of annealing with both ranks"
        " at one sequence.",
        "Moments met: " + ", ".join(f"{name} {number}" for name, number in met.most_common()) + ".",
    ]
    save(
        out_of(args), "kills", [claim], [table], seconds=time.monotonic() - began, quick=args.quick,
        seeds={"moments": args.seed}, notes=notes,
    )  # fmt: skip


if __name__ == "__main__":
    run(main)
