"""Preference pairs: a prompt with a chosen and a rejected answer, read from JSONL and encoded for training.

A line is {"messages": [...], "chosen": ..., "rejected": ...}. `messages` is the chat up to the answer, with the options
of its media; an assistant's last turn is ignored. An answer is a text, or an assistant's message with its thought as
`reasoning_content`. The conversational preference form of TRL is read and written as well, see
`rl.preference.conversational`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from keye.errors import ManifestError
from keye.processor.messages import read_chat
from keye.processor.processor import KeyeProcessor, Sample
from keye.processor.stream import IM_END
from keye.world.manifest import parse_line
from rl.policy.scoring import Group
from rl.preference.conversational import from_conversational
from rl.questions.prompts import Prompt


@dataclass(frozen=True)
class Pair:
    """One prompt with two answers.

    prompt: its `id` is the pair's place in `PairSet.pairs`. chosen, rejected: texts of the assistant's turn.
    """

    prompt: Prompt
    chosen: str
    rejected: str


@dataclass(frozen=True)
class PairSet:
    """The pairs of a file.

    rejected: `file:line` → reason, for the lines that cannot be used. digest: SHA-256 of the file.
    """

    pairs: list[Pair]
    rejected: dict[str, str]
    digest: str


def load_pairs(path: str | Path) -> PairSet:
    """The pairs of a JSONL file; a line that is none is left out and listed in `rejected`.

    Raises:
        ManifestError: the file is missing or has no pair.
    """
    path = Path(path)
    if not path.is_file():
        raise ManifestError(f"{path} does not exist; make pairs with keye posttrain pairs")
    pairs: list[Pair] = []
    rejected, digest = {}, hashlib.sha256()
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            digest.update(raw)
            if raw.strip():
                where = f"{path}:{number}"
                try:
                    pairs.append(_pair(raw, path.parent, where, len(pairs)))
                except ManifestError as error:
                    rejected[where] = str(error)
    if not pairs:
        reason = f"; the first line cannot be used because {next(iter(rejected.values()))}" if rejected else ""
        raise ManifestError(f"{path} has no pair: give lines with messages (or prompt), chosen and rejected{reason}")
    return PairSet(pairs, rejected, digest.hexdigest())


def _pair(raw: bytes, base: Path, where: str, place: int) -> Pair:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ManifestError(f"{where} is not UTF-8 text; save the file as UTF-8") from error
    row = parse_line(from_conversational(text), where)
    messages = row["messages"]
    if messages and messages[-1].get("role") == "assistant":
        messages = messages[:-1]
    answers = [_answer(row, key, where) for key in ("chosen", "rejected")]
    if answers[0] == answers[1]:
        raise ManifestError(f"{where}: chosen and rejected are the same; give two answers or delete the line")
    try:
        read_chat(messages, base, generating=True)
    except ManifestError as error:
        raise ManifestError(f"{where}: messages cannot be used ({error}); correct or delete that line") from error
    prompt = Prompt(str(place), str(row.get("family") or ""), messages, answers[0], None, (), base, where)
    return Pair(prompt, *answers)


def _answer(row: dict[str, Any], key: str, where: str) -> str:
    """The text of an answer, which may be an assistant's message."""
    given = row.get(key)
    if isinstance(given, dict):
        try:
            given = read_chat([{"role": "user", "content": ""}, given]).messages[-1]["content"]
        except ManifestError as error:
            raise ManifestError(f"{where}: {key} cannot be used ({error}); correct or delete that line") from error
    if not isinstance(given, str) or not given.strip():
        raise ManifestError(f"{where}: {key} is {given!r:.80}, but must be text that is not empty, or a message")
    return given


def encode_answer(processor: KeyeProcessor, text: str) -> Tensor:
    """The tokens int64 [L] of an assistant's turn with its `<|im_end|>`, as the chat template writes them."""
    user = {"role": "user", "content": "?"}
    begin = processor.sample([user], add_generation_prompt=True).input_ids
    for words in (text, text.lstrip()):  # white space at the start can share a token with the template's line break
        ids = processor.sample([user, {"role": "assistant", "content": words}]).input_ids
        if torch.equal(ids[: len(begin)], begin):
            break
    answer = ids[len(begin) :]
    end = (answer == processor.token_id(IM_END)).nonzero()[0, 0]
    return answer[: int(end) + 1]


def pair_group(processor: KeyeProcessor, pair: Pair, sample: Sample) -> Group:
    """The pair as a group of two completions, chosen first, of its encoded prompt."""
    texts = [pair.chosen, pair.rejected]
    return Group(sample, [encode_answer(processor, text) for text in texts], [], [True, True], texts)


def idle_group(processor: KeyeProcessor) -> Group:
    """A pair of two tokens without media, for a forward pass that a rank takes because other ranks take one."""
    sample = processor.sample([{"role": "user", "content": "?"}], add_generation_prompt=True)
    end = torch.tensor([processor.token_id(IM_END)])
    return Group(sample, [end, end], [], [True, True], ["", ""])


def write_pair(messages: list[dict[str, Any]], chosen: str, rejected: str, **more: Any) -> str:
    """A pair as a line of JSON, with further fields."""
    return json.dumps({"messages": messages, "chosen": chosen, "rejected": rejected, **more}, ensure_ascii=False) + "\n"
