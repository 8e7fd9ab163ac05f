"""Step 1: questions are made harder, and pairs of questions about one video are merged.

The correct answer stays that of the original question, so that it can still be verified. A new question is kept only if
it does not contain the answer and if the model, given the facts and the new question, gives the same answer back.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from keye.errors import ManifestError
from keye.evaluation.match import match, normalise
from keye.processor.reply import parse_reply
from rl.endpoint import Ask, Client
from rl.questions.prompts import Prompt
from rl.reasoning.items import Item, Row, media_of, moved, question_of, with_question
from rl.reasoning.work import Result

MOST = 2_000
"""Most characters of a new question."""

_RULES = (
    "The correct answer must stay exactly the same, be the only correct one, and must not occur in the question. "
    "Do not answer. Write only the new question."
)
_HARDER = (
    "Rewrite this question about a video or image so that answering it takes more steps of reasoning: ask for the same "
    "fact indirectly, by a comparison, a condition or a relation in time. " + _RULES
)
_MERGE = (
    "Two questions about the same video or image follow with their answers. Write one question that can only be "
    "answered by finding out the first answer and using it to reach the second one, and whose correct answer is the "
    "second answer. " + _RULES
)
_BACK = "Answer the last question from these facts alone. Give only the answer."


@dataclass(frozen=True)
class Enhance:
    """The work of the step.

    client: rewrites and answers back. out: folder of the output. partners: id → a question about the same media, to
    merge with. checks: times that the answer is asked back; all must agree with it.
    """

    client: Client
    out: Path
    partners: Mapping[str, Prompt]
    checks: int = 1
    tokens: int = 1024

    def __call__(self, item: Item) -> Result:
        prompt, partner = item.prompt, self.partners.get(item.prompt.id)
        kind = "merged" if partner is not None else "harder"
        facts = [_fact(one) for one in (partner, prompt) if one is not None]
        words = f"{_MERGE if partner else _HARDER}\n\n" + "\n\n".join(facts)
        reply = self.client.ask(Ask([{"role": "user", "content": words}], self.tokens))
        question = parse_reply(reply.text).answer.strip().strip('"“”').strip()
        why = _fault(question, prompt) if reply.finished else "it was cut off by the limit of tokens"
        if why is None and not self._consistent(facts, question, prompt):
            why = "asked back, the answer is another one"
        row = dict(item.row) | {"messages": moved(prompt.messages, prompt.base_dir, self.out)}
        if why is not None:
            row["enhanced"] = {"kind": "none", "why": why, "proposed": question[:MOST]}
            return Result([row], counts=Counter({"kept as it was": 1, f"refused: {why}": 1}))
        row["messages"] = with_question(row["messages"], question)
        row["enhanced"] = {"kind": kind, "original": question_of(prompt.messages)}
        if partner is not None:
            row["enhanced"] |= {"with": partner.id}
        return Result([row], counts=Counter({kind: 1}))

    def _consistent(self, facts: list[str], question: str, prompt: Prompt) -> bool:
        words = f"{_BACK}\n\n" + "\n\n".join(facts) + f"\n\nQuestion: {question}" + _choices(prompt)
        heat = 0.0 if self.checks == 1 else 1.0
        asks = [Ask([{"role": "user", "content": words}], self.tokens, heat, sample=n) for n in range(self.checks)]
        return all(
            match(answer.text, prompt.answer, prompt.tolerance, prompt.options, answer.finished)
            for answer in self.client.ask_many(asks)
        )


def _fact(prompt: Prompt) -> str:
    return f"Question: {question_of(prompt.messages)}{_choices(prompt)}\nAnswer: {prompt.answer}"


def _choices(prompt: Prompt) -> str:
    return "" if not prompt.options else "\nOptions: " + "; ".join(prompt.options)


def _fault(question: str, prompt: Prompt) -> str | None:
    """Why a new question cannot be used, by rule."""
    original = question_of(prompt.messages)
    if not question or len(question) > MOST:
        return "it is empty or too long"
    if normalise(question) == normalise(original):
        return "it is the same question"
    if _contains(question, prompt.answer) and not _contains(original, prompt.answer):
        return "it contains the answer"
    return None


def _contains(text: str, answer: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(normalise(answer))}(?!\w)", normalise(text)) is not None


def pairs(prompts: Iterable[Prompt]) -> dict[str, Prompt]:
    """For each question the next one about the same media with another text, in a cycle; none where there is none.

    Raises:
        ManifestError: the media of a question cannot be compared.
    """
    groups: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        media = media_of(prompt.messages)
        if media:
            try:
                groups.setdefault(json.dumps(media, sort_keys=True), []).append(prompt)
            except TypeError as error:
                raise ManifestError(f"{prompt.where}: the media are no JSON values ({error}); correct them") from error
    found = {}
    for group in groups.values():
        texts = [question_of(prompt.messages) for prompt in group]
        if len(set(texts)) == 1:
            continue
        # From the end, twice round: the next place with another text is that of the next question with the same text.
        following = 0
        for place in reversed(range(2 * len(group))):
            here, after = place % len(group), (place + 1) % len(group)
            following = after if texts[after] != texts[here] else following
            found[group[here].id] = group[following]
    return found


def settings(merge: bool, checks: int, tokens: int) -> Row:
    """What the output depends on besides the source and the model."""
    return {"merge": merge, "checks": checks, "tokens": tokens, "prompts": [_HARDER, _MERGE, _BACK]}
