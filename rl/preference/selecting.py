"""From sampled answers to data: questions without the easy ones, and pairs of a better and a worse answer."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keye.errors import ManifestError, writing
from keye.files import atomic_file
from keye.video.fetch import scheme_of
from rl.preference.answers import Answer, Answers
from rl.preference.conversational import to_conversational
from rl.preference.pairs import write_pair
from stages.data.sources.chat import each_part


@dataclass(frozen=True)
class Kept:
    """Which questions `filter_questions` keeps: those with an accuracy from `least` to `most`, both included."""

    least: float = 0.0
    most: float = 0.99


def filter_questions(manifest: Path, answered: Iterable[Answers], out: Path, kept: Kept) -> dict[str, int]:
    """Write the lines of `manifest` whose sampled accuracy is in the range, each with `accuracy` and `sampled`.

    Args:
        answered: the answers to the manifest's questions, in its order.

    Returns:
        Counts: questions, kept, easy, hard and unreadable ones.
    """
    counts: Counter[str] = Counter(questions=0, kept=0, easy=0, hard=0, unreadable=0)

    def lines() -> Iterator[str]:
        for row, answers in _joined(manifest, answered):
            counts["questions"] += 1
            accuracy = answers.accuracy
            if accuracy is None:
                counts["unreadable"] += 1
            elif accuracy > kept.most:
                counts["easy"] += 1
            elif accuracy < kept.least:
                counts["hard"] += 1
            else:
                counts["kept"] += 1
                row |= {"messages": moved(row["messages"], manifest.parent, out.parent)}
                row |= {"accuracy": accuracy, "sampled": len(answers.answers)}
                yield json.dumps(row, ensure_ascii=False) + "\n"

    _write(out, lines())
    return dict(counts)


def best_answers(manifest: Path, answered: Iterable[Answers], out: Path) -> dict[str, int]:
    """Write chats with the model's own best answers to `out`: rejection sampling of a cold-start set.

    The best answer is the right one with the highest reward, and the shortest of equal ones. Where answers are not
    judged by accuracy, it is the one with the highest reward above 0. Truncated and blank answers are not used.

    Returns:
        Counts: questions, kept, wrong (no answer can be used), unreadable.
    """
    counts: Counter[str] = Counter(questions=0, kept=0, wrong=0, unreadable=0)

    def lines() -> Iterator[str]:
        for row, answers in _joined(manifest, answered):
            counts["questions"] += 1
            usable = [a for a in answers.answers if a.finished and a.text.strip()]
            right = [a for a in usable if (a.reward > 0 if a.accuracy is None else a.accuracy == 1.0)]
            if not right:
                counts["unreadable" if answers.error else "wrong"] += 1
                continue
            counts["kept"] += 1
            best = min(right, key=lambda a: (-a.reward, a.tokens))
            chat = [message for message in row["messages"] if message["role"] != "assistant"]
            chat = moved(chat, manifest.parent, out.parent)
            row["messages"] = [*chat, {"role": "assistant", "content": [{"type": "text", "text": best.text}]}]
            yield json.dumps(row | {"reward": best.reward}, ensure_ascii=False) + "\n"

    _write(out, lines())
    return dict(counts)


def make_pairs(
    manifest: Path,
    answered: Iterable[Answers],
    out: Path,
    method: str = "rejection",
    per_question: int = 1,
    form: str = "messages",
) -> dict[str, int]:
    """Write the pairs of the answers to the questions of `manifest` to `out`.

    A line has the chat up to the answer as it is in the manifest, options of its media included, so that training
    encodes it as sampling did; `chosen`, `rejected`, their `rewards`, and `id` and `family` of the question.

    Args:
        method: "rejection" or "ranking". per_question: pairs of a question at most.
        form: "messages", or "trl": TRL's, see `rl.preference.conversational`; for questions without videos.

    Returns:
        Counts: questions, pairs, and questions without a pair by their reason: all_right, all_wrong (ranking: equal),
        unfinished (fewer than two answers ended), unreadable.
    """
    counts: Counter[str] = Counter(questions=0, pairs=0)

    def lines() -> Iterator[str]:
        for row, answers in _joined(manifest, answered):
            counts["questions"] += 1
            found, reason = choose(answers, method, per_question)
            counts["pairs"] += len(found)
            if not found:
                counts[reason] += 1
            chat = [message for message in row["messages"] if message["role"] != "assistant"]
            more = {key: row[key] for key in ("id", "family") if row.get(key) is not None}
            for better, worse in found:
                more |= {"rewards": [better.reward, worse.reward]}
                if form == "trl":
                    pair = to_conversational(chat, better.text, worse.text, manifest.parent, answers.where)
                    yield json.dumps(pair | more, ensure_ascii=False) + "\n"
                else:
                    yield write_pair(moved(chat, manifest.parent, out.parent), better.text, worse.text, **more)

    _write(out, lines())
    return dict(counts)


def choose(answers: Answers, method: str, per_question: int) -> tuple[list[tuple[Answer, Answer]], str]:
    """Pairs (better, worse) of the answers to a question, and the reason if there is none.

    Truncated answers are not used: training would end them where they do not end. Equal texts are one answer.
    """
    if answers.error:
        return [], "unreadable"
    ended = [answer for answer in answers.answers if answer.finished]
    if len(ended) < 2:
        return [], "unfinished"
    usable = list({answer.text: answer for answer in ended if answer.text.strip()}.values())
    if method == "ranking":
        ranked = sorted(usable, key=lambda a: -a.reward)
        count = min(per_question, len(ranked) // 2)
        pairs = list(zip(ranked[:count], reversed(ranked[-count:] if count else []), strict=True))
        pairs = [(better, worse) for better, worse in pairs if better.reward > worse.reward]
        return pairs, "equal"
    right = [a for a in usable if a.accuracy == 1.0]
    wrong = [a for a in usable if a.accuracy is not None and a.accuracy < 1.0]
    return _matched(right, wrong, per_question), "all_wrong" if not right else "all_right"


def _matched(right: list[Answer], wrong: list[Answer], count: int) -> list[tuple[Answer, Answer]]:
    """Pairs with the smallest differences in length first, so that length does not tell right from wrong.

    No answer is used twice as long as both sides have unused ones.
    """
    candidates = sorted(
        ((abs(r.tokens - w.tokens), i, j) for i, r in enumerate(right) for j, w in enumerate(wrong)),
    )
    chosen: list[tuple[int, int]] = []
    used_right: Counter[int] = Counter()
    used_wrong: Counter[int] = Counter()
    while candidates and len(chosen) < count:
        best = min(candidates, key=lambda c: (used_right[c[1]] + used_wrong[c[2]], c))
        candidates.remove(best)
        _, i, j = best
        used_right[i] += 1
        used_wrong[j] += 1
        chosen.append((i, j))
    return [(right[i], wrong[j]) for i, j in chosen]


def moved(messages: list[dict[str, Any]], source: Path, target: Path) -> list[dict[str, Any]]:
    """A chat with paths relative to the folder `source` as one with paths relative to `target`."""
    source, target = source.resolve(), target.resolve()  # `..` leads out of what a link points to
    if source == target:
        return messages

    def move(part: dict[str, Any]) -> dict[str, Any]:
        found = {}
        for name in {part.get("type"), "path"} - {"text"}:
            given = part.get(name)
            found |= {name: [locate(path) for path in given] if isinstance(given, list) else locate(given)}
        return {**part, **{name: value for name, value in found.items() if value is not None}}

    def locate(path: Any) -> Any:
        relative = isinstance(path, str) and not scheme_of(path) and not os.path.isabs(path)
        return os.path.relpath(source / path, target) if relative else path

    return each_part(messages, move)


def _joined(manifest: Path, answered: Iterable[Answers]) -> Iterator[tuple[dict[str, Any], Answers]]:
    """The lines of the manifest that were questions, each with its answers."""
    answers = iter(answered)
    waiting = next(answers, None)
    with manifest.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if waiting is not None and waiting.where.rpartition(":")[2] == str(number):
                yield json.loads(raw), waiting
                waiting = next(answers, None)
    if waiting is not None:
        raise ManifestError(f"{manifest} has no line of {waiting.where}; give the manifest that was answered")


def _write(out: Path, lines: Iterable[str]) -> None:
    """Write lines to `out`, completely or not at all."""
    with writing(out, "the lines"):
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(out) as part, part.open("w", encoding="utf-8") as file:
            file.writelines(lines)
