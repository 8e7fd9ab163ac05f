"""Can a question of SlowFastBench v1 be answered without a pixel? A classifier tries, family by family.

It learns from questions of the split "train" and is scored on others, of the split "heldout". Its inputs are the words
of the question and, one after the other: the plan under each measure (types, times, tokens, similarities), the packets
of the file, and nothing else ("text"). A family counts where no input gives more than chance. Clips are drawn at 144p
and 8 to 32 seconds, their frames stay in memory (2 a second) for the plans and are encoded for the packets. Two parts:
"still" has still backgrounds, where noise and camera motion do not hide a change, and "drawn" the benchmark's own mix,
with fewer questions. Needs scikit-learn (the extra "adversary"). Drawn features are cached in .cache/bench/adversary;
an interrupted run continues. Results: docs/results/bench_v1.md.
"""

import hashlib
import inspect
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch

from keye import SlowFastEncoder
from keye.errors import KeyeError, run
from keye.evaluation.match import parse_box
from keye.slowfast.frame_classifier import FrameClassifier
from keye.slowfast.measures import Measure
from keye.world.render import write_mp4
from keye.world.slowfastbench import family as families
from keye.world.slowfastbench import film, questions, schedules, table
from keye.world.slowfastbench.questions import Item, draw
from keye.world.slowfastbench.real import REAL_CLIPS
from keye.world.slowfastbench.table import FAMILIES
from keye.world.slowfastbench.write import painter_of
from scripts.bench.common.record import ROOT, Claim, Table, arguments, document, out_of, save

EXAMPLES = """examples:
  python -m scripts.bench.adversary                          all families; 40 minutes on one quiet core
  python -m scripts.bench.adversary --motion drawn           the mix of backgrounds of the benchmark
  python -m scripts.bench.adversary --families find --quick  shows that it runs
  python -m scripts.bench.adversary --draw-only --families find order      fills the cache, for several processes
"""
HEAD = """# SlowFastBench v1: what can be answered without a pixel

Command: `python -m scripts.bench.adversary`. How the benchmark is made:
[docs/slowfastbench.md](../slowfastbench.md)."""
CHANGES = "One minus the lowest similarity of a clip, mean ± half the largest difference between two answers"
NOTE = """Within 1 point: the upper end of the interval is at most 1 point above chance; open where more questions must
decide. Intervals are over groups of questions. In a group all answers differ: where the inputs of a group are equal, a
classifier gives one choice and is right exactly once, and the interval has no width."""
FAST_MEASURES = ("change", "mse", "patch_cosine", "patch_l1")
MEASURES = (*FAST_MEASURES, "lab")
NUMBERS = {"still": (1600, 4000), "drawn": (800, 1200)}
"""Motion of the backgrounds → questions of a family to learn from and others to answer. The questions of a group have
different answers and almost equal inputs, so that the interval of the accuracy is narrow."""
HEIGHT = 144
CLIPS = ROOT / ".cache/clips"
CHUNK = 200
"""Groups in one file of the cache."""
EVENTS = 12
"""Lowest similarities that are given in the order of time, with their times."""
LOWEST = 0
"""Place of the lowest similarity in the inputs."""
POINT = 0.01
"""Largest accepted advantage over chance."""


@dataclass
class Drawn:
    """Questions of one family.

    Attributes:
        inputs: name → float32 [N, F]; lab and the packets have fewer rows, the first ones.
        answers: int [N], the number of the right choice.
        allowed: bool [N, C], the choices that the question offers.
        groups: int [N].
        drops: float32 [N, M], one minus the lowest similarity under each measure.
    """

    inputs: dict[str, np.ndarray]
    answers: np.ndarray
    allowed: np.ndarray
    groups: np.ndarray
    drops: np.ndarray


def main() -> None:
    parser = arguments(__doc__, EXAMPLES, results="bench_v1")
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), metavar="NAME",
                        help="only these (all; real_… with --motion drawn and .cache/clips)")  # fmt: skip
    parser.add_argument("--motion", choices=("still", "drawn"), default="still", help="of the backgrounds (still)")
    parser.add_argument("--train", type=int, metavar="N", help="questions to learn from (see NUMBERS)")
    parser.add_argument("--test", type=int, metavar="N", help="other questions (see NUMBERS)")
    parser.add_argument("--some", type=int, default=1000, metavar="N", help="of each for packets and lab (1000)")
    parser.add_argument("--dev", action="store_true", help="score on the split dev, while the drawing is being changed")
    parser.add_argument("--cached", action="store_true", help="use the questions in the cache and draw no others")
    parser.add_argument("--draw-only", action="store_true", help="fill the cache and stop")
    args = parser.parse_args()
    train, test = (80, 80) if args.quick else NUMBERS[args.motion]
    numbers = {"train": args.train or train, "test": args.test or test}
    splits = {"train": "train", "test": "dev" if args.dev else "heldout"}
    began, rows, changes, claims, out = time.monotonic(), [], [], [], out_of(args)
    real = args.motion == "drawn" and all((CLIPS / name).is_file() for name in REAL_CLIPS)
    for family in args.families or [name for name, row in FAMILIES.items() if real or not row.real]:
        drawn = {part: load(family, splits[part], numbers[part], args.some, args.motion, args.cached)
                 for part in numbers}  # fmt: skip
        if args.draw_only:
            continue
        found = judge(family, drawn["train"], drawn["test"])
        rows += found
        changes.append([family, *map(change, *spread(drawn["test"]))])
        chance, best = found[0][2], max(found, key=lambda row: float(row[5]))
        claims.append(
            Claim(f"{family}: best input", f"≤ 1 point above {chance} %", f"{best[4]} % ({best[1]})",
                  met=all(row[-1] == "yes" for row in found))
        )  # fmt: skip
        columns = ["family", "input", "chance", "questions", "accuracy, 95 % interval", "above", "within 1 point"]
        title = f"Accuracy of the adversary in per cent, learnt from at most {numbers['train']} other questions"
        by_measure = Table(CHANGES, ["family", *FAST_MEASURES], changes)
        save(out, args.motion, claims, [Table(title, columns, rows), by_measure], seconds=time.monotonic() - began,
             quick=args.quick, seeds=splits, notes=[NOTE])  # fmt: skip
        path = (out if args.quick or args.out else out.parent) / "bench_v1.md"
        path.write_text(document(out, ["still", "drawn"], HEAD), encoding="utf-8")


def spread(drawn: Drawn) -> tuple[np.ndarray, np.ndarray]:
    """Mean of the largest change under each measure, and the largest difference between the means of two answers."""
    means = np.stack([drawn.drops[drawn.answers == answer].mean(0) for answer in np.unique(drawn.answers)])
    return drawn.drops.mean(0), np.ptp(means, axis=0)


def change(mean: float, difference: float) -> str:
    """A cell of the table of changes."""
    return f"{mean:.3f} ± {difference / 2:.4f}"


def load(family: str, split: str, number: int, some: int, motion: str, cached: bool) -> Drawn:
    """The first `number` questions of a family, from the cache or drawn into it; `some` of them with all inputs.

    cached: only those in the cache, up to the first that is missing.
    """
    members = FAMILIES[family].members
    groups, full_groups = math.ceil(number / members), math.ceil(min(number, some) / members)
    folder = ROOT / ".cache/bench/adversary" / _code()
    folder.mkdir(parents=True, exist_ok=True)
    began, parts = time.monotonic(), []
    for first in range(0, groups, CHUNK):
        last = min(first + CHUNK, groups)
        here = min(max(full_groups - first, 0), last - first)
        path = folder / f"{family}-{motion}-{split}-{first}-{last}-{here}.npz"
        if cached:
            found = sorted(folder.glob(f"{family}-{motion}-{split}-{first}-{last}-*.npz"), key=_full)
            if not found:
                break
            path = found[-1]
        elif not path.exists():
            part = _chunk(family, split, range(first, last), here, motion)
            scratch = path.with_suffix(".part.npz")
            np.savez_compressed(scratch, **part)
            scratch.replace(path)
            left = (time.monotonic() - began) / (last / groups) * (1 - last / groups)
            print(f"      {family} {split}: {last} of {groups} groups drawn, {left:.0f} s left", flush=True)
        parts.append(np.load(path))
    if not parts:
        raise KeyeError(f"the cache has no {split} questions of {family}; leave out --cached to draw them")
    joined = {name: np.concatenate([part[name] for part in parts if name in part]) for name in parts[0]}
    words, asked = joined.pop("words"), {}
    for name in [name for name in joined if name.startswith("input ")]:
        values = joined.pop(name)
        asked[name.removeprefix("input ")] = np.concatenate([words[: len(values)], values], 1).astype(np.float32)
    return Drawn({"text": words.astype(np.float32), **asked}, **joined)


def _full(path: Path) -> int:
    """Groups with all inputs in a file of the cache."""
    return int(path.stem.rpartition("-")[2])


def _code() -> str:
    """A checksum of the code that draws, so that other drawings are not mixed."""
    digest = hashlib.sha256()
    for module in (families, film, questions, schedules, table):
        digest.update(Path(module.__file__).read_bytes())
    for part in (_chunk, _plans, _Remembered, _packets, _words, choice):
        digest.update(inspect.getsource(part).encode())
    return digest.hexdigest()[:12]


def _chunk(family: str, split: str, groups: range, full: int, motion: str) -> dict[str, np.ndarray]:
    """Words, inputs, answers and choices of some groups of questions; the first `full` groups with all inputs."""
    torch.set_num_threads(1)
    encoders = {name: SlowFastEncoder(measure=name) for name in MEASURES}
    row, rows = FAMILIES[family], {}
    length = next(length for length in (8, 16, 32) if length >= row.shortest)
    for group in groups:
        seen: dict[str, dict[str, np.ndarray]] = {}
        for member in range(row.members):
            index = group * row.members + member
            item = draw(family, split, index, length, HEIGHT, None if motion == "drawn" else motion)
            if item.clip not in seen:
                painter = painter_of(item.film, CLIPS)
                used = encoders if group - groups[0] < full else {name: encoders[name] for name in FAST_MEASURES}
                seen[item.clip] = {f"input {name}": values for name, values in _plans(painter, used)}
                if used is encoders:
                    seen[item.clip]["input packets"] = _packets(painter)
            answer, allowed = choice(item)
            drops = np.array([1 - seen[item.clip][f"input {name}"][LOWEST] for name in FAST_MEASURES], np.float32)
            facts = {"drops": drops, "words": _words(item), "answers": answer, "allowed": allowed, "groups": group}
            for name, value in (facts | seen[item.clip]).items():
                rows.setdefault(name, []).append(value)
    return {name: np.stack(values) for name, values in rows.items()}


def _plans(painter: film.Painter, encoders: dict[str, SlowFastEncoder]) -> Iterator[tuple[str, np.ndarray]]:
    """(measure, what a plan shows): types, similarities, and the lowest similarities with their times."""
    frames = painter.cell_frames()
    different = list({id(frame): frame for frame in frames}.values())
    numbers = {id(frame): number for number, frame in enumerate(different)}
    shown = torch.tensor([numbers[id(frame)] for frame in frames])
    pixels = torch.from_numpy(np.stack(different)).permute(0, 3, 1, 2)
    for name, encoder in encoders.items():
        types, scores = FrameClassifier(_Remembered(encoder.measure, pixels), encoder.policy).step(shown)
        similarity = np.nan_to_num(np.array(scores), nan=1.0)
        lowest = np.sort(np.argsort(similarity, kind="stable")[:EVENTS])
        found = [[similarity.min()], types, similarity, similarity[lowest], lowest, np.sort(similarity), [sum(types)]]
        yield name, np.concatenate(found)


class _Remembered:
    """A measure of numbered frames that compares equal pairs once; frames of a still background occur often."""

    def __init__(self, measure: Measure, pixels: torch.Tensor) -> None:
        self.name, self.threshold, self._measure = measure.name, measure.threshold, measure
        self._features, self._scores = measure.prepare(pixels), {}

    def prepare(self, frames: torch.Tensor) -> torch.Tensor:
        return frames

    def compare(self, reference: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        one, others = int(reference), features.tolist()
        new = [other for other in dict.fromkeys(others) if (one, other) not in self._scores]
        if new:
            found = self._measure.compare(self._features[one], self._features[new]).tolist()
            self._scores |= {(one, other): score for other, score in zip(new, found, strict=True)}
        return torch.tensor([self._scores[one, other] for other in others])


def _packets(painter: film.Painter) -> np.ndarray:
    """Logarithms of the sizes of the packets of the encoded clip in the order of time, sorted, and key frames."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write_mp4(path, (painter.frame(i) for i in range(painter.film.frames)), painter.film.fps)
        with av.open(str(path)) as container:
            packets = sorted((p for p in container.demux(video=0) if p.size), key=lambda packet: packet.pts)
    sizes = np.log([packet.size for packet in packets])
    return np.concatenate([sizes, np.sort(sizes), [float(packet.is_keyframe) for packet in packets]])


def _words(item: Item) -> np.ndarray:
    """The words of the question and the places of its options, hashed into 0/1 columns, float32 [96]."""
    found = np.zeros(96, np.float32)
    question, _, offered = item.question.partition(" Options: ")
    options = [f"{place}:{option}" for place, option in enumerate(offered.split(", "))]
    for word in [*question.lower().split(), *options]:
        found[int(hashlib.md5(word.encode()).hexdigest(), 16) % len(found)] = 1
    return found


def choice(item: Item) -> tuple[int, np.ndarray]:
    """The number of the right choice and the offered choices, bool [C].

    Choices are the words or numbers of the family; quarters of the frame for boxes; for seconds, the first, second, …
    of the options.
    """
    if item.options is None:
        left, top, right, bottom = parse_box(item.answer)
        return int(left + right > 1000) + 2 * int(top + bottom > 1000), np.ones(4, bool)
    if item.family == "when":
        return item.options.index(item.answer), np.ones(4, bool)
    known = {"turn": schedules.WAYS}.get(item.family, tuple(map(str, range(10))))
    names = questions.TAG_COLOURS if item.options[0] in questions.TAG_COLOURS else known
    return names.index(item.answer), np.array([name in item.options for name in names])


def judge(family: str, train: Drawn, test: Drawn) -> list[list[str]]:
    """A row of the table for each input."""
    rows = []
    for name in train.inputs:
        number = len(test.inputs[name])
        allowed, truth = test.allowed[:number], test.answers[:number]
        chance = float((1 / allowed.sum(1)).mean())
        guesses = guess(train.inputs[name], train, test.inputs[name], allowed)
        right = guesses == truth
        low, high = interval(right, test.groups[:number])
        above = right.mean() - chance
        within = "yes" if high <= chance + POINT else "**no**" if low > chance + POINT else "open: more questions"
        span = f"{100 * right.mean():.1f} ({100 * low:.1f}–{100 * high:.1f})"
        rows.append([family, name, f"{100 * chance:.1f}", f"{number:,}", span, f"{100 * above:+.1f}",
                     within])  # fmt: skip
        print("      " + " · ".join(rows[-1]), flush=True)
    return rows


def guess(inputs: np.ndarray, train: Drawn, others: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """The choices int [N] of the better of two classifiers; groups of a fifth of the training questions decide which.

    Raises:
        KeyeError: scikit-learn is not installed.
    """
    try:
        from sklearn.ensemble import HistGradientBoostingClassifier
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise KeyeError('the adversary needs scikit-learn; install it with pip install "keye[adversary]"') from error
    number = len(inputs)
    labels, kept_back = train.answers[:number], train.groups[:number] % 5 == 0
    models = (
        make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=200)),
        HistGradientBoostingClassifier(max_iter=40, max_leaf_nodes=15, l2_regularization=1.0, random_state=0),
    )
    best: tuple[float, np.ndarray] = (-1.0, np.zeros(len(others), int))
    for model in models:
        model.fit(inputs[~kept_back], labels[~kept_back])
        score = (_pick(model, inputs[kept_back], train.allowed[:number][kept_back]) == labels[kept_back]).mean()
        if score > best[0]:
            best = float(score), _pick(model, others, allowed)
    return best[1]


def _pick(model: object, inputs: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    shares = np.zeros(allowed.shape)
    shares[:, model.classes_] = model.predict_proba(inputs)
    return np.where(allowed, shares, -1).argmax(1)


def interval(right: np.ndarray, groups: Sequence[int]) -> tuple[float, float]:
    """The 95 % interval of a mean whose groups are independent, from the spread of their means."""
    _, where = np.unique(groups, return_inverse=True)
    means = np.bincount(where, right) / np.bincount(where)
    mean, half = right.mean(), 1.96 * means.std(ddof=1) / math.sqrt(len(means))
    return mean - half, mean + half


if __name__ == "__main__":
    sys.exit(run(main))
