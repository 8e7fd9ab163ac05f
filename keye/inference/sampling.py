"""How the tokens of a reply are chosen."""

from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from keye.errors import KeyeError

MIN_TEMPERATURE = 1e-4
"""The lowest temperature above 0: logits divided by less overflow float32, and sampling is greedy long before."""


@dataclass(frozen=True)
class Sampling:
    """How the tokens of a reply are chosen.

    max_new_tokens: limit of the reply. temperature: 0 is greedy; otherwise from `MIN_TEMPERATURE` to 100. top_p: only
    the most likely tokens that sum up to this probability. top_k: only this number of the most likely tokens; 0 is all.
    min_p: only tokens whose probability is at least this fraction of the most likely one's. seed: for reproducible
    sampling. stop: texts that end the reply and are not part of it. stop_ids: further tokens that end the reply.

    Raises:
        KeyeError: a value outside its range; the message names it.
    """

    max_new_tokens: int = 1024
    temperature: float = 0.0
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_k: int | None = None
    min_p: float | None = None
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "seed", "top_k"):
            value = getattr(self, name)
            if not isinstance(value, Integral) and (value is not None or name == "max_new_tokens"):
                raise KeyeError(f"{name} is {value!r}; give a whole number")
        if isinstance(self.stop, str):
            raise KeyeError(f"stop is {self.stop!r}; give a tuple of texts")
        if self.max_new_tokens < 1:
            raise KeyeError(f"max_new_tokens is {self.max_new_tokens}; give 1 or more")
        if not isinstance(self.temperature, Real) or not 0 <= self.temperature <= 100:
            raise KeyeError(f"temperature is {self.temperature}; give 0 for greedy decoding, or about 0.7")
        if 0 < self.temperature < MIN_TEMPERATURE:
            raise KeyeError(
                f"temperature is {self.temperature}; give 0 for greedy decoding, or {MIN_TEMPERATURE} or more"
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise KeyeError(f"top_p is {self.top_p}; give a number above 0 and at most 1")
        if self.top_k is not None and self.top_k < 0:
            raise KeyeError(f"top_k is {self.top_k}; give a number of tokens, or 0 for all")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise KeyeError(f"min_p is {self.min_p}; give a number from 0 to 1")
        if "" in self.stop:
            raise KeyeError("stop contains an empty text, which matches everywhere; remove it")

    def options(self) -> dict[str, Any]:
        """The same as arguments of `generate`."""
        options: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "do_sample": self.temperature > 0}
        if self.temperature:
            drawn = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k, "min_p": self.min_p}
            options |= {name: value for name, value in drawn.items() if value is not None}
        return options
