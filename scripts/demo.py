"""The complete demo: seven steps, each with its title, its time and its log. A finished step is not repeated.

`bash scripts/demo` creates the environment and calls this. See `--help`.
"""

import argparse
import hashlib
import json
import os
import pty
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from keye.errors import KeyeError, run

CLIPS = ("bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4")
PRETRAIN, POSTTRAIN = "stages/recipes/tiny.toml", "rl/recipes/tiny.toml"
# The short demo takes a fraction of the training steps: it shows that everything runs, not that the model learns.
SHORT_PRETRAIN = ("vision.steps=6", "alignment.steps=4", "multitask.steps=12", "annealing.steps=4")
SHORT_POSTTRAIN = ("gspo.steps=2", "gspo.prompts=8", "heldout.limit=4", "heldout.samples=1")
PLAN_FRAMES = 60


class Demo:
    """One run of the demo in a directory. `step` runs an unfinished step and records that it is finished.

    Attributes:
        run: directory of the run.
        short: whether few training steps are made.
        clips: real clips.
    """

    def __init__(self, run_dir: Path, short: bool, clips: list[Path]) -> None:
        self.run, self.short, self.clips = run_dir, short, clips
        self.began = time.monotonic()
        self.keys: dict[str, str] = {}
        self.number = 0
        for folder in ("logs", "steps"):
            (run_dir / folder).mkdir(parents=True, exist_ok=True)

    def step(
        self,
        name: str,
        title: str,
        action: Callable[[], None],
        after: tuple[str, ...] = (),
        inputs: object = None,
        leaves: tuple[str, ...] = (),
    ) -> None:
        """Run `action` unless it has finished with the same `inputs` and the same previous steps.

        Args:
            name: of the step.
            title: text that is printed.
            action: does the work.
            after: names of the steps whose results it uses.
            inputs: values that determine its result, as JSON.
            leaves: its output in the run's directory. An interrupted action resumes from it; output of other inputs is
                deleted first.
        """
        self.number += 1
        print(f"\n[{self.number}/7] {title}", flush=True)
        about = json.dumps([name, inputs, [self.keys[step] for step in after]], default=str)
        key = self.keys[name] = hashlib.sha256(about.encode()).hexdigest()
        marker = self.run / "steps" / f"{name}.json"
        last = json.loads(marker.read_text()) if marker.exists() else {}
        if last.get("inputs") == key and "seconds" in last:
            print("      already done; --fresh starts over", flush=True)
            return
        if last and last["inputs"] != key:
            for left in leaves:
                shutil.rmtree(self.run / left, ignore_errors=True)
        marker.write_text(json.dumps({"title": title, "inputs": key}) + "\n")
        began = time.monotonic()
        action()
        seconds = round(time.monotonic() - began, 1)
        done = {"title": title, "inputs": key, "seconds": seconds, "finished": time.time()}
        marker.write_text(json.dumps(done) + "\n")
        print(f"      {seconds:.0f} s", flush=True)

    def call(self, name: str, *command: str) -> None:
        """Run a Python command with its output on the screen and in `logs/<name>.log`."""
        log = self.run / "logs" / f"{name}.log"
        code = stream([sys.executable, *command], log)
        if code == 130:
            raise KeyboardInterrupt
        if code:
            raise KeyeError(f"{name} ended with code {code}, its output is in {log}; run this again to resume here")

    def torchrun(self, name: str, *command: str) -> None:
        """Run a script on two processes (CPU), or on every GPU when there are several."""
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes())]
        self.call(name, *launch, *command)

    def train(self, name: str, script: str, recipe: str, short: tuple[str, ...]) -> None:
        """Run a training script on this run, with the overrides `short` in the short form."""
        sets = [word for override in (short if self.short else ()) for word in ("--set", override)]
        self.torchrun(name, script, recipe, "--out", str(self.run), *sets)


def processes() -> int:
    """Number of processes of a training step: one per GPU if there are several, otherwise two on the CPU."""
    import torch

    if os.environ.get("DS_ACCELERATOR", "cuda") == "cuda" and torch.cuda.device_count() > 1:
        return torch.cuda.device_count()
    os.environ["DS_ACCELERATOR"] = "cpu"
    return 2


def stream(command: list[str], log: Path) -> int:
    """Run `command`, copy its output to the screen and to `log`, and return its exit code.

    If the output is a terminal, the command gets a pseudo-terminal, so that its progress bars work.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    reader, writer = pty.openpty() if sys.stdout.isatty() else os.pipe()
    if sys.stdout.isatty():
        size = shutil.get_terminal_size()
        environment |= {"COLUMNS": str(size.columns), "LINES": str(size.lines)}
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=writer, stderr=writer, env=environment)
        os.close(writer)
        while True:
            try:
                piece = os.read(reader, 65536)
            except OSError:  # a pseudo-terminal whose other end is closed
                break
            if not piece:
                break
            file.write(piece)
            sys.stdout.buffer.write(piece)
            sys.stdout.flush()
    os.close(reader)
    return process.wait()


def plan_clips(demo: Demo) -> None:
    """Encode the real clips as the model sees them: plan, plot and frames."""
    from PIL import Image

    from keye import SlowFastEncoder

    shutil.rmtree(demo.run / "plans", ignore_errors=True)
    encoder = SlowFastEncoder(max_frames=PLAN_FRAMES)
    for clip in demo.clips:
        encoded = encoder(clip)
        folder = demo.run / "plans" / clip.stem
        folder.mkdir(parents=True)
        pictures = encoded.pictures()
        for i, picture in enumerate(pictures):
            image = Image.fromarray(picture.permute(1, 2, 0).numpy())
            image.thumbnail((328, 328))
            image.save(folder / f"{i:04d}.jpg", quality=80)
        encoded.plan.save(folder.with_suffix(".json"))
        encoded.plan.plot(folder.with_suffix(".png"), pictures)
        print("      " + encoded.plan.summary().replace("\n", "\n      "))


def evaluate_model(demo: Demo, stage: str, controls: bool) -> None:
    """Ask a stage's model the held-out questions, and under every control: `evaluation/<stage>[_<control>].json`."""
    from keye.evaluation import CONTROLS

    world = demo.run / "world"
    # The majority answer comes from the training questions, because held-out answers are unknown in advance.
    asked = [str(demo.run / stage / "model"), str(world / "heldout.jsonl"), "--train", str(world / "train.jsonl")]
    for control, what in {"none": "", **(CONTROLS if controls else {})}.items():
        name = stage if control == "none" else f"{stage}_{control}"
        how = ["--control", control, *(["--limit", "4"] if demo.short else [])]
        print(f"      {name}{what and f' ({what})'}", flush=True)
        out = str(demo.run / "evaluation" / f"{name}.json")
        demo.torchrun(f"evaluate-{name}", "scripts/evaluate.py", *asked, *how, "--out", out)


def closing_table(run_dir: Path) -> str:
    """The results as a plain-text table: every family, then the claims."""
    from keye.evaluation import Score
    from stages.report import findings

    def share(score: Score | None) -> str:
        return f"{'–' if score is None else f'{score.accuracy:.1%} ± {score.stderr:.1%}':>17}"

    families = findings.families(run_dir)
    controls = findings.measured_controls(families)
    head = "".join(f"{name:>17}" for name in (*controls, "after stage 3", "after GSPO"))
    lines = [f"{'family':<12}{'n':>4}{'chance':>8}{'majority':>9}{head}  > controls by 2 se"]
    for f in families:
        baselines = f"{f.before.n:>4}{f.before.chance:>8.1%}{f.before.majority:>9.1%}"
        shares = "".join(map(share, (*map(f.controls.get, controls), f.before, f.after)))
        lines.append(f"{f.family:<12}{baselines}{shares}  {'yes' if f.learnt else 'no'}")
    learnt = sum(f.learnt for f in families)
    claim = "above chance and the controls by more than two standard errors"
    lines.append(f"\n{learnt} of {len(families)} families are {claim}")
    reward = findings.reward(run_dir)
    if reward:
        word = "more" if reward.significant else "NOT more"
        lines.append(
            f"held-out reward {reward.before:.3f} ± {reward.before_stderr:.3f} before GSPO, "
            f"{reward.after:.3f} ± {reward.after_stderr:.3f} after: {reward.gain:+.3f} ± {reward.gain_stderr:.3f}, "
            f"{word} than two standard errors"
        )
    return "\n".join(lines)


def check_clips(named: list[str]) -> list[Path]:
    """The user's clips, or the clips of the set-up. Each must open before training starts."""
    from keye import SlowFastEncoder

    clips = [Path(name) for name in named] or [Path(".cache/clips") / name for name in CLIPS]
    taken: set[str] = set()
    for clip in clips:
        SlowFastEncoder(max_frames=2).plan(clip)
        if clip.stem in taken:
            raise KeyeError(f"two clips are called {clip.stem}; rename one, because plans are stored by name")
        taken.add(clip.stem)
    return clips


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__.splitlines()[0])
    parser.add_argument("clips", nargs="*", help="your own clips instead of the three fetched ones")
    parser.add_argument("--run", type=Path, help="where to write (default runs/demo, or runs/short with --short)")
    parser.add_argument("--short", action="store_true", help="few steps and questions: a check that everything runs")
    parser.add_argument("--fresh", action="store_true", help="delete the run's directory first")
    args = parser.parse_args()
    clips = check_clips(args.clips)
    run_dir = args.run or Path("runs/short" if args.short else "runs/demo")
    if args.fresh and run_dir.exists():
        if not (run_dir / "steps").is_dir():
            raise KeyeError(f"{run_dir} is not a run of the demo and is not deleted; give another directory with --run")
        shutil.rmtree(run_dir)
    demo = Demo(run_dir, args.short, clips)
    follow(demo)
    from stages.report import page as report

    page = report.write(run_dir)
    print(f"\n{closing_table(run_dir)}\n\n{page.resolve()}\n{(time.monotonic() - demo.began) / 60:.1f} minutes in all")


def follow(demo: Demo) -> None:
    """The seven steps."""
    files = [(str(clip.resolve()), clip.stat().st_size, clip.stat().st_mtime) for clip in demo.clips]
    recipes = [Path(recipe).read_text() for recipe in (PRETRAIN, POSTTRAIN)]
    demo.step("plan", "Real clips: which frames are slow, which fast", lambda: plan_clips(demo), inputs=files)
    demo.step(
        "pretrain",
        "A drawn video world, then four stages of training on two processes",
        lambda: demo.train("pretrain", "scripts/pretrain.py", PRETRAIN, SHORT_PRETRAIN),
        inputs=[recipes[0], demo.short],
        leaves=("world", "vision", "alignment", "multitask", "annealing"),
    )
    demo.step(
        "evaluate-before",
        "Held-out questions to the trained model, and to the same model under every control",
        lambda: evaluate_model(demo, "annealing", controls=True),
        after=("pretrain",),
    )
    demo.step(
        "gspo",
        "GSPO: rewards for right answers",
        lambda: demo.train("gspo", "scripts/posttrain.py", POSTTRAIN, SHORT_POSTTRAIN),
        after=("pretrain",),
        inputs=[recipes[1], demo.short],
        leaves=("gspo",),
    )
    demo.step(
        "evaluate-after",
        "The same held-out questions after GSPO",
        lambda: evaluate_model(demo, "gspo", controls=False),
        after=("gspo",),
    )
    demo.step("ablate", "The threshold from low to high", lambda: ablate(demo), after=("plan", "gspo"))
    print("\n[7/7] The report", flush=True)


def ablate(demo: Demo) -> None:
    """Sweep the threshold over the real clips and the held-out questions."""
    model = ["--model", str(demo.run / "gspo" / "model"), "--manifest", str(demo.run / "world" / "heldout.jsonl")]
    sweep = ["--threshold", "0.3,0.6,0.9" if demo.short else "0.2:0.95:0.15", "--limit", "2" if demo.short else "10"]
    videos = ["--videos", *map(str, demo.clips), "--max-frames", str(PLAN_FRAMES)]
    demo.call("ablate", "scripts/ablate.py", *videos, *model, *sweep, "--out", str(demo.run / "ablation"))


if __name__ == "__main__":
    run(main)
