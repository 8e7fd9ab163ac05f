"""The table `[rollout]` of a recipe: how answers are sampled."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from keye.errors import RecipeError
from rl.rollout.connection import Served
from stages.typed_toml import Need

ENGINES = ("in_process", "served")


@dataclass(frozen=True)
class Rollout:
    """Sampling of answers, in addition to `gspo.temperature` and `gspo.max_new_tokens`."""

    cache_mb: int = 8192
    """Memory in MB of a process for keys and values; the number of answers that are decoded together follows."""

    top_p: float = 1.0
    """Only the most likely tokens that sum up to this probability are sampled; 1 = all."""

    top_k: int = 0
    """Only this number of the most likely tokens is sampled; 0 = all."""

    stop_tokens: tuple[str, ...] = ()
    """Tokens that end an answer, in addition to `<|im_end|>`, `<|endoftext|>` and the model's own end tokens."""

    engine: str = "in_process"
    """What samples: "in_process", the model of each process, or "served", running `keye serve`s with its weights."""

    urls: tuple[str, ...] = ()
    """With "served": the servers, each with /v1; empty = of the variable KEYE_ROLLOUT_URL, separated by commas."""

    model: str = ""
    """With "served": the model's name there; empty = of the variable KEYE_ROLLOUT_MODEL, or a server's only model."""

    folder: str = ""
    """With "served": where the policy is written for the servers; empty = `<run>/gspo/policy`."""

    concurrency: int = 16
    """With "served": requests of a process to each server at a time."""

    patience: float = 1800.0
    """With "served": seconds that a request waits for a server that is down or busy."""

    @property
    def sampling(self) -> dict[str, Any]:
        """The keys that answers depend on, where they differ from their defaults."""
        given = {"top_p": self.top_p, "top_k": self.top_k, "stop_tokens": list(self.stop_tokens)}
        default = {"top_p": 1.0, "top_k": 0, "stop_tokens": []}
        return {key: value for key, value in given.items() if value != default[key]}

    def check(self, need: Need, temperatures: Mapping[str, float] = MappingProxyType({})) -> None:
        """Refuse values that cannot work.

        Args:
            temperatures: key of the recipe → a temperature that this engine samples at.

        Raises:
            RecipeError: by `need`.
        """
        need(self.cache_mb >= 1, "rollout.cache_mb must be at least 1")
        need(0 < self.top_p <= 1, "rollout.top_p must be above 0 and at most 1")
        need(self.top_k >= 0, "rollout.top_k must be at least 0")
        need(self.engine in ENGINES, f"rollout.engine must be one of {', '.join(ENGINES)}")
        need(self.concurrency >= 1, "rollout.concurrency must be at least 1")
        need(self.patience > 0, "rollout.patience must be above 0")
        if self.engine != "served":
            return
        need(self.top_p == 1 and not self.top_k, 'rollout.engine = "served" needs top_p = 1 and top_k = 0')
        for key, value in temperatures.items():
            need(value == 1, f'rollout.engine = "served" gives log-probabilities at temperature 1 only: set {key} to 1')

    def servers(self) -> list[Served]:
        """The servers of "served", from the recipe or the environment; the key from KEYE_ROLLOUT_KEY.

        Raises:
            RecipeError: there is none, or a URL of another scheme.
        """
        given = {name: os.environ.get(f"KEYE_ROLLOUT_{name}", "").strip() for name in ("URL", "MODEL", "KEY")}
        urls = self.urls or tuple(url.strip() for url in given["URL"].split(",") if url.strip())
        if not urls:
            raise RecipeError(
                'rollout.engine = "served" needs servers: set rollout.urls or the variable KEYE_ROLLOUT_URL, such as '
                "http://localhost:8000/v1"
            )
        for url in urls:
            if not url.startswith(("http://", "https://")):
                raise RecipeError(f"rollout.urls: {url!r} does not start with http:// or https://; correct it")
        model, key, limits = self.model or given["MODEL"], given["KEY"] or "none", (self.concurrency, self.patience)
        return [Served(url, model, key, limits[0], patience=limits[1]) for url in urls]
