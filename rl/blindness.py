"""Whether the policy still looks: its accuracy with frames and without them, and what follows when they are equal.

A policy goes blind when it earns its reward from the words of the questions. `BlindnessMonitor` asks a fixed set of
questions every few steps as they are and under the controls of `keye.evaluation.controls`; the difference is the gap.
The guards "drop" and "penalise" also ask the step's own questions without their frames.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch

from keye.errors import KeyeError, ManifestError, RecipeError
from keye.evaluation import controls
from keye.processor.messages import KINDS
from keye.processor.processor import KeyeProcessor, Sample
from rl.questions.prompts import Prompt, PromptSet, Taken
from rl.questions.sampling import Experience, accuracy_of
from rl.rewards import Earned
from rl.run.agree import agree, gather
from stages.typed_toml import Need

CONTROLS = ("blind", "zeroed", "shuffled", "other")
REMOVED = ("blind", "zeroed", "other")
"""Controls under which the frames say nothing about the answer."""
GUARDS = ("off", "drop", "penalise", "stop")
BATCH = 32  # questions that are encoded together

Ask = Callable[[list[Taken], int], list[float]]
"""Questions with their samples and a number of answers → the mean accuracy of each question's answers."""


@dataclass(frozen=True)
class Blindness:
    """What is asked without frames, and the guard against questions that are answered so."""

    every: int = 0
    """Steps between probes, which ask the same held-out questions with and without their frames; 0 = no probes."""

    questions: int = 64
    """Held-out questions of a probe at most."""

    controls: tuple[str, ...] = CONTROLS
    """What a probe does to the frames: "blind", "zeroed", "shuffled", "other" (see `keye.evaluation.controls`)."""

    samples: int = 8
    """Sampled answers to each question without its frames, and of a probe under each control."""

    guard: str = "off"
    """For questions that are answered without frames: "off", "drop", "penalise", or "stop" the run."""

    drop_above: float = 0.75
    """The guard "drop" leaves out questions whose accuracy without frames is at least this."""

    drop_over_chance: float = 0.0
    """With "drop", of a question with options: also leave it out when its accuracy without frames is at least 1 ÷ the
    number of options + this; 0 = only `drop_above` counts."""

    drop_gap: float = -1.0
    """With "drop": also leave out a question of a step whose accuracy with its frames, over the step's answers, is at
    most this above its accuracy without them; −1 = no such rule."""

    stop_gap: float = 0.1
    """The guard "stop" waits for a gap below this."""

    stop_probes: int = 3
    """Probes in succession with such a gap after which the run stops."""

    def check(self, need: Need) -> None:
        """Refuse impossible values with a RecipeError."""
        need(self.every >= 0, "blindness.every must be at least 0")
        for key in ("questions", "samples", "stop_probes"):
            need(getattr(self, key) >= 1, f"blindness.{key} must be at least 1")
        unknown = [name for name in self.controls if name not in CONTROLS]
        need(not unknown, f"blindness.controls names {unknown}: use some of {', '.join(CONTROLS)}")
        need(self.guard in GUARDS, f"blindness.guard = {self.guard!r} must be one of {', '.join(GUARDS)}")
        need(0 < self.drop_above <= 1, "blindness.drop_above must be above 0 and at most 1")
        need(0 <= self.drop_over_chance < 1, "blindness.drop_over_chance must be at least 0 and below 1")
        need(-1 <= self.drop_gap < 1, "blindness.drop_gap must be at least -1 and below 1")
        need(0 < self.stop_gap < 1, "blindness.stop_gap must be between 0 and 1")
        need(self.every == 0 or bool(self.controls), "blindness.every needs at least one of blindness.controls")
        need(
            self.guard != "stop" or self.every > 0 and bool(set(self.controls) & set(REMOVED)),
            f'blindness.guard = "stop" needs blindness.every above 0 and one of the controls {", ".join(REMOVED)}',
        )

    @property
    def asks_own(self) -> bool:
        """Whether the step's own questions are asked without their frames."""
        return self.guard in ("drop", "penalise")

    def limit(self, options: int) -> float:
        """The accuracy without frames from which the guard "drop" leaves out a question.

        Args:
            options: of the question; 0 if it has none, so that no chance is known.
        """
        if not options or not self.drop_over_chance:
            return self.drop_above
        return min(self.drop_above, 1 / options + self.drop_over_chance)

    def leaves_out(self, seen: float, blind: float, options: int) -> bool:
        """Whether the guard "drop" leaves out a question of a step.

        Args:
            seen: accuracy with frames, of the step's answers. blind: without. options: see `limit`.
        """
        return blind >= self.limit(options) or seen - blind <= self.drop_gap


class BlindnessMonitor:
    """Asks questions without their frames, and applies the guard.

    All ranks call every method together; the collectives do not depend on the data.

    Args:
        config: the recipe's `[blindness]`. questions: the held-out questions, the same on every rank.
        processor: encodes chats. ask: answers and judges questions as in training, without a collective.
        rank, world: of this process.

    Raises:
        RecipeError: probes are wanted and no question has images or videos.
    """

    def __init__(
        self,
        config: Blindness,
        questions: Sequence[Prompt],
        processor: KeyeProcessor,
        ask: Ask,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.config, self.processor, self.ask = config, processor, ask
        self.rank, self.world = rank, world
        self.low = 0  # probes in succession with a small gap
        visual = [prompt for prompt in questions if kinds(prompt)] if config.every else []
        if config.every and not visual:
            raise RecipeError("blindness.every is set, but no held-out question has images or videos; set it to 0")
        step = max(1, math.ceil(len(visual) / config.questions))
        self.questions = visual[::step]
        self.partners = partners(self.questions)

    # --- probes -----------------------------------------------------------------------------------------------------

    def probe(self, step: int) -> dict[str, float]:
        """Ask the probe's questions when `step` is a multiple of `every`; collective.

        Returns:
            `seen`, the accuracy with frames; `blind/<control>` and `gap/<control>` (seen − blind over the questions
            that the control applies to); `gap/smallest`, of the controls in `REMOVED`. Empty between probes.
        """
        if not self.config.every or step % self.config.every:
            return {}
        rows = self.measure()
        found = summary(rows)
        if "gap/smallest" in found and found["seen"] >= self.config.stop_gap:
            self.low = self.low + 1 if found["gap/smallest"] < self.config.stop_gap else 0
        return found

    def measure(self) -> list[dict[str, float]]:
        """Control → accuracy of each of the probe's questions, "none" with their frames; collective."""
        mine = list(range(self.rank, len(self.questions), self.world))
        rounds = math.ceil(math.ceil(len(self.questions) / self.world) / BATCH)  # the same on every rank
        rows: list[dict[str, float]] = []
        for number in range(rounds):
            part = mine[number * BATCH : (number + 1) * BATCH]
            rows += [row for rank in gather(agree(lambda part=part: self._rows(part))) for row in rank]
        return rows

    def _rows(self, places: list[int]) -> list[dict[str, float]]:
        """Control → accuracy of each question at `places`; a question whose media cannot be read is left out."""
        samples: dict[int, Sample] = {}
        for place in places:
            try:
                samples[place] = self._encode(self.questions[place])
            except KeyeError:  # named among the rejected held-out questions
                continue
        rows: dict[int, dict[str, float]] = {place: {} for place in samples}
        for control in ("none", *self.config.controls):
            asked = {place: self._under(control, place, sample) for place, sample in samples.items()}
            fitting = [(place, sample) for place, sample in asked.items() if sample is not None]
            found = self.ask([(self.questions[place], sample) for place, sample in fitting], self.config.samples)
            for (place, _), accuracy in zip(fitting, found, strict=True):
                rows[place][control] = accuracy
        return list(rows.values())

    def _under(self, control: str, place: int, sample: Sample) -> Sample | None:
        """A question's sample under a control; None if the control does not apply to it."""
        prompt = self.questions[place]
        if control == "blind":
            return self.blind_sample(prompt)
        if control == "zeroed":
            return controls.zeroed(sample)
        if control == "shuffled":
            return controls.shuffled(sample, zlib.crc32(prompt.id.encode())) if "video" in kinds(prompt) else None
        if control == "other":
            partner = self.partners[place]
            try:
                return None if partner is None else controls.other(sample, self._encode(partner))
            except KeyeError:
                return None
        return sample

    def _encode(self, prompt: Prompt) -> Sample:
        return self.processor.sample(prompt.messages, prompt.base_dir, add_generation_prompt=True)

    def blind_sample(self, prompt: Prompt) -> Sample:
        """The question as text only."""
        return self.processor.sample(without_media(prompt), prompt.base_dir, add_generation_prompt=True)

    # --- guards -----------------------------------------------------------------------------------------------------

    def guarded(self, experience: Experience) -> Experience:
        """The experience with the guard applied to its advantages; without a collective.

        The advantages of a question with the accuracy b without frames are multiplied by 1 − b ("penalise"), or set to
        zero as `Blindness.leaves_out` says ("drop"). A lower reward for all right answers of a group would change
        nothing, because advantages are standardised within the group.
        """
        if not self.config.asks_own:
            return experience
        places = [i for i, prompt in enumerate(experience.prompts) if kinds(prompt)]
        asked = [(experience.prompts[i], self.blind_sample(experience.prompts[i])) for i in places]
        blind = torch.full((len(experience.prompts),), math.nan)
        blind[places] = torch.tensor(self.ask(asked, self.config.samples))
        asked_both = replace(experience, blind=blind)
        factor = torch.tensor([self.factor(asked_both, i, earned) for i, earned in enumerate(experience.earned)])
        return replace(asked_both, advantages=experience.advantages * factor[:, None])

    def factor(self, experience: Experience, place: int, earned: list[Earned]) -> float:
        """The factor on the advantages of the question at `place` of a guarded experience, 1 without a guard.

        Args:
            earned: of the answers that are trained on: its own, or those to the question with a hint. The accuracy
                without frames is that of the question without the hint, because the hint may give the answer away.
        """
        if experience.blind is None or math.isnan(blind := float(experience.blind[place])):
            return 1.0
        if self.config.guard == "penalise":
            return 1 - blind
        return float(not self.config.leaves_out(accuracy_of(earned), blind, len(experience.prompts[place].options)))

    @property
    def stopped(self) -> bool:
        """Whether the guard "stop" ends the run: the gap was small in the last `stop_probes` probes."""
        return self.config.guard == "stop" and self.low >= self.config.stop_probes

    def reason(self, step: int) -> str:
        """The sentence with which the guard ends a run."""
        return (
            f"gspo: stopped at step {step}, because the policy answers without its frames: its accuracy with them was "
            f"less than blindness.stop_gap = {self.config.stop_gap} above that without them in the last {self.low} "
            "probes (gap/smallest in metrics.jsonl); mark such questions with keye data mark-blind or set "
            'blindness.guard = "drop", and train again with another --out'
        )

    # --- state ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, int]:
        """The number of probes in succession with a small gap: the same on every rank."""
        return {"low": self.low}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self.low = state.get("low", 0)


def without_marked(found: PromptSet, config: Blindness) -> PromptSet:
    """The questions without those marked as answered without frames (`keye data mark-blind`), for the guard "drop".

    Raises:
        ManifestError: none is left.
    """
    if config.guard != "drop":
        return found
    kept, rejected = [], dict(found.rejected)
    for prompt in found.prompts:
        marked, limit = prompt.extra.get("blind_accuracy"), config.limit(len(prompt.options))
        if isinstance(marked, int | float) and marked >= limit:
            rejected[prompt.where] = (
                f"{prompt.where}: blind_accuracy {marked} is at least {limit:g}, of blindness.drop_above and "
                "blindness.drop_over_chance"
            )
        else:
            kept.append(replace(prompt, index=len(kept)))
    if not kept:
        raise ManifestError(
            f"every question has a blind_accuracy of blindness.drop_above = {config.drop_above}, or drop_over_chance = "
            f"{config.drop_over_chance} above chance, or more, such as {found.prompts[0].where}; raise them or use "
            "other questions"
        )
    return replace(found, prompts=kept, rejected=rejected)


def kinds(prompt: Prompt) -> list[str]:
    """ "image" or "video" for each part of the messages that is one."""
    return [KINDS[part["type"]] for part in _media(prompt)]


def _media(prompt: Prompt) -> list[dict[str, Any]]:
    contents = [message["content"] for message in prompt.messages]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return [part for part in parts if part.get("type") in KINDS]


def _sources(prompt: Prompt) -> list[Any]:
    """What tells the media of two prompts apart: their files, or the objects in memory."""
    values = (value for part in _media(prompt) for key, value in sorted(part.items()) if key != "type")
    return [value if isinstance(value, str | dict) else id(value) for value in values]


def without_media(prompt: Prompt) -> list[dict[str, Any]]:
    """The prompt's messages without their images and videos."""

    def words(content: Any) -> Any:
        return content if isinstance(content, str) else [part for part in content if part.get("type") not in KINDS]

    return [message | {"content": words(message["content"])} for message in prompt.messages]


def partners(questions: Sequence[Prompt]) -> list[Prompt | None]:
    """For each question the next one with media of the same kinds from other files, if possible of its family."""
    found: list[Prompt | None] = []
    for place, prompt in enumerate(questions):
        later = [questions[(place + step) % len(questions)] for step in range(1, len(questions))]
        others = [other for other in later if kinds(other) == kinds(prompt) and _sources(other) != _sources(prompt)]
        family = [other for other in others if other.family == prompt.family]
        found.append(next(iter(family or others), None))
    return found


def summary(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """The metrics of `BlindnessMonitor.probe` from control → accuracy of each question; empty without a row."""
    if not rows:
        return {}
    found = {"seen": fmean(row["none"] for row in rows)}
    for control in CONTROLS:
        pairs = [(row["none"], row[control]) for row in rows if control in row]
        if pairs:
            found[f"blind/{control}"] = fmean(blind for _, blind in pairs)
            found[f"gap/{control}"] = fmean(seen - blind for seen, blind in pairs)
    gaps = [found[f"gap/{control}"] for control in REMOVED if f"gap/{control}" in found]
    return found | ({"gap/smallest": min(gaps)} if gaps else {})


def own_metrics(asked: Sequence[tuple[float, float, int]], config: Blindness) -> dict[str, float]:
    """Metrics of the step's own questions.

    Args:
        asked: of each question with media: accuracy with frames, accuracy without them, number of options.
        config: says which of them the guard "drop" leaves out.
    """
    if not asked:
        return {}
    return {
        "blind/own": fmean(blind for _, blind, _ in asked),
        "gap/own": fmean(seen - blind for seen, blind, _ in asked),
        "blind/answered": fmean(config.leaves_out(*one) for one in asked),
    }
