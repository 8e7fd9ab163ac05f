"""Can a question of SlowFastWorld be answered without a pixel?

Clips are drawn with the tiny recipe's settings and encoded to files as the demo does. Probes learn the answer from the
question's words and from what is known of a clip without its pixels: what the plan hands to the model (frame types,
seconds, tokens), the plan's similarity values, and sizes, kinds and order of the packets in the file. A family is
sound where no probe does better on other clips than the best constant guess.
"""

import argparse
import math
import sys
import tempfile
import time
import tomllib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor, nn

import stages
from keye import SlowFastEncoder
from keye.errors import run
from keye.evaluation.match import match
from keye.world import generate, read_manifest
from keye.world.scene import COLOURS

EXAMPLES = """examples:
  python scripts/bench/world_probes.py                                   all families; about ten minutes on one core
  python scripts/bench/world_probes.py --families when count --measure change
"""
FAMILIES = ("read", "count", "order", "when", "motion", "find")
GROUPS = ("plan", "similarity", "packets", "all")
BINS = 16
SURE = 3.0  # standard errors above chance: a table holds the best of four probes in 24 rows


@dataclass
class Drawn:
    """Clips of one family. features: group → [N, F]; answers: class of each; names: the classes; keys: exact plans."""

    features: dict[str, Tensor]
    answers: list[str]
    keys: list[Any]


def main() -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=layout)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=FAMILIES)
    parser.add_argument("--train", type=int, default=1600, metavar="N", help="clips to learn from (1600)")
    parser.add_argument("--test", type=int, default=800, metavar="N", help="clips to be judged on (800)")
    parser.add_argument("--measure", help="the encoder's measure (the tiny recipe's, patch_l1)")
    parser.add_argument("--seed", type=int, default=11)
    args = parser.parse_args()
    print("| family | features | chance | look-up | k-NN | logistic | MLP | best, 95 % interval | above chance |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for family in args.families:
        began = time.monotonic()
        train, test = (draw(family, n, args.seed + i, args.measure) for i, n in enumerate((args.train, args.test)))
        for row in judge(family, train, test):
            print(f"| {' | '.join(row)} |", flush=True)
        print(f"{family}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


def draw(family: str, count: int, seed: int, measure: str | None) -> Drawn:
    """`count` clips of a family under the tiny recipe's settings, written, read and planned."""
    recipe = tomllib.loads((Path(stages.__file__).parent / "recipes/tiny.toml").read_text())
    settings, options = recipe["data"]["world"]["settings"], recipe["processor"]["encoder"]
    if measure:
        options = {name: value for name, value in options.items() if name != "threshold"} | {"measure": measure}
    encoder = SlowFastEncoder(**options)
    rows: list[dict[str, np.ndarray]] = []
    answers, keys = [], []
    with tempfile.TemporaryDirectory() as folder:
        difficulty = settings["difficulty"][family]
        path = generate(folder, "train", {family: count}, seed, duration=settings["duration"], difficulty=difficulty,
                        workers=1, progress=False)  # fmt: skip
        for sample in read_manifest(path):
            media, words = sample["messages"][0]["content"]
            clip = Path(folder) / media["video"]
            plan = encoder.plan(clip)
            kinds, seconds = plan.frame_types.numpy(), plan.timestamps.numpy()
            similarity = np.nan_to_num(plan.similarity.numpy(), nan=1.0)
            asked = _asked(sample, words["text"])
            rows.append({
                "question": asked,
                "plan": np.concatenate([kinds, seconds, [plan.tokens, kinds.sum()]]),
                "similarity": np.concatenate([similarity, np.sort(similarity), _binned(similarity, 0, 1, asked)]),
                "packets": _packets(clip, asked),
            })  # fmt: skip
            options = sample["options"]
            answers.append(str(options.index(sample["answer"])) if family == "order" else sample["answer"])
            keys.append((*kinds.tolist(), *seconds.tolist(), plan.tokens))
    table = {name: torch.from_numpy(np.stack([row[name] for row in rows]).astype(np.float32)) for name in rows[0]}
    groups = {name: torch.cat([table["question"], table[name]], 1) for name in GROUPS[:-1]}
    groups["all"] = torch.cat(list(table.values()), 1)
    return Drawn(groups, answers, keys)


def _asked(sample: dict[str, Any], question: str) -> np.ndarray:
    """One-hot colours of the options in their order (`order`), else of the question's words, `[12]`."""
    names = list(COLOURS)
    found = np.zeros((2, len(names)))
    said = sample["options"] if sample["family"] == "order" else [name for name in names if name in question]
    for place, name in enumerate(said[:2]):
        found[place, names.index(name)] = 1
    return found.ravel()


def _binned(values: np.ndarray, low: float, high: float, asked: np.ndarray) -> np.ndarray:
    """How many values lie in each bin, and the same apart for each colour asked for."""
    counts = np.histogram(values.clip(low, high), BINS, (low, high))[0].astype(float)
    return np.concatenate([counts, np.outer(asked[: len(COLOURS)], counts).ravel()])


def _packets(path: Path, asked: np.ndarray) -> np.ndarray:
    """Log sizes in the order of the file, sorted and binned; key-frame flags; places in time."""
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    sizes = np.log(np.array([packet.size for packet in packets], float))
    times = [packet.pts for packet in packets]
    flags = [float(packet.is_keyframe) for packet in packets]
    relative = (sizes - sizes.mean()) / (sizes.std() + 1e-9)
    places = np.argsort(np.argsort(times)) - np.arange(len(times))
    return np.concatenate([sizes, np.sort(sizes), relative, flags, places, _binned(relative, -3, 3, asked)])


def judge(family: str, train: Drawn, test: Drawn) -> list[list[str]]:
    """A row of the table for each group of features."""
    tolerance = 0.5 if family == "when" else None
    names = sorted(set(train.answers))
    accepts = torch.tensor([[match(guess, truth, tolerance) for truth in names] for guess in names]).float()
    labels, truths = (torch.tensor([names.index(answer) for answer in d.answers]) for d in (train, test))

    def right(shares: Tensor) -> float:
        """Accuracy of the guesses that collect most of the predicted shares [N, C]."""
        return accepts[(shares @ accepts.T).argmax(1), truths].mean().item()

    prior = torch.bincount(labels, minlength=len(names)).float()
    chance = right(prior.expand(len(truths), -1))
    rows = []
    for group in GROUPS:
        mean, spread = train.features[group].mean(0), train.features[group].std(0)
        used = spread > 1e-6
        inputs, others = (((d.features[group] - mean) / spread)[:, used] for d in (train, test))
        found = {"look-up": right(look_up(train, test, names, prior)) if group == "plan" else None,
                 "k-NN": right(neighbours(inputs, labels, others, len(names))),
                 "logistic": right(learnt(inputs, labels, others, len(names), 0)),
                 "MLP": right(learnt(inputs, labels, others, len(names), 128))}  # fmt: skip
        best = max(value for value in found.values() if value is not None)
        low, high = wilson(best, len(truths))
        shown = ["–" if value is None else f"{100 * value:.1f}" for value in found.values()]
        span = f"{100 * best:.1f} ({100 * low:.1f}–{100 * high:.1f})"
        limit = chance + SURE * math.sqrt(chance * (1 - chance) / len(truths))
        rows.append([family, group, f"{100 * chance:.1f}", *shown, span, "**yes**" if best > limit else "no"])
    return rows


def look_up(train: Drawn, test: Drawn, names: list[str], prior: Tensor) -> Tensor:
    """Shares [N, C] of the answers of training clips with exactly the same plan."""
    table: dict[Any, Counter[str]] = {}
    for key, answer in zip(train.keys, train.answers, strict=True):
        table.setdefault(key, Counter())[answer] += 1
    return torch.stack([torch.tensor([float(table[k][n]) for n in names]) if k in table else prior for k in test.keys])


def neighbours(inputs: Tensor, labels: Tensor, others: Tensor, classes: int, k: int = 25) -> Tensor:
    """Shares [N, C] of the answers of the k nearest training clips."""
    nearest = torch.cdist(others, inputs).topk(k, largest=False).indices
    return nn.functional.one_hot(labels[nearest], classes).float().mean(1)


def learnt(inputs: Tensor, labels: Tensor, others: Tensor, classes: int, hidden: int) -> Tensor:
    """Shares [N, C] of a logistic regression (hidden 0) or of an MLP; a fifth of the clips chooses when to stop."""
    torch.manual_seed(0)
    width = inputs.shape[1]
    if not width:
        return torch.bincount(labels, minlength=classes).float().expand(len(others), -1)
    layers = [nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(0.3), nn.Linear(hidden, classes)]
    model = nn.Sequential(*layers) if hidden else nn.Linear(width, classes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    apart = len(inputs) // 5
    best, kept = math.inf, torch.zeros(len(others), classes)
    for _ in range(60):
        model.train()
        for batch in torch.randperm(len(inputs) - apart).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs[apart:][batch]), labels[apart:][batch]).backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            loss = nn.functional.cross_entropy(model(inputs[:apart]), labels[:apart]).item()
            if loss < best:
                best, kept = loss, model(others).softmax(1)
    return kept


def wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of `count` trials."""
    z2 = 1.96**2
    centre, half = share + z2 / 2 / count, 1.96 * math.sqrt(share * (1 - share) / count + z2 / 4 / count**2)
    return (centre - half) / (1 + z2 / count), (centre + half) / (1 + z2 / count)


if __name__ == "__main__":
    sys.exit(run(main))
