"""Can a question of SlowFastWorld be answered without a pixel?

Clips and stills are drawn with the tiny recipe's settings and written to files as the demo does. Probes learn the
answer from the words of the question and from what is known without pixels: what the plan gives to the model (frame
types, seconds, tokens), the similarities of the plan, and the bytes of the file without decoding (sizes, types and
order of packets; size of a PNG). A family passes where no probe is better on other clips than the best constant guess.
Results: docs/results/world.md.
"""

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
from keye.world.scene import COLOURS, SHAPES
from scripts.bench.common.record import Claim, Table, arguments, document, out_of, save

EXAMPLES = """examples:
  python -m scripts.bench.world_probes                                      all families; ten minutes on one quiet core
  python -m scripts.bench.world_probes --families when count --quick        shows that it runs
"""
HEAD = """# The drawn world, probed

Can a question of SlowFastWorld be answered without a pixel? To repeat all measurements: `python -m
scripts.bench.world_probes`.
The best of four probes (a look-up of the exact plan, 25 nearest neighbours, a logistic regression, an MLP with 128
units) is compared with the best constant guess. Families that leak stay as they are, because the
demo's records depend on them; comparisons use SlowFastBench ([bench_v1.md](bench_v1.md))."""
CLIPS = ("read", "count", "order", "when", "motion", "find")
STILLS = ("image_read", "image_ground", "image_place")
MEASURES = ("patch_l1", "change")
"""The measure of the tiny recipe, with the recipe's threshold, and the default measure, with its own threshold."""
BINS = 16
SURE = 3.0
"""Standard errors above chance that count as a leak. A table takes the best of four probes in up to 39 rows."""


@dataclass
class Drawn:
    """Samples of one family.

    Attributes:
        features: group → [N, F] float32.
        answers: the class of each sample.
        plans: group → the exact plan of each sample, for the groups `plan …`.
    """

    features: dict[str, Tensor]
    answers: list[str]
    plans: dict[str, list[Any]]


def main() -> None:
    parser = arguments(__doc__, EXAMPLES, results="world")
    parser.add_argument("--families", nargs="+", default=[*CLIPS, *STILLS], choices=[*CLIPS, *STILLS])
    parser.add_argument("--train", type=int, metavar="N", help="samples to learn from (1000; 100 with --quick)")
    parser.add_argument("--test", type=int, metavar="N", help="other samples to predict (600; 100 with --quick)")
    parser.add_argument("--seed", type=int, default=31)
    args = parser.parse_args()
    sizes = (args.train or (100 if args.quick else 1000), args.test or (100 if args.quick else 600))
    columns = ["family", "features", "chance", "look-up", "k-NN", "logistic", "MLP", "best, 95 % interval", "leaks"]
    title = f"Accuracy in per cent on {sizes[1]} samples, learnt from {sizes[0]} others"
    seeds = {"train": args.seed, "test": args.seed + 1}
    out, began, rows, claims = out_of(args), time.monotonic(), [], []
    path = (out if args.quick or args.out else out.parent) / "world.md"
    for family in args.families:
        found = judge(family, *(draw(family, n, args.seed + i) for i, n in enumerate(sizes)))
        rows += found
        best = max(found, key=lambda row: float(row[-2].split()[0]))
        goal = f"< {SURE:g} standard errors above {best[2]} %"
        met = all(row[-1] == "no" for row in found)
        claims.append(Claim(f"{family}: best probe", goal, f"{best[-2]} % ({best[1]})", met=met))
        # Saved after every family, because a run takes long.
        save(out, "probes", claims, [Table(title, columns, rows)], seconds=time.monotonic() - began, quick=args.quick,
             seeds=seeds)  # fmt: skip
        path.write_text(document(out, ["probes"], HEAD), encoding="utf-8")
    print(f"written: {path}")


def encoders() -> dict[str, SlowFastEncoder]:
    """One encoder for each measure, otherwise with the settings of the tiny recipe."""
    options = _recipe()["processor"]["encoder"]
    other = {name: value for name, value in options.items() if name != "threshold"}
    return {name: SlowFastEncoder(**(options if name == options["measure"] else other | {"measure": name}))
            for name in MEASURES}  # fmt: skip


def _recipe() -> dict[str, Any]:
    return tomllib.loads((Path(stages.__file__).parent / "recipes/tiny.toml").read_text())


def draw(family: str, count: int, seed: int) -> Drawn:
    """`count` samples of a family with the settings of the tiny recipe, written, read and planned."""
    settings = _recipe()["data"]["world"]["settings"]
    rows: list[dict[str, np.ndarray]] = []
    answers: list[str] = []
    plans: dict[str, list[Any]] = {}
    made = encoders() if family in CLIPS else {}
    with tempfile.TemporaryDirectory() as folder:
        difficulty = settings["difficulty"][family]
        path = generate(folder, "train", {family: count}, seed, duration=settings["duration"], difficulty=difficulty,
                        workers=1, progress=False)  # fmt: skip
        for sample in read_manifest(path):
            media, words = sample["messages"][0]["content"]
            file, asked = Path(folder) / media[media["type"]], _asked(sample, words["text"])
            row = {"question": asked}
            for name, encoder in made.items():
                plan = encoder.plan(file)
                kinds, seconds = plan.frame_types.numpy(), plan.timestamps.numpy()
                similarity = np.nan_to_num(plan.similarity.numpy(), nan=1.0)
                row[f"plan {name}"] = np.concatenate([kinds, seconds, [plan.tokens, kinds.sum()]])
                binned = _binned(similarity, 0, 1, asked)
                row[f"similarity {name}"] = np.concatenate([similarity, np.sort(similarity), binned])
                key = (*kinds.tolist(), *seconds.tolist(), plan.tokens)
                plans.setdefault(f"plan {name}", []).append(key)
            row["file"] = _packets(file, asked) if family in CLIPS else np.log([file.stat().st_size])
            rows.append(row)
            choices = sample["options"]
            answers.append(str(choices.index(sample["answer"])) if family == "order" else sample["answer"])
    table = {name: torch.from_numpy(np.stack([row[name] for row in rows]).astype(np.float32)) for name in rows[0]}
    groups = {name: torch.cat([table["question"], values], 1) for name, values in table.items() if name != "question"}
    if len(groups) > 1:
        groups["all"] = torch.cat(list(table.values()), 1)
    return Drawn(groups, answers, plans)


def _asked(sample: dict[str, Any], question: str) -> np.ndarray:
    """One-hot colours of the options in their order (`order`), else colours and shapes in the question, `[16]`."""
    names = list(COLOURS)
    found = np.zeros((2, len(names)))
    asked = sample["options"] if sample["family"] == "order" else [name for name in names if name in question]
    for place, name in enumerate(asked[:2]):
        found[place, names.index(name)] = 1
    return np.concatenate([found.ravel(), [float(shape in question) for shape in SHAPES]])


def _binned(values: np.ndarray, low: float, high: float, asked: np.ndarray) -> np.ndarray:
    """How many values fall into each bin, and the same separately for each colour asked for."""
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
    names = sorted({*train.answers, *test.answers})
    accepts = torch.tensor([[match(guess, truth, tolerance) for truth in names] for guess in names]).float()
    labels, truths = (torch.tensor([names.index(answer) for answer in d.answers]) for d in (train, test))

    def right(shares: Tensor) -> float:
        """Accuracy of the guesses that collect most of the predicted shares [N, C]."""
        return accepts[(shares @ accepts.T).argmax(1), truths].mean().item()

    prior = torch.bincount(labels, minlength=len(names)).float()
    chance = right(prior.expand(len(truths), -1))
    rows = []
    for group in train.features:
        mean, spread = train.features[group].mean(0), train.features[group].std(0)
        used = spread > 1e-6
        inputs, others = (((d.features[group] - mean) / spread)[:, used] for d in (train, test))
        found = {"look-up": right(look_up(train, test, group, names, prior)) if group in train.plans else None,
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


def look_up(train: Drawn, test: Drawn, group: str, names: list[str], prior: Tensor) -> Tensor:
    """Shares [N, C] of the answers of training clips with exactly the same plan."""
    table: dict[Any, Counter[str]] = {}
    for key, answer in zip(train.plans[group], train.answers, strict=True):
        table.setdefault(key, Counter())[answer] += 1
    keys = test.plans[group]
    return torch.stack([torch.tensor([float(table[k][n]) for n in names]) if k in table else prior for k in keys])


def neighbours(inputs: Tensor, labels: Tensor, others: Tensor, classes: int, k: int = 25) -> Tensor:
    """Shares [N, C] of the answers of the k nearest training clips."""
    nearest = torch.cdist(others, inputs).topk(k, largest=False).indices
    return nn.functional.one_hot(labels[nearest], classes).float().mean(1)


def learnt(inputs: Tensor, labels: Tensor, others: Tensor, classes: int, hidden: int) -> Tensor:
    """Shares [N, C] of a logistic regression (hidden 0) or of an MLP; a fifth of the samples decides when to stop."""
    torch.manual_seed(0)
    width = inputs.shape[1]
    if not width:
        return torch.bincount(labels, minlength=classes).float().expand(len(others), -1)
    layers = [nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(0.3), nn.Linear(hidden, classes)]
    model = nn.Sequential(*layers) if hidden else nn.Linear(width, classes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    kept_back = len(inputs) // 5
    best, kept = math.inf, torch.zeros(len(others), classes)
    for _ in range(60):
        model.train()
        for batch in torch.randperm(len(inputs) - kept_back).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs[kept_back:][batch]), labels[kept_back:][batch]).backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            loss = nn.functional.cross_entropy(model(inputs[:kept_back]), labels[:kept_back]).item()
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
