"""How a reply is drawn."""

from dataclasses import dataclass
from typing import Any

from keye.errors import KeyeError

COLDEST = 1e-4
"""The lowest temperature above 0: logits divided by less overflow float32, and the draw is the likeliest token long
before."""


@dataclass(frozen=True)
class Sampling:
    """How a reply is drawn.

    max_new_tokens: at most so many. temperature: 0 takes the likeliest token; otherwise from `COLDEST` to 100. top_p:
    only the likeliest tokens that sum up to this probability. top_k: only so many of the likeliest tokens; 0 is all.
    min_p: only tokens whose probability is at least this share of the likeliest one's. seed: for repeatable draws.
    stop: texts that end the reply and are left out of it.

    Raises:
        KeyeError: a value outside its range, by name.
    """

    max_new_tokens: int = 1024
    temperature: float = 0.0
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_k: int | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise KeyeError(f"max_new_tokens is {self.max_new_tokens}; give 1 or more")
        if not 0 <= self.temperature <= 100:
            raise KeyeError(f"temperature is {self.temperature}; give 0 for the likeliest answer, or about 0.7")
        if 0 < self.temperature < COLDEST:
            raise KeyeError(f"temperature is {self.temperature}; give 0 for the likeliest answer, or {COLDEST} or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise KeyeError(f"top_p is {self.top_p}; give a share above 0 and at most 1")
        if self.top_k is not None and self.top_k < 0:
            raise KeyeError(f"top_k is {self.top_k}; give a number of tokens, or 0 for all")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise KeyeError(f"min_p is {self.min_p}; give a share from 0 to 1")
        if "" in self.stop:
            raise KeyeError("stop holds an empty text, which is everywhere; leave it out")

    def options(self) -> dict[str, Any]:
        """The same as arguments of `generate`."""
        options: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "do_sample": self.temperature > 0}
        if self.temperature:
            drawn = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k, "min_p": self.min_p}
            options |= {name: value for name, value in drawn.items() if value is not None}
        return options
