"""The prompts of RL: verifiable questions of a manifest, drawn without end and encoded once."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keye.errors import KeyeError, ManifestError
from keye.prompt.processor import KeyeProcessor, Sample
from keye.world.manifest import parse_line


@dataclass(frozen=True)
class Prompt:
    """One question with its ground truth. messages: the chat without the assistant's turns; base_dir: of its clips."""

    id: str
    family: str
    messages: list[dict[str, Any]]
    answer: str
    tolerance: float | None
    options: tuple[str, ...]
    base_dir: Path


@dataclass(frozen=True)
class PromptSet:
    """prompts: what can be asked; rejected: where → why for the manifest lines that are no samples."""

    prompts: list[Prompt]
    rejected: dict[str, str]


def load_prompts(manifest: str | Path, families: Iterable[str] = ()) -> PromptSet:
    """The questions of `manifest` that have an answer to check, of `families` (all when empty).

    A line that is not JSON, or not a chat, is left out and kept in `rejected`.

    Raises:
        ManifestError: the file is missing, or holds no such question.
    """
    path, families = Path(manifest), set(families)
    if not path.is_file():
        raise ManifestError(f"{path} does not exist; give a .jsonl manifest or make one with python -m keye.world")
    prompts, rejected = [], {}
    for number, raw in enumerate(path.read_bytes().splitlines(), 1):
        try:
            line = parse_line(raw.decode("utf-8", errors="replace"), f"{path}:{number}")
        except ManifestError as error:
            rejected[f"{path}:{number}"] = str(error)
            continue
        if not isinstance(line.get("answer"), str) or (families and line.get("family") not in families):
            continue
        asked = [message for message in line["messages"] if message["role"] != "assistant"]
        name, family = str(line.get("id", f"{path}:{number}")), line.get("family", "")
        options = tuple(line.get("options") or ())
        prompts.append(Prompt(name, family, asked, line["answer"], line.get("tolerance"), options, path.parent))
    if not prompts:
        wanted = f" of the families {', '.join(sorted(families))}" if families else ""
        raise ManifestError(f"{path} holds no question{wanted} with an answer: add some or change gspo.families")
    return PromptSet(prompts, rejected)


Taken = tuple[Prompt, Sample]
Gather = Callable[[Any], list[Any]]
"""Collective: this rank's value → every rank's values, in order of rank, on every rank."""


class PromptStream:
    """An endless shuffled walk over the prompts, the same on every rank and on any number of ranks.

    A step takes the next `count` prompts of one global order; each rank encodes its own places of them. The order of an
    epoch follows from (seed, epoch). A prompt whose clip cannot be read is left out, its place takes the next prompt,
    and the reason stands in `rejected` on the rank that met it. Encoded prompts are kept up to `cache` of them, since a
    small set is walked over many times.
    """

    def __init__(self, prompts: list[Prompt], processor: KeyeProcessor, seed: int, cache: int = 512) -> None:
        self.prompts, self.processor, self.seed, self.cache = prompts, processor, seed, cache
        self.epoch = self.position = 0
        self.rejected: dict[str, str] = {}
        self._encoded: OrderedDict[str, Sample] = OrderedDict()
        self._order: tuple[int, list[int]] = (-1, [])

    def take(self, count: int, mine: Iterable[int] | None = None, gather: Gather | None = None) -> list[Taken]:
        """The prompts at this rank's places of the next `count` readable ones; collective.

        Args:
            count: prompts over all ranks.
            mine: this rank's places, of 0 … count − 1; all of them when left out. The ranks' places are disjoint and
                together all of them.
            gather: exchanges values between the ranks; left out for one process.

        Returns:
            One (prompt, sample) for each place, in the order of the places.

        Raises:
            ManifestError: an epoch went by without a single readable prompt. All ranks raise it.
        """
        own, gather = set(range(count) if mine is None else mine), gather or (lambda value: [value])
        taken: dict[int, Taken] = {}
        places, failures = list(range(count)), 0
        while places:
            drawn = {place: self._next() for place in places}
            failed = {}
            for place in sorted(own & drawn.keys()):
                try:
                    taken[place] = (drawn[place], self._encode(drawn[place]))
                except KeyeError as error:
                    failed[place] = self.rejected[drawn[place].id] = str(error)
            everywhere = {place: why for rank in gather(failed) for place, why in rank.items()}
            failures = failures + len(everywhere) if len(everywhere) == len(places) else 0
            if failures > len(self.prompts):
                last = everywhere[max(everywhere)]
                raise ManifestError(f"no prompt can be read; the last one failed with: {last}")
            places = sorted(everywhere)
        return [taken[place] for place in sorted(taken)]

    def state_dict(self) -> dict[str, int]:
        """The place in the global order: the same on every rank."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]

    def _next(self) -> Prompt:
        if self._order[0] != self.epoch:
            order = list(range(len(self.prompts)))
            random.Random(f"{self.seed}/{self.epoch}").shuffle(order)
            self._order = (self.epoch, order)
        prompt = self.prompts[self._order[1][self.position]]
        self.position += 1
        if self.position == len(self.prompts):
            self.epoch, self.position = self.epoch + 1, 0
        return prompt

    def _encode(self, prompt: Prompt) -> Sample:
        if prompt.id in self._encoded:
            self._encoded.move_to_end(prompt.id)
            return self._encoded[prompt.id]
        sample = self.processor.sample(prompt.messages, prompt.base_dir, add_generation_prompt=True)
        self._encoded[prompt.id] = sample
        if len(self._encoded) > self.cache:
            self._encoded.popitem(last=False)
        return sample
