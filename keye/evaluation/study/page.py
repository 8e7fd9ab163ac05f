"""The page of a study in Markdown: its tables, how to read them, what lost, and what can be disputed."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from keye.evaluation.study.settings import CEILING, MEANINGS, REFERENCE, RIVALS
from keye.evaluation.study.tables import Answers, Pair, Row, parts_of, wins

READ = """## How to read it

- *Tokens* are visual tokens of a clip that the plan really has, not its budget. At each budget the default plans the
  clip first; the budget of every other setting is then searched, clip by clip, so that it has the same tokens. `≠`
  marks a setting whose tokens differ by more than 2 % all the same: no size meets them, or it cannot spend more.
- *Events* is the share of events of which a frame is shown, *tokens at an event* the size of the largest such frame.
  PSNR and SSIM compare up to two of the frames that are shown with the originals, not those that are left out.
- *Accuracy* is of the answers to the benchmark's questions. The ideal observer knows how clips are drawn and answers
  from the pictures and times that the plan gives to a model, so that it says what the plan has kept, not what a model
  would learn to use.
- Intervals are 95 % percentile intervals of {draws:,} bootstrap draws over groups of questions (and over the seeds of
  models). Differences are paired: the same questions, the same noise. An interval that excludes 0 is printed **bold**.
  One without width says that all answers are equal in these questions, not that they are in others.
- A *win* needs an interval above 0 against random, uniform and downsampled together, at equal tokens. One of them
  better at equal tokens is a *loss*."""
DISPUTE = """## What can be disputed

- The observer reads known things at known places in drawn clips. A film has neither; what it says about a policy is an
  upper limit of what a model can use of the same tokens.
- Only visual tokens are equal. Each frame costs a model about nine more tokens of text, so that policies with many
  small frames (`downsampled`) are cheaper here than in a prompt; the column *frames* lets the reader add them.
- The default sets the tokens that the others are given. Where it leaves part of a budget unspent, its rivals do not get
  that part, either; at their own budgets they would spend it.
- The clips are short of motion: half of the backgrounds are still, as in the benchmark. The slices by motion are in
  `rows.csv`.
- Many slices are compared, each at 95 %: of 20 comparisons without a difference one excludes 0. Verdicts on single
  slices are hints where the total is open.
- The intervals say nothing about other drawings of events, other policies' options, or real films."""


def page(answers: Answers, rows: Sequence[Row], pairs: Sequence[Pair], study: Mapping[str, Any], draws: int) -> str:
    """The page. Pictures are named as `write_tables` writes them."""
    parts = [_head(rows, study), READ.format(draws=draws), _contenders(rows)]
    for by in answers.by:
        mine, theirs = [row for row in rows if row.by == by], [pair for pair in pairs if pair.by == by]
        name = "the ideal observer" if by == "observer" else "trained models"
        parts += [f"## Answers of {name}", f"![Accuracy over tokens](pareto_{by}.png)", *_policies(mine, theirs)]
        parts += [*_by_slice(mine, theirs, "length"), *_verdicts(mine, theirs, by), *_by_family(mine, theirs)]
        parts += [f"![Accuracy by family](families_{by}.png)", *_factors(mine, theirs), *_ceiling(mine, theirs)]
    return "\n\n".join([*parts, DISPUTE]) + "\n"


def _head(rows: Sequence[Row], study: Mapping[str, Any]) -> str:
    benchmark, asked = study["benchmark"], study["questions"]
    every = next(row for row in rows if row.slice == "all")
    slices = "; ".join(f"{name} {', '.join(values)}" for name, values in asked["slices"].items())
    missing = asked["number"] - every.questions
    lines = [
        "# Ablation: policies, measures and settings at equal tokens",
        "",
        f"{benchmark['name']} v{benchmark['version']}, split {benchmark['split']}: {every.questions:,} questions in"
        f" {every.groups:,} groups of {len(benchmark['checksums'])} families"
        + (f", slices {slices}" if slices else "")
        + (f", at most {asked['limit']} of a family" if asked["limit"] else "")
        + (f". The study is not complete: {missing:,} of its {asked['number']:,} questions have not been answered under"
           " every setting and are left out." if missing else "."),
        "",
        "This page, its tables (`rows.csv`, `pairs.csv`, also as Parquet) and its pictures are written from the saved"
        " predictions (`predictions.parquet`) by `keye ablate --tables DIR`, without an encoder or a model.",
    ]
    lines += ["", *(f"- `{run['command']}` ({run['date']}, {run['cores']} cores)"
                    for run in study.get("runs", []))]  # fmt: skip
    return "\n".join(lines)


def _contenders(rows: Sequence[Row]) -> str:
    names = dict.fromkeys(row.policy for row in rows)
    body = [(f"`{name}`", MEANINGS.get(name, "this policy, other settings as the default")) for name in names]
    return _table(("policy", "meaning"), body)


def _policies(rows: Sequence[Row], pairs: Sequence[Pair]) -> list[str]:
    known, body = _index(pairs), []
    for row in rows:
        if row.slice == "all" and not row.changes:
            pair = known.get(("all", "", row.setting, f"{REFERENCE}@{row.budget}"))
            texts = accuracy_text(row), difference_text(pair)
            body.append((row.budget or "none", f"`{row.policy}`", *_encoded(row), *texts))
    head = ("budget", "policy", *ENCODED, "accuracy", "minus default, points")
    return ["### Policies at equal tokens", _table(head, body)]


ENCODED = ("tokens", "frames", "slow", "PSNR", "SSIM", "events", "tokens at an event")


def _encoded(row: Row) -> tuple[str, ...]:
    tokens = f"{row.tokens:,.0f}" + ("" if row.equal or math.isnan(row.ratio) else f" ≠ ({row.ratio:.2f} ×)")
    return (tokens, f"{row.entries:.0f}", f"{100 * row.slow:.0f} %", f"{row.psnr:.1f}", f"{row.ssim:.3f}",
            f"{100 * row.events:.0f} %", f"{row.event_tokens:.0f}")  # fmt: skip


def _by_slice(rows: Sequence[Row], pairs: Sequence[Pair], name: str) -> list[str]:
    """Accuracy by values of a slice; the policies' differences from the default in brackets."""
    here = [row for row in rows if row.slice == name and not row.changes]
    values = list(dict.fromkeys(row.value for row in here))
    values.sort(key=lambda value: ("16s", "1min", "10min", "1h").index(value) if name == "length" else 0)
    cells, known = {(row.setting, row.value): row for row in here}, _index(pairs)
    body = []
    for label in dict.fromkeys(row.setting for row in here):
        policy, budget, _ = parts_of(label)
        found = [(cells.get((label, value)), known.get((name, value, label, f"{REFERENCE}@{budget}")))
                 for value in values]  # fmt: skip
        body.append((budget or "none", f"`{policy}`", *(_cell(row, pair) for row, pair in found)))
    counts = [next(row.questions for row in here if row.value == value) for value in values]
    head = [f"{value} ({count})" for value, count in zip(values, counts, strict=True)]
    return [f"### Accuracy by {name}, and minus default in points", _table(("budget", "policy", *head), body)]


def _by_family(rows: Sequence[Row], pairs: Sequence[Pair]) -> list[str]:
    """The default against each rival, family by family."""
    known, body = _index(pairs), []
    for row in rows:
        if row.slice == "family" and row.policy == REFERENCE and not row.changes:
            found = [known.get(("family", row.value, row.setting, f"{rival}@{row.budget}")) for rival in RIVALS]
            body.append((row.value, row.budget, row.questions, accuracy_text(row), *map(difference_text, found)))
    body.sort(key=lambda cells: cells[:2])
    head = ("family", "budget", "questions", "accuracy of default", *(f"minus {name}" for name in RIVALS))
    return ["### The default against its rivals, by family", _table(head, body)]


def _verdicts(rows: Sequence[Row], pairs: Sequence[Pair], by: str) -> list[str]:
    """Wins and losses of every setting that is not a rival itself."""
    body, lost = [], []
    for row in rows:
        if row.slice != "all" or row.changes or row.policy in (*RIVALS, CEILING):
            continue
        given = wins(pairs, row.setting, by)
        named = {verdict: [value or "all questions" for (_, value), found in given.items() if found == verdict]
                 for verdict in ("win", "loss", "not equal")}  # fmt: skip
        body.append((row.budget, f"`{row.policy}`", given.get(("all", ""), "–"),
                     *(", ".join(named[verdict]) or "–" for verdict in named)))  # fmt: skip
    head = ("budget", "policy", "all questions", "wins", "losses", "tokens not equal")
    for pair in pairs:
        if pair.slice == "all" and pair.verdict == "better" and pair.rival.startswith(f"{REFERENCE}@"):
            lost.append(f"- `{pair.setting}` beats the default by {difference_text(pair)} points"
                        + ("" if pair.equal else f", with {pair.ratio:.2f} × its tokens") + ".")  # fmt: skip
    beaten = ["### What lost", "Settings that are better than the default over all questions:" if lost else
              "No setting is better than the default over all questions.", "\n".join(lost)]  # fmt: skip
    return ["### Wins and losses against random, uniform and downsampled together", _table(head, body),
            *filter(None, beaten)]  # fmt: skip


def _factors(rows: Sequence[Row], pairs: Sequence[Pair]) -> list[str]:
    known, body = _index(pairs), []
    for row in rows:
        if row.slice == "all" and row.changes:
            pair = known.get(("all", "", row.setting, f"{REFERENCE}@{row.budget}"))
            head = row.changes if row.policy == REFERENCE else f"{row.policy} {row.changes}"
            body.append((row.budget, f"`{head}`", *_encoded(row), accuracy_text(row), difference_text(pair)))
    if not body:
        return []
    head = ("budget", "changed setting", *ENCODED, "accuracy", "minus default, points")
    return ["### One factor at a time around the default", _table(head, body)]


def _ceiling(rows: Sequence[Row], pairs: Sequence[Pair]) -> list[str]:
    """The fewest tokens at which a policy is at most one point worse than all frames at full size."""
    ceiling = {(row.slice, row.value): row for row in rows if row.policy == CEILING}
    known, body = _index(pairs), []
    if not ceiling:
        return []
    for place in (("all", ""), *(place for place in ceiling if place[0] == "length")):
        for policy in dict.fromkeys(row.policy for row in rows if not row.changes and row.policy != CEILING):
            found = []
            for row in rows:
                pair = known.get((*place, row.setting, f"{CEILING}@unlimited"))
                same = row.policy == policy and not row.changes and (row.slice, row.value) == place
                if same and pair and (pair.low if not math.isnan(pair.low) else -1) >= -0.01:
                    found.append((row.tokens, pair))
            tokens, pair = min(found, key=lambda one: one[0], default=(math.nan, None))
            times = f"{ceiling[place].tokens / tokens:.1f} ×" if found else "not at these budgets"
            body.append((place[1] or "all", f"`{policy}`", f"{ceiling[place].tokens:,.0f}",
                         f"{tokens:,.0f}" if found else "–", times, difference_text(pair)))  # fmt: skip
    head = ("length", "policy", "tokens of all_slow", "tokens", "fewer by", "minus all_slow, points")
    text = "The fewest tokens, among these budgets, at which the interval of the difference is above -1 point."
    return ["### Tokens at equal accuracy with all frames at full size", text, _table(head, body)]


def _index(pairs: Sequence[Pair]) -> dict[tuple[str, str, str, str], Pair]:
    return {(pair.slice, pair.value, pair.setting, pair.rival): pair for pair in pairs}


def accuracy_text(row: Row) -> str:
    """Accuracy and its interval in per cent, for a cell of a table."""
    return f"{100 * row.accuracy:.1f} ({100 * row.low:.1f} to {100 * row.high:.1f})"


def difference_text(pair: Pair | None) -> str:
    """A difference and its interval in points, bold where the interval excludes 0; `≠` where tokens are not equal."""
    if pair is None:
        return "–"
    text = f"{100 * pair.difference:+.1f} ({100 * pair.low:+.1f} to {100 * pair.high:+.1f})"
    return (f"**{text}**" if pair.verdict != "open" else text) + ("" if pair.equal else " ≠")


def _cell(row: Row | None, pair: Pair | None) -> str:
    if row is None:
        return "–"
    return f"{100 * row.accuracy:.1f}" + ("" if pair is None else f" [{difference_text(pair)}]")


def _table(head: Iterable[object], body: Iterable[Iterable[object]]) -> str:
    lines = [[str(cell) for cell in line] for line in (head, *body)]
    rule = ["---"] * len(lines[0])
    return "\n".join("| " + " | ".join(line) + " |" for line in (lines[0], rule, *lines[1:]))
