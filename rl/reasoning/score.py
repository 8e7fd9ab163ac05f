"""Step 5: each question gets a score from 1 (answerable without the image) to 5 (strongly multimodal), and each score
its share in the final set.

Each question is asked `samples` times with its media and as often without. Chance is removed from both accuracies: with
m options, a = max(0, (right/samples − 1/m) / (1 − 1/m)). With `blind` and `seen`:

    1   blind ≥ 0.75                    answerable without the media
    2   0.5 ≤ blind < 0.75              often answerable without
    3   blind < 0.5, seen − blind < 0.25    the media hardly help this model, or it cannot answer
    4   blind < 0.5, seen − blind < 0.5     the media help
    5   blind < 0.5, seen − blind ≥ 0.5     strongly multimodal
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from keye.evaluation.match import match
from keye.processor.reply import Reply, write_reply
from rl.endpoint import Answer, Ask, Client
from rl.questions.prompts import Prompt
from rl.reasoning.items import Item, Row, media_of, moved, need, unreviewed, without_media
from rl.reasoning.media import Media
from rl.reasoning.work import Result

REPEATS = {1: 0.1, 2: 0.25, 3: 0.5, 4: 2.0, 5: 3.0}
"""Default times that a line of each score is in the final set; a fraction is the probability of one more."""


def score_of(seen: float, blind: float) -> int:
    """The score of accuracies without chance, in [0, 1]."""
    if blind >= 0.5:
        return 1 if blind >= 0.75 else 2
    gain = seen - blind
    return 5 if gain >= 0.5 else 4 if gain >= 0.25 else 3


def above_chance(right: int, samples: int, options: int) -> float:
    """The accuracy with the share of guesses removed."""
    chance = 1 / options if options > 1 else 0.0
    return max(0.0, (right / samples - chance) / (1 - chance))


def repeats(name: str, score: int, policy: Mapping[int, float], seed: int) -> int:
    """How often a line is in the final set; the same for the same name and seed."""
    whole, part = divmod(policy[score], 1)
    draw = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big") / 2**64
    return int(whole) + (draw < part)


@dataclass(frozen=True)
class Score:
    """The work of the step.

    samples: answers with and without the media, each. temperature, tokens: of each. policy: score → times in the final
    set. instructions: a system message, None for none. unreviewed: use what waits for a review.
    """

    client: Client
    media: Media
    out: Path
    samples: int = 4
    temperature: float = 1.0
    tokens: int = 1024
    policy: Mapping[int, float] = field(default_factory=lambda: dict(REPEATS))
    seed: int = 0
    instructions: str | None = None
    unreviewed: bool = False

    def __call__(self, item: Item) -> Result:
        prompt, path = item.prompt, need(item, "trajectory", "grade")
        if unreviewed(item.row) and not self.unreviewed:
            left = {"id": prompt.id, "where": prompt.where, "reason": "it has to be reviewed (keye reasoning review)"}
            return Result(dropped=[left], counts=Counter({"not reviewed": 1}))
        seen = blind = 1.0  # of a question without media, which is not asked
        if media_of(prompt.messages):
            shown = self.media.show(prompt)
            seen = self._accuracy(prompt, shown.messages, files=shown.files, visual_tokens=shown.visual_tokens)
            blind = self._accuracy(prompt, without_media(prompt.messages))
        score = score_of(seen, blind)
        times = repeats(prompt.id, score, self.policy, self.seed)
        row = self._line(item, path) | {"score": score, "seen": round(seen, 4), "blind": round(blind, 4)}
        lines = [row | {"id": prompt.id if n == 0 else f"{prompt.id}#{n + 1}"} for n in range(times)]
        counts = Counter({f"score {score}": 1, "lines": times, f"lines of score {score}": times})
        left = [] if times else [row | {"reason": f"not drawn at score {score}"}]
        return Result(lines, left, counts)

    def settings(self) -> Row:
        """What the output depends on besides the source and the model."""
        names = ("samples", "temperature", "tokens", "seed", "instructions", "unreviewed")
        policy = {str(score): share for score, share in sorted(self.policy.items())}
        return {name: getattr(self, name) for name in names} | {"policy": policy} | self.media.settings()

    def _accuracy(self, prompt: Prompt, messages: Sequence[Row], **more: object) -> float:
        before = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        asks = [Ask([*before, *messages], self.tokens, self.temperature, sample=n, **more) for n in range(self.samples)]
        answers: list[Answer] = self.client.ask_many(asks)
        right = sum(match(a.text, prompt.answer, prompt.tolerance, prompt.options, a.finished) for a in answers)
        return above_chance(right, self.samples, len(prompt.options))

    def _line(self, item: Item, path: Row) -> Row:
        """The line in the chat format, as sources of stages and SFT read it: question, thought and answer."""
        messages = moved(item.prompt.messages, item.prompt.base_dir, self.out)
        users = [place for place, message in enumerate(messages) if message["role"] == "user"]
        thought = (path.get("thinking") or "").strip() or None
        messages = [{**m, "thinking": thought is not None} if n == users[-1] else m for n, m in enumerate(messages)]
        reply = write_reply(Reply(thought, path["answer"]))
        kept = ("answer", "options", "tolerance", "family", "question_id", "grade", "reviewed", "enhanced", "meta")
        about = {key: item.row[key] for key in kept if item.row.get(key) is not None}
        return {"messages": [*messages, {"role": "assistant", "content": reply}], **about}
