"""Predictions of the readers on disk, and the page with tables and a picture, which needs no training."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from keye.errors import KeyeError, writing
from keye.evaluation.study.bootstrap import DRAWS, interval
from keye.evaluation.study.figures import pareto
from keye.evaluation.study.page import accuracy_text, difference_text
from keye.evaluation.study.settings import CEILING, MEANINGS, REFERENCE, RIVALS
from keye.evaluation.study.store import write_table
from keye.evaluation.study.tables import Answers, Pair, Row, save_csv, wins
from keye.files import write_atomically
from keye.world.slowfastbench import FAMILIES, VERSION, check_frozen
from keye.world.slowfastbench.questions import frozen
from scripts.bench.common.record import Table, markdown
from scripts.bench.trained_reader.clips import CONTROLS, HEIGHT, LENGTH, items_of

STUDY, LINES = "study.json", "predictions.parquet"
LEARNT = 0.9
"""Accuracy on `heldout` with every frame slow from which on a family is said to be learnt."""
READ = f"""A reader is a small network with two parts. The *eye* is a convolution that says of each column of a
picture what it shows: the colour of a tag, a dark or a lit lamp, the place of a disc. One eye for each seed is
trained on single pictures of the training clips and serves all policies. The other part attends to what the eye sees
in the columns and half seconds of a plan, and chooses among the options of the question. It is trained from nothing
for each policy, budget and seed, with the same recipe, training clips and number of steps. A reader gets every
picture of a plan scaled to 48 x 80 pixels, its half second, and whether it is slow. The recipe was chosen on `dev`
with every frame slow; `heldout` was asked once for each seed.

*Tokens* are visual tokens that the plans really have: the default plans with the budget, and the others are matched to
it clip by clip. ≠ marks a difference of more than 2 %. Intervals are 95 % percentile intervals of {DRAWS:,} bootstrap
draws over groups of questions and over seeds; differences are paired. An interval that excludes 0 is **bold**. A *win*
needs an interval above 0 against random, uniform and downsampled together, at equal tokens."""
DISPUTE = """## What can be disputed

- The network is made for these clips: it keeps columns, as a tag and its lamp share one, and its eye is trained on what
  pictures show. It says what a reader that is easy to train makes of a plan, not what a language model would.
- Clips of 8 seconds at 144p have 16 frames of 60 tokens. Lamps and tags are still visible at a tenth of that, so
  that time is scarce here and detail is not. Families of small text (`read`, `detail`) are not among these.
- Pictures are scaled to 48 x 80 pixels; a frame at full size has more detail than that.
- Readers of policies with more frames do more work in a step; steps, batches and clips are equal, not seconds.
- The eye is trained with every frame slow, and its pictures are blurred by a scale of 0.7 to 1 at random; it has not
  seen pictures that are smaller than that.
- The default sets the tokens of the others; where it leaves part of a budget unspent, its rivals do not get it."""


def clips_of(family: str, questions: int) -> int:
    """Clips with at least so many questions of a family."""
    return -(-questions // FAMILIES[family].members) if FAMILIES[family].group == "asks" else questions


def identity(families: Sequence[str], questions: int) -> dict[str, Any]:
    """What identifies the held-out questions: version, and the frozen and the present checksum of every family.

    Raises:
        ManifestError: a family is drawn otherwise than it was frozen.
    """
    sums = {}
    for family in families:
        check_frozen(family, "heldout")
        digest = hashlib.sha256()
        members = FAMILIES[family].members if FAMILIES[family].group == "asks" else 1
        for item in items_of(family, "heldout", clips_of(family, questions) * members):
            digest.update(json.dumps(item.record(), sort_keys=True, ensure_ascii=False).encode())
        sums[family] = {"frozen": frozen()["checksums"]["heldout"][family], "asked": digest.hexdigest()}
    return {"version": VERSION, "split": "heldout", "seconds": LENGTH, "height": HEIGHT, "questions": questions,
            "checksums": sums}  # fmt: skip


def save(out: Path, done: Sequence[dict], study: dict[str, Any]) -> None:
    """Write the predictions of all readers, and `study.json`.

    Args:
        done: what each training gives (`__main__.answer`).
        study: questions, recipe, settings and how they were made.
    """
    questions = study["questions"]
    asked = {item.name: item for family in questions["checksums"]
             for item in items_of(family, "heldout", 4 * questions["questions"])}  # fmt: skip
    lines = []
    for one in done:
        for place, name in enumerate(one["ids"]):
            item = asked[name]
            options = list(item.options)
            picked = {control: options[chosen[place]] for control, chosen in one["chosen"].items()}
            lines.append({
                "id": name, "family": item.family, "group": item.group, **item.slices,
                "checksum": questions["checksums"][item.family]["asked"][:12], "setting": one["setting"],
                "by": f"reader#{one['seed']}", "truth": item.answer, "answer": picked.pop("none"),
                **{f"answer_{control}": answer for control, answer in picked.items()},
                "answer_majority": options[one["majority"][place]], "chance": 1 / len(options),
                **{key: one[key][place] for key in ("tokens", "entries", "slow", "events", "event_tokens")},
            })  # fmt: skip
    with writing(out, "the predictions"):
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / STUDY, json.dumps(study, indent=1, ensure_ascii=False) + "\n")
    write_table(out / LINES, lines)


def read(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(study, lines) of a folder, checked against the benchmark as it is drawn now.

    Raises:
        KeyeError: files are missing or damaged, or the questions are drawn otherwise.
    """
    from pyarrow import parquet

    try:
        study = json.loads((folder / STUDY).read_text(encoding="utf-8"))
        lines = parquet.read_table(folder / LINES).to_pylist()
    except (OSError, ValueError) as error:
        raise KeyeError(f"{folder} has no predictions of readers ({error}); run without --tables") from error
    saved = study["questions"]
    now = identity(list(saved["checksums"]), saved["questions"])
    if saved != now:
        raise KeyeError(f"{folder / STUDY}, key questions: the questions are not those of the benchmark as it is drawn"
                        " now; delete the folder and run again")  # fmt: skip
    for line in lines:
        if line["checksum"] != now["checksums"][line["family"]]["asked"][:12]:
            raise KeyeError(f"{folder / LINES}, key checksum: the answer to {line['id']} is to another question; delete"
                            " the folder and run again")  # fmt: skip
        line |= {"right": line["answer"] == line["truth"], "psnr": np.nan, "ssim": np.nan}
    return study, lines


def write(folder: Path, text: Path) -> None:
    """Write the page, `rows.csv`, `pairs.csv` and the picture from saved predictions."""
    study, lines = read(folder)
    seeds = {f"reader#{seed}" for seed in study["seeds"]}
    by_setting: dict[str, set[str]] = {}
    for line in lines:
        by_setting.setdefault(line["setting"], set()).add(line["by"])
    complete = {label for label, found in by_setting.items() if found == seeds}
    partial = sorted(by_setting.keys() - complete)
    missing = [label for label in study["settings"] if label not in by_setting]
    lines = [line for line in lines if line["setting"] in complete]
    if not lines:
        raise KeyeError(f"{folder} has no setting with all seeds; continue the run")
    answers = Answers(lines)
    rows, pairs = answers.rows(), answers.pairs()
    save_csv(folder / "rows.csv", rows)
    if pairs:
        save_csv(folder / "pairs.csv", pairs)
    pareto(folder / "accuracy.png", [row for row in rows if row.slice == "all"], "reader")
    parts = [_head(study, lines, partial, missing), READ, "## Policies at equal tokens",
             f"![Accuracy over tokens]({folder.name}/accuracy.png)", _policies(rows, pairs), _contenders(rows),
             "## By family", _families(rows, pairs), "## The default against each rival, by family",
             _rivals(rows, pairs), "## Wins and losses", _wins(rows, pairs), "## Controls",
             _controls(lines)]  # fmt: skip
    notes = folder / "notes.txt"
    parts += [notes.read_text(encoding="utf-8").strip()] if notes.exists() else []
    write_atomically(text, "\n\n".join([*parts, DISPUTE]) + "\n")


def _head(study: dict, lines: Sequence[dict], partial: Sequence[str], missing: Sequence[str]) -> str:
    recipe, host, questions = study["recipe"], study["machine"], study["questions"]
    asked, made = len({line["id"] for line in lines}), study["command"].replace(".__main__", "")
    text = [
        "# Readers trained under each policy at equal tokens and equal compute",
        "",
        f"`{made}`; {study['date']}; {host['cores']} shared cores of {host['cpu']}, one thread. A network"
        f" of {study['parameters'] / 1e6:.2f} M parameters; {study['training_clips']} training clips of each of"
        f" {len(questions['checksums'])} families, {recipe['steps']} steps of {recipe['batch']} clips,"
        f" {study['seconds'] / 60:.0f} minutes of a core for the readers; seeds"
        f" {', '.join(map(str, study['seeds']))}. SlowFastBench v{questions['version']}, split heldout, {asked}"
        f" questions about clips of {questions['seconds']} s at {questions['height']}p. The page is written from"
        " `predictions.parquet` by `python -m scripts.bench.trained_reader --tables`, without training.",
    ]
    if partial or missing:
        names = ", ".join(f"`{label}`" for label in [*partial, *missing])
        text += ["", f"Not all seeds are trained, and so not in the tables: {names}."]
    return "\n".join(text)


def _policies(rows: Sequence[Row], pairs: Sequence[Pair]) -> str:
    known = _index(pairs)
    body = []
    for row in (row for row in rows if row.slice == "all"):
        cells = [difference_text(known.get(("all", "", row.setting, f"{other}@{row.budget}")))
                 for other in (REFERENCE, *RIVALS)]  # fmt: skip
        body.append([row.budget or "none", f"`{row.policy}`", _tokens(row), f"{row.entries:.1f}",
                     f"{100 * row.slow:.0f} %", f"{100 * row.events:.0f} %", f"{row.event_tokens:.0f}", row.seeds,
                     accuracy_text(row), *cells])  # fmt: skip
    columns = ["budget", "policy", "tokens", "frames", "slow", "events", "tokens at an event", "seeds", "accuracy",
               *(f"minus {name}" for name in (REFERENCE, *RIVALS))]  # fmt: skip
    return _table("All questions, per cent and points", columns, body)


def _contenders(rows: Sequence[Row]) -> str:
    names = dict.fromkeys(row.policy for row in rows)
    body = [[f"`{name}`", MEANINGS.get(name, "this policy, other settings as the default")] for name in names]
    return _table("The policies", ["policy", "meaning"], body)


def _families(rows: Sequence[Row], pairs: Sequence[Pair]) -> str:
    found = [row for row in rows if row.slice == "family"]
    families = list(dict.fromkeys(row.value for row in found))
    ceiling = {row.value: row.accuracy for row in found if row.policy == CEILING}
    cells = {(row.setting, row.value): row for row in found}
    body = [[row.budget or "none", f"`{row.policy}`", *(accuracy_text(cells[row.setting, name]) for name in families)]
            for row in rows if row.slice == "all"]  # fmt: skip
    learnt = [name for name in families if ceiling.get(name, 0) >= LEARNT]
    others = [f"{name} ({100 * ceiling[name]:.0f} %)" for name in families if name in ceiling and name not in learnt]
    text = f"At least {LEARNT:.0%} with every frame slow: {', '.join(learnt) or 'none'}."
    text += f" Less: {', '.join(others)}; their rows measure the training as well as the plan." if others else ""
    return _table("Accuracy by family in per cent", ["budget", "policy", *families], body) + "\n\n" + text


def _rivals(rows: Sequence[Row], pairs: Sequence[Pair]) -> str:
    known, body = _index(pairs), []
    for row in (row for row in rows if row.slice == "family" and row.policy == REFERENCE):
        body.append([row.value, row.budget, row.questions, accuracy_text(row),
                     *(difference_text(known.get(("family", row.value, row.setting, f"{name}@{row.budget}")))
                       for name in RIVALS)])  # fmt: skip
    columns = ["family", "budget", "questions", "accuracy of default", *(f"minus {name}" for name in RIVALS)]
    return _table("Paired differences in points", columns, body)


def _wins(rows: Sequence[Row], pairs: Sequence[Pair]) -> str:
    body = []
    for row in (row for row in rows if row.slice == "all" and row.policy not in (*RIVALS, CEILING)):
        given = wins([pair for pair in pairs if pair.slice in ("all", "family")], row.setting, row.by)
        named = {verdict: [value or "all questions" for (_, value), found in given.items() if found == verdict]
                 for verdict in ("win", "loss", "open", "not equal")}  # fmt: skip
        body.append([row.budget, f"`{row.policy}`", *(", ".join(named[verdict]) or "–" for verdict in named)])
    return _table("Against random, uniform and downsampled together",
                  ["budget", "policy", "wins", "losses", "open", "tokens not equal"], body)  # fmt: skip


def _controls(lines: Sequence[dict]) -> str:
    """Accuracy of every setting under every control, with intervals over groups and seeds."""
    body = []
    for label in dict.fromkeys(line["setting"] for line in lines):
        here = [line for line in lines if line["setting"] == label]
        cells = [f"{100 * np.mean([line['chance'] for line in here]):.1f}"]
        for key in ("answer_majority", *(f"answer_{control}" for control in CONTROLS), "answer"):
            mean, low, high = _interval(here, key)
            cells.append(f"{100 * mean:.1f} ({100 * low:.1f} to {100 * high:.1f})")
        body.append([f"`{label}`", *cells])
    columns = ["setting", "chance", "majority", "pixels zeroed", "another clip", "one frame", "shuffled", "the plan"]
    text = ("The trained readers with something missing: the same entries, half seconds and kinds with pixels that are"
            " zero, pictures of another clip of the family, one picture in all entries, and pictures in random order."
            " Majority: the most frequent correct option of the asked word in training. `one_frame` and `shuffled` may"
            " be above chance in families that need no order (`together`) or two pictures (`compare`).")  # fmt: skip
    return _table("Accuracy in per cent", columns, body) + "\n\n" + text


def _interval(lines: Sequence[dict], key: str) -> tuple[float, float, float]:
    seeds, groups = (list(dict.fromkeys(line[name] for line in lines)) for name in ("by", "group"))
    total, count = np.zeros((len(seeds), len(groups))), np.zeros((len(seeds), len(groups)))
    rows, columns = ({name: place for place, name in enumerate(names)} for names in (seeds, groups))
    for line in lines:
        where = rows[line["by"]], columns[line["group"]]
        total[where] += line[key] == line["truth"]
        count[where] += 1
    return interval(total, count)


def _index(pairs: Sequence[Pair]) -> dict[tuple[str, str, str, str], Pair]:
    return {(pair.slice, pair.value, pair.setting, pair.rival): pair for pair in pairs}


def _tokens(row: Row) -> str:
    return f"{row.tokens:.0f}" + ("" if row.equal or np.isnan(row.ratio) else f" ≠ ({row.ratio:.2f} ×)")


def _table(title: str, columns: Sequence[str], body: Sequence[Sequence[object]]) -> str:
    return "\n".join(markdown(Table(title, columns, body)))
