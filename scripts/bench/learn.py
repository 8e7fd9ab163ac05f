"""Trains the tiny model on SlowFastBench's split `train`, every frame slow, and reports accuracy by family.

Clips are drawn in memory and never repeated. First come stills of corners (scripts/bench/places.py), then clips of one
event cut to the half second of the event, then short and still clips, then clips as drawn. The model learns the answer
and, after it, a description of the clip: the tags from left to right, then second, column and tag of every lamp that
lights up. A description after the answer cannot give it away, and most of the labels are in it. `dev` is measured while
the model trains; `heldout` is asked once, at the end, also under controls. A run saves its weights every minute and
continues from them.
Results: docs/results/bench_model/<run>.json and docs/results/bench_model.md with all runs.
"""

import argparse
import contextlib
import datetime
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from keye.errors import run
from keye.evaluation import Question, evaluate
from keye.model.config import KeyeConfig
from keye.model.keye import KeyeForConditionalGeneration
from keye.processor.processor import KeyeProcessor, Sample
from keye.processor.tokenizer import train_tokenizer
from keye.world import texts
from keye.world.slowfastbench import FAMILIES, Item, draw, painter_of
from keye.world.slowfastbench.schedules import TooShortError
from scripts.bench import places
from scripts.bench.common.record import RESULTS, ROOT, Table, command, machine, markdown
from stages.data.collate import pack
from stages.optimizer import OptimizerConfig, build_optimizer

EXAMPLES = """examples:
  python -m scripts.bench.learn find --run find --steps 1000
  python -m scripts.bench.learn find order when --run three --steps 3000 --start RUN
  python -m scripts.bench.learn find --run smoke --steps 4 --questions 4 --out DIR    shows that it runs
  python -m scripts.bench.learn --document                                            only the page
"""
CONTROLS = ("none", "blind", "zeroed", "shuffled")
DESCRIBE = "Describe the clip."
CACHE = ROOT / ".cache" / "bench" / "bench_model"
EVENTS = 10
ONE_EVENT = ("find", "coverage")
ALL = slice(None)


@dataclass(frozen=True)
class Curriculum:
    """Clips of the first steps are short and still; then they are as drawn.

    easy: share of the steps after which clips are as drawn. easy_length: seconds before, as far as the events fit.
    length, height: of all clips, seconds (at least the family's shortest) and pixels.
    """

    easy: float
    easy_length: int
    length: int
    height: int

    def draw(self, family: str, index: int, share: float) -> Item:
        """Training question `index` after a share of the steps."""
        row = FAMILIES[family]
        if share < self.easy:
            for length in range(self.easy_length, row.shortest):
                with contextlib.suppress(TooShortError):
                    return draw(family, "train", index, length, self.height, "still")
            return draw(family, "train", index, row.shortest, self.height, "still")
        return draw(family, "train", index, max(row.shortest, self.length), self.height)


def pictures(item: Item) -> np.ndarray:
    """The first frame of every half second of a clip, uint8 [T, H, W, 3]."""
    return np.stack(painter_of(item.film).cell_frames())


def moment(item: Item) -> slice:
    """The first half second of the event of a clip with one tagged event."""
    cell = int(np.argmax(item.film.states[0]))
    return slice(cell, cell + 1)


def messages(item: Item, cells: slice = ALL) -> list[dict[str, Any]]:
    """The question about a clip in memory, or about some of its half seconds."""
    video = {"type": "video", "video": pictures(item)[cells], "source_fps": 2.0}
    return [{"role": "user", "content": [video, {"type": "text", "text": item.question}]}]


def description(item: Item) -> str:
    """The tags of the columns, then second, column and tag of the lamps that change to another state, in time order."""
    film = item.film
    columns = painter_of(film).columns
    named = {columns[place]: film.tags[place] or "none" for place in range(len(film.states))} if film.tags else {}
    words = [" ".join(named[column] for column in sorted(named))] if named else []
    changes = [(cell, place) for place, cell in np.argwhere(np.diff(film.states, axis=1) > 0).tolist()]
    for cell, place in sorted(changes)[:EVENTS]:
        words.append(f"{(cell + 1) / 2:g} {columns[place] + 1} {named.get(columns[place], 'none')}")
    return "; ".join(words)


def training_sample(item: Item, processor: KeyeProcessor, cells: slice = ALL) -> Sample:
    """Question, answer, and the description after them; of a part of a clip only the tags are described."""
    asked = messages(item, cells)
    chat = [*asked, {"role": "assistant", "content": item.answer}]
    if item.film.changes == "lamp" and cells != ALL:
        chat += [
            {"role": "user", "content": DESCRIBE},
            {"role": "assistant", "content": description(item).split(";")[0]},
        ]
    elif item.film.changes == "lamp":
        chat += [{"role": "user", "content": DESCRIBE}, {"role": "assistant", "content": description(item)}]
    return processor.sample(chat)


def corner_sample(index: int, processor: KeyeProcessor) -> Sample:
    """A still of SlowFastWorld with an object in a corner, the first lesson about places (`scripts.bench.places`)."""
    draft = places.drawn("image_place", places.TRAIN, index)
    return processor.sample([*places.messages(draft), {"role": "assistant", "content": draft.answer}])


class Drawn:
    """The first questions of a split, in memory, as a benchmark of `keye.evaluation`."""

    def __init__(self, families: Sequence[str], split: str, number: int, curriculum: Curriculum) -> None:
        self.name = f"SlowFastBench {split}"
        self.items = [
            draw(family, split, index, max(FAMILIES[family].shortest, curriculum.length), curriculum.height)
            for family in families
            for index in range(number)
        ]

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Question]:
        for item in self.items:
            options = None if item.options is None else list(item.options)
            yield Question(item.name, item.family, messages(item), item.answer, options, item.tolerance,
                           slices=item.slices, group=item.group)  # fmt: skip


def build(args: argparse.Namespace) -> tuple[KeyeForConditionalGeneration, KeyeProcessor]:
    """A new tiny model and its processor: every frame slow, without a limit."""
    folder = CACHE / "tokenizer"
    if not folder.exists():
        asked = [item.question for family in FAMILIES if not FAMILIES[family].real
                 for item in (draw(family, "train", i, height=480) for i in range(40))]  # fmt: skip
        train_tokenizer([*texts(0), *asked, DESCRIBE], 1024).save_pretrained(folder)
    from keye.processor.tokenizer import load_tokenizer

    encoder = {"policy": "all_slow", "fps": 2.0, "max_tokens": 1_000_000, "min_tokens_per_frame": args.frame_tokens,
               "max_tokens_per_frame": args.frame_tokens}  # fmt: skip
    processor = KeyeProcessor(load_tokenizer(str(folder)), encoder=encoder)
    torch.manual_seed(args.seed)
    model = KeyeForConditionalGeneration(processor.configure(KeyeConfig.preset("tiny", vocab_size=1024)))
    if args.start:
        model.load_state_dict(torch.load(CACHE / f"{args.start}.pt")["model"])
    return model, processor


def train(args: argparse.Namespace, model: KeyeForConditionalGeneration, processor: KeyeProcessor) -> dict[str, Any]:
    """Train to the last step; returns the record of the run: examples, tokens, seconds, curve on `dev`."""
    curriculum = Curriculum(args.easy, args.easy_length, args.length, args.height)
    settings = OptimizerConfig(learning_rate=args.rate, warmup=args.warmup, weight_decay=0.01)
    optimizer, schedule = build_optimizer(model, settings, args.steps)
    dev = Drawn(args.families, "dev", args.questions // 2, curriculum)
    path = CACHE / f"{args.run}.pt"
    record: dict[str, Any] = {"step": 0, "examples": 0, "tokens": 0, "seconds": 0.0, "curve": []}
    if path.exists() and not args.fresh:
        saved = torch.load(path)
        for part, name in ((model, "model"), (optimizer, "optimizer"), (schedule, "schedule")):
            part.load_state_dict(saved[name])
        record = saved["record"]
    losses: list[float] = []
    began = saved_at = time.monotonic()
    until = began + 60 * args.minutes if args.minutes else math.inf
    while record["step"] < args.steps and time.monotonic() < until:
        samples, total = [], 0
        while total < args.tokens:
            number = record["examples"]
            family = args.families[number % len(args.families)]
            index = args.first + number // len(args.families)
            share = record["step"] / args.steps
            if share < args.corners:
                sample = corner_sample(number, processor)
            else:
                item = curriculum.draw(family, index, share)
                cells = moment(item) if share < args.moment and family in ONE_EVENT else ALL
                sample = training_sample(item, processor, cells)
            samples.append(sample)
            total += len(sample)
            record["examples"] += 1
        loss = model.train()(**pack(samples, pad=processor.tokenizer.pad_token_id)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        record["step"] += 1
        record["tokens"] += total
        now = time.monotonic()
        record["seconds"], began = record["seconds"] + now - began, now
        if record["step"] % args.every == 0 or record["step"] == args.steps:
            scores = accuracies(model, processor, dev)
            record["curve"].append([record["step"], round(sum(losses) / len(losses), 4), scores])
            print(f"step {record['step']}  {record['examples']} clips  {record['seconds']:.0f} s  loss "
                  f"{sum(losses) / len(losses):.3f}  dev {scores}", flush=True)  # fmt: skip
            losses, began = [], time.monotonic()
        if time.monotonic() > min(saved_at + 60, until) or record["step"] == args.steps:
            states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**states, "schedule": schedule.state_dict(), "record": record}, path)
            saved_at = time.monotonic()
    return record


def accuracies(
    model: KeyeForConditionalGeneration, processor: KeyeProcessor, bench: Drawn, control: str = "none"
) -> Any:
    """Family → accuracy."""
    model.eval()
    report = evaluate(model, processor, bench, control=control, batch_size=20, max_new_tokens=24)
    return {family: round(score.accuracy, 4) for family, score in report.families.items()}


def main() -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=layout)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="families to train on together")
    parser.add_argument("--run", default="run", help="name of the run")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=0, help="of this call; the same command continues")
    parser.add_argument("--tokens", type=int, default=4096, help="of a step")
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate")
    parser.add_argument("--warmup", type=int, default=30, help="steps")
    parser.add_argument("--every", type=int, default=50, help="steps between two looks at dev")
    parser.add_argument("--corners", type=float, default=0.2, help="share of the steps with stills of corners")
    parser.add_argument(
        "--moment", type=float, default=0.6, help="share after which clips are longer than half a second"
    )
    parser.add_argument("--easy", type=float, default=0.8, help="share after which clips are as drawn")
    parser.add_argument("--easy-length", type=int, default=3, help="seconds of these clips, if the events fit")
    parser.add_argument("--length", type=int, default=8, help="seconds of a clip, at least the family's shortest")
    parser.add_argument("--height", type=int, default=144, help="pixels")
    parser.add_argument("--frame-tokens", type=int, default=8, help="of every frame")
    parser.add_argument("--questions", type=int, default=200, help="held-out questions of each family; half on dev")
    parser.add_argument("--start", help="a run whose weights to start from")
    parser.add_argument("--first", type=int, default=0, help="number of the first training question")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh", action="store_true", help="do not continue the run")
    parser.add_argument("--document", action="store_true", help="only write the page from the results")
    parser.add_argument("--out", type=Path, default=RESULTS, help="default docs/results")
    args = parser.parse_args()
    for folder in (CACHE, args.out / "bench_model"):
        folder.mkdir(parents=True, exist_ok=True)
    if not args.document:
        if unknown := set(args.families) - set(FAMILIES):
            parser.error(f"there is no family {', '.join(sorted(unknown))}; choose among {', '.join(FAMILIES)}")
        measure(args)
    (args.out / "bench_model.md").write_text(page(args.out / "bench_model"), encoding="utf-8")


def measure(args: argparse.Namespace) -> None:
    """Train, ask the held-out questions, and write the run's JSON."""
    model, processor = build(args)
    record = train(args, model, processor)
    if record["step"] < args.steps:
        print(f"stopped at step {record['step']} of {args.steps}; the same command continues", flush=True)
        return
    bench = Drawn(args.families, "heldout", args.questions, Curriculum(0, 0, args.length, args.height))
    heldout = {control: accuracies(model, processor, bench, control) for control in CONTROLS}
    chance = {family: evaluate_chance(bench, family) for family in args.families}
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "document", "fresh")}
    result = {
        "command": command(), "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
        "machine": machine(), "settings": settings, "parameters": sum(p.numel() for p in model.parameters()),
        **record, "chance": chance, "heldout": heldout,
    }  # fmt: skip
    (args.out / "bench_model" / f"{args.run}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(heldout), flush=True)


def evaluate_chance(bench: Drawn, family: str) -> float:
    """Accuracy of a uniform guess among the options, or among the four places of `ground`."""
    numbers = [len(item.options or range(4)) for item in bench.items if item.family == family]
    return sum(1 / number for number in numbers) / len(numbers)


def page(folder: Path) -> str:
    """The page with every run in `folder`, in order of their dates."""
    runs = sorted((json.loads(path.read_text()) | {"run": path.stem} for path in folder.glob("*.json")),
                  key=lambda found: found["date"])  # fmt: skip
    notes = folder / "notes.txt"
    lines = ["# What a small model learns on SlowFastBench", "", INTRODUCTION]
    for found in runs:
        lines += ["", f"## Run `{found['run']}`", "", *_run_lines(found)]
    if notes.exists():
        lines += ["", notes.read_text(encoding="utf-8").strip()]
    return "\n".join(lines) + "\n"


INTRODUCTION = """Written by `python -m scripts.bench.learn`: the tiny preset learns the split `train`, every \
frame slow and without a budget. Clips are drawn in memory, two frames a second, without encoding, and none is repeated.
`dev` was looked at while training; `heldout` was asked once, at the end. *Blind*: text only. *Zeroed*: the same token \
stream with every pixel zero. *Shuffled*: frames in random order. Per cent; the loss is that of training since the last
look at `dev`, whose clips are as drawn from the first step on."""


def _run_lines(found: dict[str, Any]) -> list[str]:
    settings, host = found["settings"], found["machine"]
    rows = []
    for family in found["heldout"]["none"]:
        shares = [found["chance"][family], *(found["heldout"][control].get(family) for control in CONTROLS)]
        curve = ", ".join(f"{step}: {100 * scores[family]:.0f} ({loss:.2f})" for step, loss, scores in found["curve"])
        rows.append([family, *("–" if share is None else f"{100 * share:.1f}" for share in shares), curve])
    columns = ["family", "chance", "heldout", "blind", "zeroed", "shuffled", "dev by step (loss)"]
    how = (
        f"`{found['command']}`; {found['date']}; {host['cores']} shared cores of {host['cpu']}. "
        f"{found['parameters'] / 1e6:.2f} M parameters, clips of {settings['length']} s at {settings['height']}p, "
        f"{settings['frame_tokens']} tokens a frame, {found['step']:,} steps, {found['examples']:,} clips, "
        f"{found['tokens']:,} tokens, {found['seconds'] / 60:.1f} minutes of training; seed {settings['seed']}."
    )
    title = f"Accuracy on {settings['questions']} held-out questions of each family"
    return [how, "", *markdown(Table(title, columns, rows))]


if __name__ == "__main__":
    sys.exit(run(main))
