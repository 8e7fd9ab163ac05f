"""The recipe of `keye dream` as dataclasses, read from TOML."""

from dataclasses import dataclass, field
from pathlib import Path

from keye.dream.episode import FastSettings
from keye.dream.model import DreamConfig
from keye.errors import ArgumentError, RecipeError
from stages import typed_toml
from stages.optimizer import OptimizerConfig


@dataclass(frozen=True)
class LoopRecipe:
    """The slow-fast loop (SlowFast-VGen, algorithm 1)."""

    rounds: int = 4
    """Rounds of episodes and slow updates."""

    episodes: int = 8
    """Walks of a round, of all processes together; each has its own memory."""

    updates: int = 24
    """Optimizer steps on the slow weights after the episodes of a round."""

    group: int = 4
    """Stored chunks of a step, of all processes together."""

    draws: int = 8
    """Noises and noise levels of each stored chunk in a step."""

    learning_rate: float = 3e-4
    """Of the slow weights, constant."""

    memory: bool = True
    """Whether the slow weights learn under the stored memories. False is the control: the same chunks and steps
    without them."""


@dataclass(frozen=True)
class DreamRecipe:
    """A model, its slow training, and how its memory is written."""

    name: str
    """Default directory: runs/<name>."""

    optimizer: OptimizerConfig
    """AdamW of the slow stage."""

    seed: int = 0
    """Of the weights, walks and noise."""

    steps: int = 1500
    """Optimizer steps of the slow stage."""

    batch: int = 32
    """Windows of a step, of all processes together."""

    unconditional: float = 0.25
    """Share of windows without past frames and action. The published model knows them from its pre-training."""

    single_past_every: int = 8
    """Every so many steps the past is a single frame, as at the start of a walk."""

    checkpoint_every: int = 100
    """Steps between two checkpoints."""

    model: DreamConfig = field(default_factory=DreamConfig)
    """Sizes."""

    fast: FastSettings = field(default_factory=FastSettings)
    """Writes of the memory."""

    loop: LoopRecipe = field(default_factory=LoopRecipe)
    """The slow-fast loop."""


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> DreamRecipe:
    """Read, override and check a recipe.

    Raises:
        RecipeError: no such file, not TOML, an unknown key, a wrong type or an impossible value.
    """
    ready = str(Path(__file__).parent / "recipes")
    try:
        recipe = typed_toml.load(DreamRecipe, Path(path), overrides, ready)
    except ArgumentError as error:
        raise RecipeError(f"{path}: {error}") from error
    need = typed_toml.requirement(str(path))
    recipe.optimizer.check("optimizer", need)
    for name in ("steps", "batch", "single_past_every", "checkpoint_every"):
        need(getattr(recipe, name) >= 1, f"{name} must be at least 1")
    for name in ("rounds", "episodes", "updates", "group", "draws"):
        need(getattr(recipe.loop, name) >= 1, f"loop.{name} must be at least 1")
    need(recipe.loop.learning_rate > 0, "loop.learning_rate must be above 0")
    need(0 <= recipe.unconditional < 1, "unconditional must be at least 0 and below 1")
    need(not recipe.loop.memory or recipe.fast.write != "none", 'fast.write is "none", but loop.memory needs a memory')
    need(recipe.model.window >= 8, "model.window must be at least 8, for a past and a new chunk of 4 frames")
    return recipe
