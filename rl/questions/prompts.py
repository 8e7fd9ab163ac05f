"""The prompts of RL: questions with verifiable answers, shuffled in each epoch and encoded once."""

from __future__ import annotations

import hashlib
import math
import random
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from keye.errors import CheckpointError, KeyeError, ManifestError
from keye.processor.messages import read_chat
from keye.processor.processor import KeyeProcessor, Sample
from keye.slowfast.pixels import normalised
from keye.world.manifest import parse_line
from rl.alignment import read_constraints
from stages.data.items import PIXELS, Cache, Item


@dataclass(frozen=True)
class Prompt:
    """One question with its ground truth."""

    id: str
    family: str

    messages: list[dict[str, Any]]
    """The chat without the assistant's turns."""

    answer: str
    tolerance: float | None
    options: tuple[str, ...]

    base_dir: Path
    """Folder that the paths of its clips are relative to."""

    where: str = ""
    """`file:line`."""

    extra: dict[str, Any] = field(default_factory=dict)
    """The line's other keys except `meta`, such as the `schema` of an answer in JSON; rewards read them."""

    index: int = -1
    """Its place in `PromptSet.prompts`."""

    repeat: int = 0
    """How often its id was drawn before in the same step (see `PromptStream.begin_step`)."""


@dataclass(frozen=True)
class PromptSet:
    """A manifest's questions."""

    prompts: list[Prompt]

    rejected: dict[str, str]
    """`file:line` → reason, for the lines that cannot be used."""

    digest: str
    """SHA-256 of the file."""

    path: str = ""
    """The file."""

    absent: tuple[str, ...] = ()
    """Wanted families without a question in the file."""

    families: tuple[str, ...] = ()
    """Families of the file's lines, wanted or not."""

    @property
    def remarks(self) -> list[str]:
        """Sentences for the log: how many lines are left out and why the first, and which families have no question."""
        found = []
        if self.rejected:
            lines = "1 line" if len(self.rejected) == 1 else f"{len(self.rejected)} lines"
            found.append(f"{lines} of {self.path} left out, the first because {next(iter(self.rejected.values()))}")
        if self.absent:
            names = ", ".join(self.absent)
            found.append(f"{self.path} has no question of the families {names}; {_known(self.families)}")
        return found


def load_prompts(manifest: str | Path, families: Iterable[str] = (), unique: bool = False) -> PromptSet:
    """The questions of `manifest` that have an answer or constraints, of `families` (all when empty).

    A line that is not a chat in JSON, has a value of the wrong type, or neither answer nor constraints, is left out and
    listed in `rejected`.

    Args:
        unique: refuse questions that share an id, because results are paired by it.

    Raises:
        ManifestError: the file is missing, has no such question, or two of them share an id.
    """
    path, wanted = Path(manifest), set(families)
    if not path.is_file():
        raise ManifestError(f"{path} does not exist; give a .jsonl manifest or make one with python -m keye.world")
    prompts, rejected, digest, known = [], {}, hashlib.sha256(), set()
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            digest.update(raw)
            if not raw.strip():
                continue
            where = f"{path}:{number}"
            try:
                prompt = _question(raw, path, number, wanted, known)
            except ManifestError as error:
                rejected[where] = str(error)
                continue
            if prompt is not None:
                prompts.append(replace(prompt, index=len(prompts)))
    if not prompts:
        raise ManifestError(_nothing_to_ask(path, wanted, known, rejected))
    if unique:
        _check_unique(prompts)
    absent = wanted - {prompt.family for prompt in prompts}
    names = (tuple(sorted(absent)), tuple(sorted(known)))
    return PromptSet(prompts, rejected, digest.hexdigest(), str(path), *names)


def _nothing_to_ask(path: Path, wanted: set[str], known: set[str], rejected: dict[str, str]) -> str:
    of = f" of the families {', '.join(sorted(wanted))}" if wanted else ""
    remedy = f"{_known(known)}; choose some of them" if wanted else "add some"
    message = f"{path} has no question{of} with an answer: {remedy}"
    if rejected:
        message += f"; {len(rejected)} lines cannot be used, the first because {next(iter(rejected.values()))}"
    return message


def _known(families: Iterable[str]) -> str:
    """The families of a manifest in words."""
    names = sorted(filter(None, families))
    return f"its families are {', '.join(names)}" if names else 'no line of it has a "family"'


def _check_unique(prompts: list[Prompt]) -> None:
    places: dict[str, str] = {}
    for prompt in prompts:
        first = places.setdefault(prompt.id, prompt.where)
        if first != prompt.where:
            raise ManifestError(
                f"{first} and {prompt.where} have the same id {prompt.id!r}, and answers before and after training are "
                "paired by it; give each question its own id, or none"
            )


_OWN = frozenset(("messages", "answer", "id", "family", "tolerance", "options", "meta"))
"""Keys of a line that a prompt has as fields, and one that no reward reads."""


def read_question(raw: bytes, path: Path, number: int) -> Prompt:
    """Line `number` of the manifest `path` as a prompt.

    Raises:
        ManifestError: not a chat, a value of the wrong type, or neither answer nor constraints; names file, line and
            key.
    """
    prompt = _question(raw, path, number, set(), set())
    assert prompt is not None  # only a line of another family is none
    return prompt


def _question(raw: bytes, path: Path, number: int, wanted: set[str], known: set[str]) -> Prompt | None:
    """A manifest's line as a prompt; None if its family is not `wanted`. The family is added to `known`.

    Raises:
        ManifestError: not a chat, a value of the wrong type, or neither answer nor constraints; names file, line and
            key.
    """
    where = f"{path}:{number}"

    def need(key: str, ok: bool, must: str, remedy: str = "correct or delete that line") -> None:
        if not ok:
            raise ManifestError(f"{where}: {key} is {line[key]!r:.80}, but must be {must}; {remedy}")

    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ManifestError(f"{where} is not UTF-8 text; save the manifest as UTF-8") from error
    line = parse_line(text, where)
    given = {key: value for key, value in line.items() if value is not None}  # tables write null for missing keys
    family = given.get("family", "")
    need("family", isinstance(family, str), "text")
    known.add(family)
    if wanted and family not in wanted:
        return None
    if "answer" not in given and "constraints" not in given:
        raise ManifestError(f"{where} has neither answer nor constraints to judge by; add one or delete that line")
    answer, name, tolerance = given.get("answer", ""), given.get("id", f"{path.name}:{number}"), given.get("tolerance")
    remedy = "correct or delete that line"
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        remedy = f'write it in quotes: "answer": "{answer}"'
    text = isinstance(answer, str) and bool(answer.strip())
    need("answer", "answer" not in given or text, "text that is not empty", remedy)
    read_constraints(given.get("constraints", []), where)
    need("id", isinstance(name, str) and name != "" or type(name) is int, "text that is not empty, or a whole number")
    number_given = tolerance is None or isinstance(tolerance, int | float) and not isinstance(tolerance, bool)
    need("tolerance", number_given and 0 <= (tolerance or 0) < math.inf, "a number from 0 on")
    options = given.get("options", [])
    need("options", isinstance(options, list) and all(isinstance(x, str) for x in options), "a list of texts")
    question = [message for message in line["messages"] if message["role"] != "assistant"]
    try:
        read_chat(question, path.parent, generating=True)
    except ManifestError as error:
        raise ManifestError(f"{where}: messages cannot be used ({error}); correct or delete that line") from error
    need("schema", isinstance(given.get("schema", {}), dict), "a table of a JSON schema")
    hints = given.get("hints", [])
    texts = isinstance(hints, list) and all(isinstance(hint, str) and hint.strip() for hint in hints)
    need("hints", texts and len(hints) <= 5, "a list of up to five texts that are not empty")
    need("trusted", isinstance(given.get("trusted", True), bool), "true or false")
    extra = {key: value for key, value in given.items() if key not in _OWN}
    return Prompt(str(name), family, question, answer, tolerance, tuple(options), path.parent, where, extra)


Taken = tuple[Prompt, Sample]
Gather = Callable[[Any], list[Any]]
"""Collective: this rank's value → every rank's values, in order of rank, on every rank."""


class PromptTooLongError(ManifestError):
    """A prompt has more tokens than the recipe allows."""


class PromptStream:
    """An endless stream of shuffled prompts, the same on every rank and on any number of ranks.

    A step takes the next `count` prompts of one global order; each rank encodes its own places of them. The order of an
    epoch follows from (seed, epoch). A prompt whose clip cannot be read is left out, its place takes the next prompt,
    and `rejected` has the reason on all ranks: `file:line` → reason. A prompt that is too long is not encoded again in
    later epochs. Encoded prompts, pixels as bytes, are kept in `cache` bytes of host memory, because a small set is
    read many times.

    Args:
        max_tokens: tokens of a prompt at most, visual ones included; 0 = no limit.
        asks: (index, epoch) → whether a prompt is asked at its turn, the same on every rank; default always.
    """

    def __init__(
        self,
        prompts: list[Prompt],
        processor: KeyeProcessor,
        seed: int,
        cache: int = 1 << 30,
        max_tokens: int = 0,
        asks: Callable[[int, int], bool] = lambda index, epoch: True,
    ) -> None:
        self.prompts, self.processor, self.seed = prompts, processor, seed
        self.max_tokens, self.asks = max_tokens, asks
        self.epoch = self.position = 0
        self.rejected: dict[str, str] = {}
        self.too_long: dict[int, str] = {}  # index → reason, the same on every rank
        self.cache = Cache(cache)
        self._order: tuple[int, Sequence[int]] = (-1, ())
        self._drawn: Counter[str] = Counter()

    def begin_step(self) -> None:
        """Count the repeats of questions from 0 again."""
        self._drawn.clear()

    def take(self, count: int, mine: Iterable[int] | None = None, gather: Gather | None = None) -> list[Taken]:
        """The prompts at this rank's places of the next `count` readable ones; collective.

        Args:
            count: prompts over all ranks.
            mine: this rank's places, of 0 … count − 1; default all. The places of all ranks are disjoint and complete.
            gather: exchanges values between the ranks; default for one process.

        Returns:
            One (prompt, sample) for each place, in the order of the places.

        Raises:
            ManifestError: no prompt of a complete epoch can be read, or every prompt is too long; on all ranks.
        """
        own, gather = set(range(count) if mine is None else mine), gather or (lambda value: [value])
        taken: dict[int, Taken] = {}
        places, failures = list(range(count)), 0
        while places:
            drawn = {place: self._next() for place in places}
            repeats = {place: self._repeat(self.prompts[index].id) for place, index in drawn.items()}
            failed, long = {}, {}
            for place in sorted(own & drawn.keys()):
                try:
                    sample = self.encode(drawn[place])
                    taken[place] = (replace(self.prompts[drawn[place]], repeat=repeats[place]), sample)
                except PromptTooLongError as error:
                    failed[place] = long[drawn[place]] = str(error)
                except KeyeError as error:
                    failed[place] = str(error)
            ranks = gather((failed, long))
            everywhere = {place: why for rank, _ in ranks for place, why in rank.items()}
            self.rejected |= {self.prompts[drawn[place]].where: why for place, why in everywhere.items()}
            self.too_long |= {index: why for _, rank in ranks for index, why in rank.items()}
            if len(self.too_long) == len(self.prompts):
                why = next(iter(self.too_long.values()))
                raise ManifestError(f"no prompt is short enough, the first because {why}")
            failures = failures + len(everywhere) if len(everywhere) == len(places) else 0
            if failures > len(self.prompts):
                last = everywhere[max(everywhere)]
                raise ManifestError(f"no prompt can be read; the last one failed with: {last}")
            places = sorted(everywhere)
        return [taken[place] for place in sorted(taken)]

    def state_dict(self) -> dict[str, Any]:
        """The position in the global order and the prompts that are too long: the same on every rank."""
        state = {"epoch": self.epoch, "position": self.position, "questions": len(self.prompts)}
        return state | ({"too_long": self.too_long} if self.too_long else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved position.

        Raises:
            CheckpointError: the position is not one of this manifest.
        """
        count = state.get("questions", len(self.prompts))
        if count != len(self.prompts):
            raise CheckpointError(
                f"the checkpoint was written with {count} questions, but now there are {len(self.prompts)}; put "
                "the manifest back as it was, or train again with another --out"
            )
        if not 0 <= state["position"] < count:
            raise CheckpointError(
                f"the checkpoint is at position {state['position']} of an epoch, but there are only {count} "
                "questions; put the manifest back as it was, or train again with another --out"
            )
        self.epoch, self.position = state["epoch"], state["position"]
        self.too_long = dict(state.get("too_long", {}))
        self.rejected |= {self.prompts[index].where: why for index, why in self.too_long.items()}

    def _repeat(self, name: str) -> int:
        """How often a question was drawn before in this step, by all ranks."""
        self._drawn[name] += 1
        return self._drawn[name] - 1

    def _next(self) -> int:
        """Index in `prompts` of the next prompt that is asked."""
        while True:
            epoch, index = self.epoch, self._turn()
            if index not in self.too_long and self.asks(index, epoch):
                return index

    def _turn(self) -> int:
        """Index in `prompts` of the next prompt of the order."""
        if self._order[0] != self.epoch:
            order = array("I", range(len(self.prompts)))  # 4 bytes a question
            random.Random(f"{self.seed}/{self.epoch}").shuffle(order)
            self._order = (self.epoch, order)
        index = self._order[1][self.position]
        self.position += 1
        if self.position == len(self.prompts):
            self.epoch, self.position = self.epoch + 1, 0
        return index

    def encode(self, index: int) -> Sample:
        """The sample of the prompt at an index of `prompts`; ids need not be unique.

        Raises:
            PromptTooLongError: it has more than `max_tokens` tokens.
            KeyeError: its media cannot be read.
        """
        kept = self.cache.get(index)
        if kept is None:
            prompt = self.prompts[index]
            sample = self.processor.sample(prompt.messages, prompt.base_dir, add_generation_prompt=True)
            if 0 < self.max_tokens < len(sample):
                raise PromptTooLongError(
                    f"{prompt.where}: the prompt has {len(sample):,} tokens, more than gspo.max_prompt_tokens = "
                    f"{self.max_tokens:,}; raise it, shorten the clip or lower the encoder's max_tokens"
                )
            kept = [Item(sample, prompt.where, index, prompt.family, "")]
            self.cache.put(index, kept)
        # As floats again, because a batch may have other samples that are not bytes.
        sample = kept[0].sample
        pixels = {name: getattr(sample, name) for name in PIXELS}
        return replace(sample, **{name: None if x is None else normalised(x) for name, x in pixels.items()})
