"""The reward `reward_model`: the score of a pairwise reward model that was trained on one's own pairs.

The directory is that of `rl.preference.reward_model`: the files of a Hugging Face model, `reward_head.safetensors` and
`reward.json`. Only differences of its scores have a meaning, so a score becomes a number from 0 to 1: the logistic
function of its distance from the mean of the training answers, in their standard deviations.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from keye.errors import CheckpointError, KeyeError, RecipeError
from rl.rewards.base import Judgement, Outcome, register

if TYPE_CHECKING:
    from rl.preference.reward_model import RewardScorer


@register("reward_model")
@dataclass
class RewardModelScore:
    """A number from 0 to 1 by a reward model in this process, which holds a copy of it.

    A truncated, blank or too long answer earns 0 without being read.

    Raises:
        CheckpointError: there is no reward model in the directory, or a damaged one.
    """

    model: str
    """Directory of the reward model, relative to the run's."""

    precision: str = "auto"
    """Numbers: "auto" (bf16 on a GPU, fp32 on a CPU), "fp32" or "bf16"."""

    whole: bool = False
    """Whether the thought is read too; right for a reward model that was trained on answers with thoughts."""

    longest: int = 20_000
    """Longest answer that is read, in characters."""

    on_failure = "skip"

    def __post_init__(self) -> None:
        self.scorer: RewardScorer | None = None
        if self.precision not in ("auto", "fp32", "bf16") or self.longest < 1:
            raise RecipeError('the reward reward_model needs precision "auto", "fp32" or "bf16", and longest from 1 on')

    def open(self, folder: Path) -> None:
        """Read the reward model."""
        from rl.preference.reward_model import RewardScorer

        self.scorer = RewardScorer(folder / self.model, self.precision)

    def __call__(self, judgement: Judgement) -> float:
        found = self.score([judgement])[0]
        if found.value is None:
            raise KeyeError(f"the reward model failed: {found.cause}")
        return found.value

    def score(self, judgements: list[Judgement]) -> list[Outcome]:
        """One outcome for each answer; the answers to one prompt are read together, after the prompt once."""
        found = [Outcome(0.0)] * len(judgements)
        groups: dict[int, list[int]] = {}
        for place, judgement in enumerate(judgements):
            if judgement.raw_answer.strip() and len(judgement.text) <= self.longest:
                groups.setdefault(id(judgement.prompt), []).append(place)
        for places in groups.values():
            for place, outcome in zip(places, self._group([judgements[place] for place in places]), strict=True):
                found[place] = outcome
        return found

    def _group(self, judgements: list[Judgement]) -> list[Outcome]:
        if self.scorer is None:
            raise CheckpointError("the reward model is not read yet; call the reward through rewards_from")
        prompt = judgements[0].prompt
        texts = [one.text if self.whole else one.raw_answer for one in judgements]
        # One text that is not Unicode would cost all answers of its group their scores.
        texts = [text.encode("utf-8", "replace").decode() for text in texts]
        try:
            scores = self.scorer.scores(prompt.messages, prompt.base_dir, texts)
        except KeyeError as error:  # a clip that cannot be read
            return [Outcome(None, str(error))] * len(judgements)
        return [Outcome(self.scorer.standard(score)) for score in scores]
