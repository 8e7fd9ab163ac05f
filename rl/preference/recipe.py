"""The tables `[sft]` and `[mpo]` of a post-training recipe."""

from __future__ import annotations

from dataclasses import dataclass, field

from stages.optimizer import OptimizerConfig
from stages.recipe import DataRecipe, StageRecipe
from stages.recipe_checks import check_launch, check_training
from stages.typed_toml import Need


@dataclass(frozen=True, kw_only=True)
class Sft(StageRecipe):
    """Supervised fine-tuning: next-token training on the answers of chats, packed as in pre-training."""

    data: DataRecipe
    """The chats: a table like `data` of a pre-training recipe, without a world and without `stages` of sources."""

    start: str = "annealing"
    """Stage of the run whose model is tuned."""

    freeze: tuple[str, ...] = ()
    """Parts of the model that do not train, such as "visual"."""

    families: tuple[str, ...] = ()
    """Families of held-out questions; empty = all."""

    max_new_tokens: int = 32
    """Tokens of an answer to a held-out question at most."""

    decode_batch_size: int = 256
    """Answers that a process decodes together."""

    precision: str = "auto"
    """Numbers: "auto" (bf16 on a GPU, fp32 on a CPU), "fp32" or "bf16"."""


@dataclass(frozen=True)
class Sampling:
    """Pairs that the start model makes of its own answers."""

    manifest: str = "world/train.jsonl"
    """The questions, relative to the run's folder."""

    limit: int = 0
    """Questions at most, chosen by a hash of their ids; 0 = all."""

    samples: int = 8
    """Answers to each question."""

    temperature: float = 1.0
    """Of sampling."""

    method: str = "rejection"
    """"rejection" (a right against a wrong answer of similar length) or "ranking" (highest against lowest reward)."""

    per_question: int = 1
    """Pairs of a question at most."""


@dataclass(frozen=True, kw_only=True)
class Mpo(OptimizerConfig):
    """Mixed Preference Optimization on pairs of a chosen and a rejected answer, see `rl.preference.losses`."""

    steps: int
    """Optimizer steps."""

    schedule: str = "constant"
    """Learning rate over the steps: "cosine" (to zero) or "constant"."""

    start: str = "sft"
    """Stage of the run whose model is tuned."""

    pairs: str = ""
    """The pairs, a JSONL file relative to the run's folder; empty: the start model makes them, see `sampling`."""

    sampling: Sampling = field(default_factory=Sampling)
    """Pairs that the start model makes, without `pairs`."""

    families: tuple[str, ...] = ()
    """Families of the questions that are sampled, and of held-out ones; empty = all."""

    batch_size: int = 32
    """Pairs of a step over all processes."""

    micro_pairs: int = 4
    """Pairs of a process in one forward pass."""

    beta: float = 0.1
    """β, the factor of the implicit rewards."""

    preference: float = 0.8
    """Weight of the DPO term."""

    quality: float = 0.2
    """Weight of the BCO term."""

    generation: float = 1.0
    """Weight of the NLL term."""

    max_new_tokens: int = 32
    """Tokens of a sampled answer at most."""

    decode_batch_size: int = 256
    """Answers that a process decodes together."""

    cache_mb: int = 1024
    """Host memory in MB that a process may use for encoded questions, so that each is decoded once."""

    freeze: tuple[str, ...] = ()
    """Parts of the model that do not train, such as "visual"."""

    checkpointing: bool = False
    """Recompute activations in the backward pass; attention is kept."""

    offload: bool = False
    """Keep the inputs of recomputed layers in host memory."""

    mlp_tiles: int = 1
    """Parts in which an MLP is computed."""

    checkpoint_every: int = 50
    """Steps between checkpoints."""

    keep_checkpoints: int = 2
    """Checkpoints that are kept."""

    zero: int = 2
    """Stage of DeepSpeed ZeRO: 0 to 3."""

    precision: str = "auto"
    """Numbers: "auto" (bf16 on a GPU, fp32 on a CPU), "fp32" or "bf16"."""


def check_sft(sft: Sft, need: Need) -> None:
    """Refuse values of `[sft]` that cannot work.

    Raises:
        RecipeError: by `need`.
    """
    check_training("sft", sft, sft.data, need)
    need(sft.start not in ("sft", ""), f'sft.start = "{sft.start}" must name another stage, such as "annealing"')
    need(sft.data.world is None, "sft.data.world is of pre-training; the run's world is in its folder already")
    staged = [i for i, source in enumerate(sft.data.sources) if source.stages]
    need(not staged, f"sft.data.sources[{staged[0] if staged else 0}].stages is of pre-training; remove it")
    _check_answers("sft", sft.max_new_tokens, sft.decode_batch_size, need)
    check_launch("sft.precision", sft.precision, (), need)


def check_mpo(mpo: Mpo, need: Need) -> None:
    """Refuse values of `[mpo]` that cannot work.

    Raises:
        RecipeError: by `need`.
    """
    mpo.check("mpo", need)
    for key in ("steps", "batch_size", "micro_pairs", "mlp_tiles", "checkpoint_every", "keep_checkpoints"):
        need(getattr(mpo, key) >= 1, f"mpo.{key} must be at least 1")
    need(mpo.start not in ("mpo", ""), f'mpo.start = "{mpo.start}" must name another stage, such as "sft"')
    need(mpo.beta > 0, "mpo.beta must be above 0")
    weights = (mpo.preference, mpo.quality, mpo.generation)
    need(min(weights) >= 0 and sum(weights) > 0, "mpo.preference, quality and generation must be 0 or more, not all 0")
    need(mpo.cache_mb >= 0, "mpo.cache_mb must be at least 0")
    need(
        mpo.checkpointing or not mpo.offload,
        "mpo.offload keeps what checkpointing recomputes from; set mpo.checkpointing = true, too",
    )
    need(mpo.zero in (0, 1, 2, 3), "mpo.zero must be 0, 1, 2 or 3")
    _check_answers("mpo", mpo.max_new_tokens, mpo.decode_batch_size, need)
    check_launch("mpo.precision", mpo.precision, (), need)
    sampling = mpo.sampling
    need(sampling.samples >= 2, "mpo.sampling.samples must be at least 2: a pair has two answers")
    need(sampling.temperature > 0, "mpo.sampling.temperature must be above 0, because a pair has different answers")
    need(sampling.limit >= 0, "mpo.sampling.limit must be 0 (all questions) or more")
    need(sampling.per_question >= 1, "mpo.sampling.per_question must be at least 1")
    need(sampling.method in ("rejection", "ranking"), 'mpo.sampling.method must be "rejection" or "ranking"')


def _check_answers(table: str, max_new_tokens: int, decode_batch_size: int, need: Need) -> None:
    need(max_new_tokens >= 1, f"{table}.max_new_tokens must be at least 1")
    need(decode_batch_size >= 1, f"{table}.decode_batch_size must be at least 1")
