"""The prompts of RL: verifiable questions of a manifest, drawn without end and encoded once."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Iterable
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


class PromptStream:
    """An endless shuffled walk over one rank's share of the prompts, the same again from the same state.

    Every epoch is shuffled anew from (seed, epoch) alike on all ranks, and rank r takes every world-size-th prompt from
    the r-th on. A prompt whose clip cannot be read is left out, and remembered in `rejected` with the reason. Encoded
    prompts are kept up to `cache` of them, since a small set is walked over many times.
    """

    def __init__(
        self,
        prompts: list[Prompt],
        processor: KeyeProcessor,
        seed: int,
        rank: int = 0,
        world: int = 1,
        cache: int = 512,
    ) -> None:
        if len(prompts) < world:
            raise ManifestError(f"{len(prompts)} prompts cannot feed {world} processes: add prompts or start fewer")
        self.prompts, self.processor = prompts, processor
        self.seed, self.rank, self.world, self.cache = seed, rank, world, cache
        self.epoch = self.position = 0
        self.rejected: dict[str, str] = {}
        self._encoded: OrderedDict[str, Sample] = OrderedDict()

    def take(self, count: int) -> list[tuple[Prompt, Sample]]:
        """The next `count` readable prompts.

        Raises:
            ManifestError: an epoch went by without a single readable prompt.
        """
        taken: list[tuple[Prompt, Sample]] = []
        failures = 0
        while len(taken) < count:
            prompt = self._next()
            try:
                taken.append((prompt, self._encode(prompt)))
                failures = 0
            except KeyeError as error:
                self.rejected[prompt.id] = str(error)
                failures += 1
                if failures > len(self.prompts):
                    raise ManifestError(f"no prompt can be read; the last one failed with: {error}") from error
        return taken

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]

    def _next(self) -> Prompt:
        order = list(range(len(self.prompts)))
        random.Random(f"{self.seed}/{self.epoch}").shuffle(order)
        own = order[self.rank :: self.world]
        prompt = self.prompts[own[self.position]]
        self.position += 1
        if self.position == len(own):
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
