"""The recipe of the RL stage: TOML → frozen dataclasses, read and checked by `stages.typed_toml`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from keye.errors import RecipeError
from rl.blindness import Blindness
from rl.hints import Hints
from rl.losses import LOSSES, PolicyLoss, build_loss
from rl.preference.recipe import Mpo, Sft, check_mpo, check_sft
from rl.rollout import correction, truncated
from rl.rollout.config import Rollout
from rl.rollout.correction import Correction
from rl.rollout.truncated import Truncation
from stages import typed_toml
from stages.distributed.parallel import check_sequence
from stages.optimizer import OptimizerConfig
from stages.recipe import located
from stages.recipe_checks import STAGES, TRACKERS, check_launch
from stages.typed_toml import Need, requirement

PHASES = ("sft", "mpo", "gspo")
FOREIGN = dict.fromkeys(("data", *STAGES), "a pre-training recipe; use keye pretrain")


@dataclass(frozen=True, kw_only=True)
class Gspo(OptimizerConfig):
    """One step: `prompts` questions, `group_size` answers to each, then `mini_batches` optimizer steps over them."""

    steps: int
    """Batches of rollouts, with `mini_batches` optimizer steps each."""

    schedule: str = "constant"
    """Learning rate over the optimizer steps: "cosine" (to zero) or "constant"."""

    start: str = "annealing"
    """Stage of the run whose model is tuned."""

    manifest: str = "world/train.jsonl"
    """The questions, relative to the run's folder."""

    families: tuple[str, ...] = ()
    """Families of questions, also of the held-out ones; empty = all."""

    prompts: int = 32
    """Questions of a step over all processes."""

    group_size: int = field(default=8, metadata={"former": "group"})
    """Answers to each question."""

    mini_batches: int = 4
    """Optimizer steps of a step."""

    micro_batch_tokens: int = 0
    """Tokens of a forward and backward pass at most, each prompt counted once for its answers; 0 = a mini-batch."""

    sequence_parallel: int = 1
    """Neighbouring processes that share the rows of an update, each with a part of the tokens; a row then has at most
    `micro_batch_tokens` over all of them. Must divide the number of processes and the query heads."""

    loss: str = "gspo"
    """The policy loss: "gspo", "gspo_token", "grpo", "dapo", "dr_grpo" or "cispo"."""

    epsilon_low: float | None = None
    """The importance ratio is clipped below 1 minus this; by default the value of the loss's paper."""

    epsilon_high: float | None = None
    """The importance ratio is clipped above 1 plus this; by default the value of the loss's paper."""

    kl: float = 0.0
    """Weight of the KL divergence from the start model; 0 = none. Without LoRA every process has a copy of it."""

    advantages: str = ""
    """"standardised" (divided by the group's standard deviation) or "centred"; empty = as the loss's paper does."""

    temperature: float = 1.0
    """Of sampling and of the log-probabilities that are trained."""

    max_new_tokens: int = 32
    """Tokens of an answer at most."""

    max_prompt_tokens: int = 0
    """Tokens of a question at most, visual ones included; longer ones are left out, counted and named. 0 = no limit."""

    extra_prompts: int = 0
    """Further questions of a step at most, over all processes, in place of groups without advantage; 0 = none."""

    curriculum_floor: float = 1.0
    """Probability that a question is asked whose answers are all right or all wrong so far; 1 = no curriculum."""

    truncated: str = "wrong"
    """An answer that reached `max_new_tokens`: "wrong" (not finished, for rewards), "mask" (no advantage; the others
    are compared without it) or "penalise" (`overlong_penalty` less than a wrong one)."""

    overlong_tokens: int = 0
    """With "penalise": the penalty rises over this number of tokens below `max_new_tokens`; 0 = only if truncated."""

    overlong_penalty: float = 1.0
    """With "penalise": subtracted from the reward of a truncated answer."""

    importance: str = "off"
    """Correction for a sampler whose log-probabilities differ from the trainer's: "off", "truncated" or "masked"."""

    importance_cap: float = 2.0
    """The largest importance weight; "masked" leaves out what is above it or below its inverse."""

    importance_level: str = "sequence"
    """Importance weights of "sequence" or "token"."""

    decode_batch_size: int = field(default=256, metadata={"former": "decode_batch"})
    """Answers that a process decodes together."""

    cache_mb: int = 1024
    """Host memory in MB that a process may use for encoded questions, so that each is decoded once."""

    freeze: tuple[str, ...] = ()
    """Parts of the model that do not train, such as "visual"."""

    checkpoint_every: int = 50
    """Steps between checkpoints."""

    keep_checkpoints: int = 2
    """Checkpoints that are kept."""

    checkpointing: bool = False
    """Recompute activations in the backward pass; attention is kept."""

    offload: bool = False
    """Keep the inputs of recomputed layers in host memory."""

    mlp_tiles: int = 1
    """Parts in which an MLP is computed."""

    zero: int = 2
    """Stage of DeepSpeed ZeRO: 0, 1, 2 or 3; with 3 all weights are gathered for the time of a rollout."""

    offload_optimizer: bool = False
    """Keep fp32 weights and moments in host memory; needs `zero` of at least 1."""

    lora_rank: int = 0
    """Rank of LoRA on the decoder's matrices, which alone train then; 0 = no LoRA."""

    lora_alpha: float = 32.0
    """LoRA's matrices are scaled by this over the rank."""

    precision: str = "auto"
    """Numbers: "auto" (bf16 on a GPU, fp32 on a CPU), "fp32" or "bf16"."""

    @property
    def policy_loss(self) -> PolicyLoss:
        """The loss with its settings."""
        return build_loss(self.loss, self.epsilon_low, self.epsilon_high, self.kl)

    @property
    def truncation(self) -> Truncation:
        """The treatment of truncated answers."""
        return Truncation(self.truncated, self.max_new_tokens, self.overlong_tokens, self.overlong_penalty)

    @property
    def correction(self) -> Correction:
        """The correction for the sampler."""
        return Correction(self.importance, self.importance_cap, self.importance_level)

    @property
    def standardise(self) -> bool:
        """Whether advantages are divided by the standard deviation of their group."""
        return self.policy_loss.standardise if not self.advantages else self.advantages == "standardised"


@dataclass(frozen=True)
class HeldOut:
    """The questions that are answered before and after training, once greedily and `samples` times."""

    manifest: str = "world/heldout.jsonl"
    """The questions, relative to the run's folder."""

    limit: int = 100
    """Questions of each family at most."""

    samples: int = 4
    """Sampled answers to each question."""

    temperature: float = 1.0
    """Of the sampled answers."""

    every: int = 0
    """Steps between evaluations while training, of which the best model is kept in `model-best`; 0 = none."""


@dataclass(frozen=True)
class RlRecipe:
    """A complete RL run."""

    gspo: Gspo | None = None
    """RL, the last phase."""

    heldout: HeldOut = HeldOut()
    """The evaluation before and after."""

    rewards: dict[str, float | dict[str, Any]] = field(default_factory=lambda: {"accuracy": 1.0})
    """Reward → its weight in the sum, or a table with its weight and options (`rl.rewards.RewardOptions`)."""

    seed: int = 0
    """Seed of everything that is drawn."""

    trackers: tuple[str, ...] = ()
    """Trackers "wandb" and "trackio": they get every step, as metrics.jsonl and TensorBoard do."""

    blindness: Blindness = Blindness()
    """Questions without their frames, and the guard against answers that need none."""

    sft: Sft | None = None
    """Supervised fine-tuning, the first phase."""

    mpo: Mpo | None = None
    """Preference optimization, the phase after `sft`."""

    rollout: Rollout = Rollout()
    """The sampling of answers."""

    hints: Hints = Hints()
    """Hints for questions that fail every rollout."""

    @property
    def phases(self) -> list[str]:
        """Names of the phases that this recipe has, in order."""
        return [name for name in PHASES if getattr(self, name) is not None]


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RlRecipe:
    """Read a recipe, override keys (`gspo.steps=20`) and check it.

    Raises:
        RecipeError: no such file, not TOML, an unknown key, a wrong type or an impossible value.
    """
    path = Path(path)
    recipe = typed_toml.load(RlRecipe, path, overrides, str(Path(__file__).parent / "recipes"), FOREIGN)
    _check(recipe, str(path))
    if recipe.gspo is not None:
        loss = recipe.gspo.policy_loss
        g = replace(recipe.gspo, epsilon_low=loss.epsilon_low, epsilon_high=loss.epsilon_high)
        recipe = replace(recipe, gspo=g)
    if recipe.sft is not None:
        recipe = replace(recipe, sft=replace(recipe.sft, data=located(recipe.sft.data, path.parent)))
    return recipe


def _check(recipe: RlRecipe, file: str) -> None:
    need, heldout = requirement(file), recipe.heldout
    need(bool(recipe.phases), f"no phase; add one of the tables {', '.join(PHASES)}")
    if recipe.sft is not None:
        check_sft(recipe.sft, need)
    if recipe.mpo is not None:
        check_mpo(recipe.mpo, need)
    if recipe.gspo is not None:
        _check_gspo(recipe.gspo, need)
    need(set(recipe.trackers) <= set(TRACKERS), f"trackers may name only {', '.join(TRACKERS)}")
    weights = [given.get("weight", 1.0) if isinstance(given, dict) else given for given in recipe.rewards.values()]
    numbers = all(isinstance(weight, int | float) and math.isfinite(weight) for weight in weights)
    need(numbers, "every weight of [rewards] must be a finite number")
    recipe.blindness.check(need)
    sampled = {} if recipe.gspo is None else {"gspo": recipe.gspo.temperature, "heldout": heldout.temperature}
    recipe.rollout.check(need, {f"{table}.temperature": value for table, value in sampled.items()})
    need(heldout.every >= 0, "heldout.every must be at least 0")
    recipe.hints.check(need)
    need(heldout.limit >= 1, "heldout.limit must be at least 1")
    need(heldout.samples >= 1 and heldout.temperature > 0, "heldout.samples and temperature must be above 0")


def _check_gspo(g: Gspo, need: Need) -> None:
    g.check("gspo", need)
    counts = ("steps", "prompts", "mini_batches", "max_new_tokens", "decode_batch_size", "sequence_parallel")
    for key in (*counts, "checkpoint_every", "keep_checkpoints"):
        need(getattr(g, key) >= 1, f"gspo.{key} must be at least 1")
    for key in ("cache_mb", "max_prompt_tokens", "extra_prompts"):
        need(getattr(g, key) >= 0, f"gspo.{key} must be at least 0")
    need(0 < g.curriculum_floor <= 1, "gspo.curriculum_floor must be above 0 and at most 1")
    need(g.micro_batch_tokens >= 0, "gspo.micro_batch_tokens must be at least 0")
    need(
        g.start != "gspo",
        'gspo.start = "gspo" would write the model to the folder it is read from; copy it elsewhere',
    )
    need(g.group_size >= 2, "gspo.group_size must be at least 2: an answer is compared with the others of its group")
    need(g.temperature > 0, "gspo.temperature must be above 0, because equal answers have no advantage")
    need(g.loss in LOSSES, f"gspo.loss must be one of {', '.join(LOSSES)}")
    loss = g.policy_loss
    need(0 < loss.epsilon_low <= 1 and loss.epsilon_high > 0, "gspo.epsilon_low and epsilon_high must be above 0")
    need(g.kl >= 0, "gspo.kl must be at least 0")
    need(g.advantages in ("", "standardised", "centred"), 'gspo.advantages must be "standardised" or "centred"')
    need(g.truncated in truncated.KINDS, f"gspo.truncated must be one of {', '.join(truncated.KINDS)}")
    need(
        0 <= g.overlong_tokens < g.max_new_tokens and g.overlong_penalty >= 0,
        "gspo.overlong_tokens must be at least 0 and below gspo.max_new_tokens, and gspo.overlong_penalty at least 0",
    )
    need(g.importance in correction.KINDS, f"gspo.importance must be one of {', '.join(correction.KINDS)}")
    need(g.importance_level in correction.LEVELS, 'gspo.importance_level must be "sequence" or "token"')
    need(g.importance_cap >= 1, "gspo.importance_cap must be at least 1")
    need(g.zero in (0, 1, 2, 3), "gspo.zero must be 0, 1, 2 or 3")
    need(not g.offload or g.checkpointing, "gspo.offload needs gspo.checkpointing = true")
    need(not g.offload_optimizer or g.zero > 0, "gspo.offload_optimizer needs gspo.zero of at least 1")
    need(g.mlp_tiles >= 1, "gspo.mlp_tiles must be at least 1")
    need(g.lora_rank >= 0 and g.lora_alpha > 0, "gspo.lora_rank must be at least 0 and lora_alpha above 0")
    check_launch("gspo.precision", g.precision, (), need)
    need(
        g.prompts % g.mini_batches == 0,
        f"gspo.prompts = {g.prompts} must be a multiple of gspo.mini_batches = {g.mini_batches}",
    )


def check_world(recipe: RlRecipe, world: int) -> None:
    """Refuse mini-batches with fewer prompts than processes, each of which must take part in every step.

    Refuse also a number of processes that `gspo.sequence_parallel` does not divide.

    Raises:
        RecipeError: names the keys and the remedy.
    """
    g = recipe.gspo
    check_sequence("gspo", g.sequence_parallel, world)
    if g.prompts // g.mini_batches < world:
        raise RecipeError(
            f"gspo.prompts = {g.prompts} in {g.mini_batches} mini-batches is less than one prompt for each of {world} "
            f"processes: set it to at least {world * g.mini_batches}, or start fewer processes"
        )


def places_of(rank: int, world: int, prompts: int, mini_batches: int) -> list[list[int]]:
    """A rank's prompts of each mini-batch of a step; the mini-batches do not depend on `world`."""
    size = prompts // mini_batches
    return [list(range(batch * size + rank, (batch + 1) * size, world)) for batch in range(mini_batches)]
