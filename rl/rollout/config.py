"""The table `[rollout]` of a recipe: how answers are sampled."""

from __future__ import annotations

from dataclasses import dataclass

from stages.typed_toml import Need


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

    def check(self, need: Need) -> None:
        """Refuse values that cannot work.

        Raises:
            RecipeError: by `need`.
        """
        need(self.cache_mb >= 1, "rollout.cache_mb must be at least 1")
        need(0 < self.top_p <= 1, "rollout.top_p must be above 0 and at most 1")
        need(self.top_k >= 0, "rollout.top_k must be at least 0")
