"""The protocol of rollout engines, and the random numbers of a sequence.

Every sequence has a random generator of its own, which follows from its key and its place in the group. The tokens of
a sequence therefore do not depend on the sequences beside it, on the order in which rows are refilled, or on the number
of processes, except where rounding errors of a different batch size move a probability across a random number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from keye.processor.processor import Sample
from rl.policy.scoring import Group

Key = tuple[int, ...]
"""Identifies a prompt's draws: by convention (seed, purpose, step, number of the question's id).

A question that was drawn before in the same step has one number more, how often.
"""

ROLLOUT, HELDOUT = 0, 1
"""Purposes, the second number of a key."""


class RolloutEngine(Protocol):
    """Samples completions: the model in this process, or a served engine."""

    def generate(
        self,
        samples: list[Sample],
        group_size: int,
        temperature: float,
        max_new_tokens: int,
        keys: Sequence[Key] | None = None,
    ) -> list[Group]:
        """One group for each sample, in their order.

        Args:
            samples: the encoded prompts, with their vision inputs and plans.
            group_size: completions of each prompt.
            temperature: of the softmax; 0 is greedy.
            max_new_tokens: tokens of a completion at most.
            keys: what the draws of each prompt follow from; by default the engine draws them from its own generator.
        """
        ...


def stream_of(key: Key, place: int) -> np.random.Generator:
    """The random numbers of the completion at `place` (0 … G − 1) of the group with this key."""
    words = [number % (1 << 64) for number in (*key, place)]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))


def number_of(text: str) -> int:
    """A number for a key, of 64 bits, that identifies a text such as a question's id."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
