"""Claims and tables of the study of tracing, from its rows."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from scripts.bench.common.intervals import paired_interval
from scripts.bench.common.record import Claim, Table
from scripts.bench.systems.trace import grading
from scripts.bench.systems.trace.ranks import deciles, spearman, spearman_interval
from scripts.bench.systems.trace.shortcut import auc, names, telling

Rows = Sequence[dict[str, Any]]
Planted = Mapping[tuple[float, int], Rows]
PUBLISHED = -0.863
COHERENCES = ("cas", "cas of the reply", "dss", "effect on evidence", "confidence")


def spread(values: Sequence[float], units: Sequence[str] | None = None, scale: float = 100, digits: int = 0) -> str:
    """A mean and its 95 % interval."""
    low, high = paired_interval(np.array(values, dtype=float), units)
    return f"{scale * fmean(values):+.{digits}f} ({scale * low:+.{digits}f} … {scale * high:+.{digits}f})"


def hits(rows: Rows, title: str) -> Table:
    """Per family: how often the strongest frame of each method shows the answer, in per cent."""
    lines = []
    for family in (*grading.LOCATED, "all"):
        of = [row for row in rows if grading.gradable(row) and family in (row["family"], "all")]
        if not of:
            continue
        cells = [f"{100 * fmean(grading.hit(row, method) for row in of):.0f}" for method in grading.METHODS]
        good = [row for row in of if row["right"]]
        right = f"{100 * len(good) / len(of):.0f}"
        cells += [f"{100 * fmean(grading.hit(row, method) for row in good):.0f}" if good else "–"
                  for method in ("knock-out", "attention")]  # fmt: skip
        gains = [spread(gain(of, other)) for other in ("attention", "most tokens", "chance")]
        lines.append((family, len(of), right, f"{100 * fmean(map(grading.chance, of)):.0f}", *cells, *gains))
    columns = (
        "family", "questions", "right", "chance", *grading.METHODS, "knock-out if right", "attention if right",
        "knock-out − attention (95 %)", "knock-out − most tokens (95 %)", "knock-out − chance (95 %)",
    )  # fmt: skip
    return Table(f"Strongest frame shows the answer, % of questions, {title}", columns, lines)


def gain(rows: Rows, other: str) -> list[float]:
    """Of each question: hit of the knock-out minus that of another method, or minus chance."""
    return [grading.hit(r, "knock-out") - (grading.chance(r) if other == "chance" else grading.hit(r, other))
            for r in rows]  # fmt: skip


def first_frames(rows: Rows, kind: str) -> str:
    """How often the strongest frame is the first one: a bias of position, which shows the answer less often."""
    share = fmean(int(np.argmax(grading.values(row, "knock-out"))) == 0 for row in rows)
    shown = fmean(row["frames"][0]["evidence"] for row in rows if grading.gradable(row))
    return (f"The frame with the strongest knock-out is the first one in {share:.0%} of the questions of the {kind} "
            f"model; the first frame shows the answer in {shown:.0%} of the graded ones.")  # fmt: skip


def slow_shares(rows: Rows) -> Table:
    """Per family: the slow frames' share of tokens, effect and attention; the fast frames have the rest."""
    lines = []
    for family in (*grading.FAMILIES, "all"):
        every = [grading.slow_shares(row) for row in rows if family in (row["family"], "all")]
        found = np.array([one for one in every if one is not None])
        if len(found):
            tokens, effect, attention = found.mean(0)
            more = [spread(found[:, at] - found[:, 0], scale=1, digits=2) for at in (1, 2)]
            shown = (f"{value:.2f}" for value in (tokens, effect, attention))
            lines.append((family, f"{len(found)} of {len(every)}", *shown, *more))
    columns = (
        "family", "questions", "of tokens", "of effect", "of attention", "effect − tokens (95 %)",
        "attention − tokens (95 %)",
    )  # fmt: skip
    return Table("Share of slow frames; fast frames have the rest", columns, lines)


def measure_of(row: dict[str, Any], name: str) -> float | None:
    """A coherence of a question; None where it is not defined."""
    if name == "confidence":
        return row["score"]
    if name == "effect on evidence":
        return grading.share_on_evidence(row) if grading.gradable(row) else None
    return row.get(name)


def correlations(rows: Rows) -> dict[str, tuple[int, int, str, bool, str, float]]:
    """Measure → questions, wrong ones, correlation with being wrong (and whether its interval is below 0), the same
    within families, and that of ten groups."""
    found = {}
    for name in COHERENCES:
        of = [row for row in rows if measure_of(row, name) is not None]
        score = np.array([measure_of(row, name) for row in of], dtype=float)
        wrong = np.array([not row["right"] for row in of], dtype=float)
        families = [row["family"] for row in of]
        if len(of) >= 10 and 0 < wrong.mean() < 1:
            (low, high), within = spearman_interval(score, wrong), spearman_interval(score, wrong, families)
            pooled = f"{spearman(score, wrong):+.2f} ({low:+.2f} … {high:+.2f})"
            inside = f"{spearman(score, wrong, families):+.2f} ({within[0]:+.2f} … {within[1]:+.2f})"
            found[name] = len(of), int(wrong.sum()), pooled, high < 0, inside, deciles(score, wrong)
    return found


def correlation_table(rows: Rows) -> Table:
    """The correlation of each coherence with wrong answers."""
    columns = ("measure", "questions", "wrong", "per question (95 %)", "within families (95 %)", "of ten groups")
    lines = [
        (name, n, wrong, pooled, inside, f"{ten:+.2f}")
        for name, (n, wrong, pooled, _, inside, ten) in correlations(rows).items()
    ]
    return Table(f"Rank correlation of a coherence with a wrong answer (published, DSS: {PUBLISHED})", columns, lines)


def shortcut_table(found: Planted) -> Table:
    """Each run: accuracy, answers that follow the words, and how often the trace names the sentence."""
    lines = []
    for (share, seed), rows in found.items():
        of = telling(rows)
        parts = [[row for row in of if row["followed"] == kind] for kind in (True, False)]
        cells = [
            f"{100 * fmean(names(row, measure) for row in part):.0f} %" if part else "–"
            for measure in ("effects", "attention") for part in parts
        ]  # fmt: skip
        ranks = [auc(of, measure) for measure in ("effects", "attention")]
        lines.append((
            f"{share:.0%}", seed, f"{100 * fmean(row['right'] for row in rows):.0f} %",
            f"{len(parts[0])} of {len(of)}", *cells, *("–" if value != value else f"{value:.2f}" for value in ranks),
        ))  # fmt: skip
    columns = (
        "planted", "seed", "right", "answers that follow the sentence where it is wrong", "named if followed",
        "named if not followed", "attention: named if followed", "attention: named if not followed",
        "AUC of the effect", "AUC of attention",
    )  # fmt: skip
    return Table("A sentence that names an answer: held-out questions, in which it is drawn at random", columns, lines)


def prompt_table(rows: Rows) -> Table:
    """Each prompt: the answer, the commitment by CAS under four choices, by DSS, and the causal ones."""
    lines = []
    for row in rows:
        by_cas = ["–" if one["commitment"] is None else one["commitment"] for one in row["choices"]]
        ends = " · ".join(f"{one['final']:.2f}" for one in row["choices"])
        restores = row["contrast"] > 0 > row["other_contrast"]
        handed = row["handed_over"] + 1 if restores and row["handed_over"] < row["depth"] else "–"
        lines.append((
            row["name"], row["answer"].replace("\n", " "), f"{row['contrast']:+.1f}", *by_cas, ends,
            row["dss"]["commitment"], row["by_cut"], row["by_lens"], handed,
        ))  # fmt: skip
    columns = (
        "prompt", "continuation", "intended − competing, nats", "CAS: no space, raw", "no space, normed", "space, raw",
        "space, normed", "CAS after the last block, the four", "DSS", "causal: by cut", "by lens", "handed over",
    )  # fmt: skip
    return Table("Commitment on SmolLM2-135M, 30 blocks: CAS and DSS from block 0, causal ones after n blocks", columns,
                 lines)  # fmt: skip


def claims(rows: Rows, control: Rows, planted: Planted, prompts: Rows) -> list[Claim]:
    """What the issue asks of a tracer, for the parts that are measured."""
    return [*_graded(rows, control), *_correlated(rows), *_named(planted), *_sensitive(prompts)]


def _graded(rows: Rows, control: Rows) -> list[Claim]:
    made = []
    if rows:
        worst = max(row["identity"] for row in rows)
        text = "hiding all visual tokens against the stream without them, largest difference of a log-probability"
        made.append(Claim(text, "≤ 1e-4", f"{worst:.1e}", met=worst <= 1e-4))
    for name, part, other, goal, met in (
        ("trained", rows, "attention", "above 0", lambda low, high: low > 0),
        ("trained", rows, "chance", "above 0", lambda low, high: low > 0),
        ("untrained", control, "chance", "not above 0", lambda low, high: low <= 0),
    ):
        if of := [row for row in part if grading.gradable(row)]:
            values = gain(of, other)
            text = f"{name} model: strongest knock-out shows the answer − {other}, points"
            shown = f"{spread(values, digits=1)}, {len(of)} questions"
            made.append(Claim(text, f"{goal} (95 %)", shown, met=bool(met(*paired_interval(np.array(values))))))
    shares = [one for one in map(grading.slow_shares, rows) if one is not None]
    if shares:
        more = [effect - tokens for tokens, effect, _ in shares]
        text = "slow frames: share of the effect − share of the tokens"
        made.append(Claim(text, "(no goal)", f"{spread(more, scale=1, digits=2)}, {len(more)} questions"))
    return made


def _correlated(rows: Rows) -> list[Claim]:
    found = correlations(rows)
    return [
        Claim(f"rank correlation of {name.upper()} with a wrong answer (published, DSS: {PUBLISHED})",
              "below 0 (95 %)", f"{found[name][2]}; within families {found[name][4]}", met=found[name][3])
        for name in ("cas", "dss") if name in found
    ]  # fmt: skip


def _named(planted: Planted) -> list[Claim]:
    made = []
    every = [(share, row) for (share, _), part in planted.items() for row in telling(part)]
    for share in sorted({share for share, _ in every}):
        of = [row for its, row in every if its == share]
        values = [float(row["followed"]) for row in of]
        text = f"{share:.0%} planted: answers that follow the sentence where it is wrong, %"
        made.append(Claim(text, "(no goal)", _percent(values, [row["id"] for row in of])))
    for says, followed, goal in (("follows", True, "≥ 90"), ("does not follow", False, "≤ 10")):
        if of := [row for _, row in every if row["followed"] == followed]:
            values, units = [float(names(row)) for row in of], [row["id"] for row in of]
            text = f"the trace names the wrong sentence where the answer {says} it, all runs, %"
            met = fmean(values) >= 0.9 if followed else fmean(values) <= 0.1
            made.append(Claim(text, goal, _percent(values, units), met=met))
    return made


def _percent(values: Sequence[float], units: Sequence[str]) -> str:
    low, high = paired_interval(np.array(values), units)
    return f"{100 * fmean(values):.0f} ({100 * low:.0f} … {100 * high:.0f}), {len(values)} answers"


def _sensitive(prompts: Rows) -> list[Claim]:
    if not prompts:
        return []
    ranges = [[-1 if one["commitment"] is None else one["commitment"] for one in row["choices"]] for row in prompts]
    same = sum(len(set(values)) == 1 for values in ranges)
    text = "prompts whose commitment by CAS is the same under all four choices"
    every = len(prompts)
    return [Claim(text, f"{every} of {every}", f"{same} of {every}", met=same == every)]
