"""The recipe of the RL stage: TOML → frozen dataclasses, read and checked by `stages.typed_toml`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from keye.errors import RecipeError
from rl.gspo import EPSILON_HIGH, EPSILON_LOW
from stages.typed_toml import build, read


@dataclass(frozen=True)
class Gspo:
    """One step: `prompts` questions, `group` answers to each, then `mini_batches` optimizer steps over them.

    start: the run's stage whose model is tuned. manifest: the questions, relative to the run's folder; families: which
    of them, all when empty. prompts: over all processes. freeze: parts of the model that stay, such as "visual".
    max_new_tokens bounds an answer; decode_batch: sequences decoded side by side; cache_mb: host memory of each process
    for encoded questions, which need not be decoded again. learning_rate rises linearly over
    `warmup` optimizer steps and then stays. checkpoint_every: steps between checkpoints. zero: ZeRO stage, 0 to 2.
    precision: "auto" (bf16 on a GPU, fp32 on a CPU), "fp32" or "bf16".
    """

    steps: int
    learning_rate: float
    start: str = "annealing"
    manifest: str = "world/train.jsonl"
    families: tuple[str, ...] = ()
    prompts: int = 32
    group: int = 8
    mini_batches: int = 4
    epsilon_low: float = EPSILON_LOW
    epsilon_high: float = EPSILON_HIGH
    temperature: float = 1.0
    max_new_tokens: int = 32
    decode_batch: int = 256
    cache_mb: int = 1024
    warmup: int = 0
    betas: tuple[float, ...] = (0.9, 0.95)
    weight_decay: float = 0.0
    clip: float = 1.0
    freeze: tuple[str, ...] = ()
    checkpoint_every: int = 50
    zero: int = 2
    precision: str = "auto"


@dataclass(frozen=True)
class HeldOut:
    """The questions asked before and after, `limit` of each family: once greedily, `samples` times at `temperature`."""

    manifest: str = "world/heldout.jsonl"
    limit: int = 100
    samples: int = 4
    temperature: float = 1.0


@dataclass(frozen=True)
class RlRecipe:
    """rewards: name → weight in the sum."""

    gspo: Gspo
    heldout: HeldOut = HeldOut()
    rewards: dict[str, float] = field(default_factory=lambda: {"accuracy": 1.0})
    seed: int = 0


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RlRecipe:
    """Read a recipe, override keys (`gspo.steps=20`) and check it.

    Raises:
        RecipeError: no such file, not TOML, an unknown key, a wrong type or an impossible value.
    """
    path = Path(path)
    table = read(path, overrides, "rl/recipes")
    recipe = build(RlRecipe, table, str(path))
    _check(recipe, str(path))
    return recipe


def _check(recipe: RlRecipe, file: str) -> None:
    def need(ok: bool, message: str) -> None:
        if not ok:
            raise RecipeError(f"{file}: {message}")

    g, heldout = recipe.gspo, recipe.heldout
    for key in ("steps", "prompts", "mini_batches", "max_new_tokens", "decode_batch", "checkpoint_every"):
        need(getattr(g, key) >= 1, f"gspo.{key} must be at least 1")
    need(g.cache_mb >= 0, "gspo.cache_mb must be at least 0")
    need(g.start != "gspo", 'gspo.start = "gspo" would tune a model in the folder it is read from; copy it elsewhere')
    need(g.group >= 2, "gspo.group must be at least 2, because an answer is judged against its siblings")
    need(g.temperature > 0, "gspo.temperature must be above 0, because equal answers teach nothing")
    need(g.learning_rate > 0, "gspo.learning_rate must be above 0")
    need(0 < g.epsilon_low < 1 and g.epsilon_high > 0, "gspo.epsilon_low and epsilon_high must be small and above 0")
    need(len(g.betas) == 2, "gspo.betas must be two numbers")
    need(g.zero in (0, 1, 2), "gspo.zero must be 0, 1 or 2")
    need(g.precision in ("auto", "fp32", "bf16"), 'gspo.precision must be "auto", "fp32" or "bf16"')
    need(
        g.prompts % g.mini_batches == 0,
        f"gspo.prompts = {g.prompts} must be a multiple of gspo.mini_batches = {g.mini_batches}",
    )
    need(all(map(math.isfinite, recipe.rewards.values())), "every weight of [rewards] must be a finite number")
    need(heldout.limit >= 1, "heldout.limit must be at least 1")
    need(heldout.samples >= 1 and heldout.temperature > 0, "heldout.samples and temperature must be above 0")


def check_world(recipe: RlRecipe, world: int) -> None:
    """RecipeError when a mini-batch has fewer prompts than there are processes: each must take part in every step."""
    g = recipe.gspo
    if g.prompts // g.mini_batches < world:
        raise RecipeError(
            f"gspo.prompts = {g.prompts} in {g.mini_batches} mini-batches is less than one prompt for each of {world} "
            f"processes: set it to at least {world * g.mini_batches}, or start fewer processes"
        )


def places_of(rank: int, world: int, prompts: int, mini_batches: int) -> list[list[int]]:
    """Which of a step's prompts a rank owns, for each mini-batch; the mini-batches do not depend on `world`."""
    size = prompts // mini_batches
    return [list(range(batch * size + rank, (batch + 1) * size, world)) for batch in range(mini_batches)]
