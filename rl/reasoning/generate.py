"""Step 2: several trajectories for each question, with the confidence of each step and of the answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from keye.processor.reply import parse_reply
from rl.endpoint import Answer, Ask, Client
from rl.reasoning.chain import read_chain
from rl.reasoning.items import Item, Row, moved
from rl.reasoning.media import Media
from rl.reasoning.work import Result

INSTRUCTIONS = (
    "Think step by step before you answer, one step on each line. Write your thought as <think>…</think> and then only "
    "the final answer as <answer>…</answer>."
)


@dataclass(frozen=True)
class Generate:
    """The work of the step.

    paths: trajectories of each question. temperature, tokens: of each. thinking: see `Ask`. instructions: a system
    message, None for none.
    """

    client: Client
    media: Media
    out: Path
    paths: int = 8
    temperature: float = 1.0
    tokens: int = 4096
    thinking: bool | None = None
    instructions: str | None = INSTRUCTIONS

    def __call__(self, item: Item) -> Result:
        prompt = item.prompt
        shown = self.media.show(prompt)
        before = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        asks = [
            Ask(
                [*before, *shown.messages], self.tokens, self.temperature, sample=sample, logprobs=True,
                thinking=self.thinking, files=shown.files, visual_tokens=shown.visual_tokens,
            )
            for sample in range(self.paths)
        ]  # fmt: skip
        found = [trajectory(sample, answer) for sample, answer in enumerate(self.client.ask_many(asks))]
        row = dict(item.row) | {"messages": moved(prompt.messages, prompt.base_dir, self.out)}
        if shown.plans:
            row["sent"] = {"slow": sum(slow for slow, _ in shown.plans), "fast": sum(fast for _, fast in shown.plans)}
        return Result([row | {"trajectories": found}], counts=_counts(found, shown.plans))

    def settings(self) -> Row:
        """What the output depends on besides the source and the model."""
        names = ("paths", "temperature", "tokens", "thinking", "instructions")
        return {name: getattr(self, name) for name in names} | self.media.settings()


def trajectory(sample: int, answer: Answer) -> Row:
    """An answer as a line's trajectory."""
    steps, confidence = read_chain(answer)
    reply = parse_reply(answer.text)
    return {
        "sample": sample, "text": answer.text, "finished": answer.finished, "thinking": reply.thinking,
        "answer": reply.answer, "steps": [asdict(step) for step in steps], "answer_confidence": confidence,
        "logprobs": answer.logprobs is not None, "tokens": answer.completion_tokens,
    }  # fmt: skip


def _counts(found: Sequence[Row], plans: Sequence[tuple[int, int]]) -> Counter[str]:
    counts = Counter({
        "trajectories": len(found), "with logprobs": sum(one["logprobs"] for one in found),
        "without logprobs": sum(not one["logprobs"] for one in found),
        "with a thought": sum(bool(one["thinking"]) for one in found),
        "cut off": sum(not one["finished"] for one in found), "slow frames": sum(slow for slow, _ in plans),
        "fast frames": sum(fast for _, fast in plans),
    })  # fmt: skip
    return Counter({name: count for name, count in counts.items() if count})
