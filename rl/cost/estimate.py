"""Estimate: the cost of a GSPO recipe before it runs, as memory per GPU and node, operations, time and money.

Nothing is measured here. The model and the sizes of clips come from the pre-training recipe, lengths from
`rl.cost.work`, memory from `rl.cost.memory`, devices from `stages.cost.gpus`.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from keye.errors import KeyeError
from rl.cost.memory import Loading, StepMemory, micro_batch_of, parameters_of_policy, plan_of, step_memory
from rl.cost.settings import Settings, keys, settings_of
from rl.cost.work import Lengths, Operations, lengths_of, operations
from rl.questions.heldout import BATCH
from rl.recipe import RlRecipe, check_world
from stages.cost.estimate import DAY, HOUR, UPDATE_PASSES, config_of, parameters_of
from stages.cost.footprint import Share
from stages.cost.gpus import Gpu
from stages.cost.host_memory import HostFootprint, Node, host_footprint
from stages.recipe import Recipe


@dataclass(frozen=True)
class Assumptions:
    """Assumptions in addition to the recipes.

    utilisation: share of the peak rate at which matrix products run. bandwidth: share of the memory bandwidth at which
    decoding reads weights, keys and values. usable: share of the GPU memory for tensors. prompt, answer: average
    tokens, instead of those in `lengths_of`. node: of the hosts.
    """

    utilisation: float = 0.4
    bandwidth: float = 0.6
    usable: float = 0.92
    prompt: int | None = None
    answer: int | None = None
    node: Node = field(default_factory=Node)


@dataclass(frozen=True)
class Seconds:
    """Time of each part of a step."""

    prefill: float
    decode: float
    score: float
    update: float

    @property
    def total(self) -> float:
        return self.prefill + self.decode + self.score + self.update


@dataclass(frozen=True)
class RlCost:
    """The cost of a recipe.

    tokens: read in a step, prompts and answers, each once. days, dollars: of all steps, without held-out questions.
    largest: component with most bytes at the peak. lowers: the key that lowers it. remedy: settings that make the
    recipe fit, "" if it fits.
    """

    parameters: int
    trained: int
    lengths: Lengths
    tokens: int
    steps: int
    operations: Operations
    memory: StepMemory
    host: HostFootprint
    fits: bool
    seconds: Seconds
    days: float
    dollars: float
    largest: str
    lowers: str
    remedy: str


LOWERS = {
    "weights": "gspo.zero = 3, which divides them among the GPUs",
    "optimizer": "gspo.offload_optimizer = true, gspo.lora_rank, or more GPUs, among which it is divided",
    "gradients": "gspo.lora_rank, or more GPUs, among which they are divided",
    "buckets": "gspo.lora_rank",
    "kv cache": "rollout.cache_mb",
    "pixels": "gspo.max_prompt_tokens",
    "one layer": "gspo.micro_batch_tokens",
    "activations": "gspo.micro_batch_tokens",
    "logits": "gspo.micro_batch_tokens",
    "step": "gspo.offload_optimizer = true",
}
ROLLING = {"one layer": "gspo.max_prompt_tokens", "logits": "gspo.decode_batch_size"}


def estimate(recipe: RlRecipe, pretrain: Recipe, gpu: Gpu, gpus: int, assumed: Assumptions | None = None) -> RlCost:
    """The cost of GSPO with `recipe` on `gpus` devices, from the model that `pretrain` trains.

    Raises:
        RecipeError: the recipe has fewer prompts in a mini-batch than devices.
        KeyeError: one answer to the longest prompt does not fit into the cache of the rollout.
    """
    assumed = assumed or Assumptions()
    check_world(recipe, gpus)
    config = config_of(pretrain)
    counts = parameters_of(config)
    settings = settings_of(recipe)
    made = _estimate(settings, pretrain, config, counts, gpu, gpus, assumed)
    if made.fits:
        return made
    return dataclasses.replace(made, remedy=_remedy(settings, pretrain, config, counts, gpu, gpus, assumed))


def _remedy(
    settings: Settings, pretrain: Recipe, config: Any, counts: dict[str, int], gpu: Gpu, gpus: int, assumed: Assumptions
) -> str:
    """The fewest changes of the recipe that make it fit."""

    def fits(changes: dict[str, Any]) -> bool:
        try:
            other = dataclasses.replace(settings, **changes)
            return _estimate(other, pretrain, config, counts, gpu, gpus, assumed).fits
        except KeyeError:
            return False

    heads = math.gcd(config.text_config.num_attention_heads, gpus)
    for changes in _changes(settings, lengths_of(settings, pretrain, assumed.prompt, assumed.answer), heads):
        if not set(changes) <= set(keys()):
            continue
        if fits(changes):
            for key in list(changes):  # leave out what is not needed
                fewer = {k: v for k, v in changes.items() if k != key}
                changes = fewer if fits(fewer) else changes
            return " ".join(f"--set gspo.{key}={str(value).lower()}" for key, value in changes.items())
    return "no setting of the recipe makes it fit; use a larger GPU, or more of them"


def _changes(gspo: Settings, lengths: Lengths, ranks: int) -> Iterator[dict[str, Any]]:
    """Changes that save memory, about the cheapest first, each in addition to the ones before.

    ranks: a row is shared by this number of GPUs, or one that divides it.
    """
    changes: dict[str, Any] = {}
    if not gspo.checkpointing:
        yield (changes := {**changes, "checkpointing": True})
    least = lengths.longest_prompt + lengths.longest_answer
    budget = gspo.micro_batch_tokens or gspo.prompts * (lengths.longest_prompt + gspo.group_size * least)
    size = 1 << max(0, math.ceil(math.log2(budget)) - 1)
    while size > least / 2:
        yield (changes := {**changes, "micro_batch_tokens": max(size, least)})
        size //= 2
    for zero in range(gspo.zero + 1, 4):
        yield (changes := {**changes, "zero": zero})
    for key in ("offload", "offload_optimizer"):
        if not getattr(gspo, key):
            yield (changes := {**changes, key: True})
    for sharing in range(gspo.sequence_parallel + 1, ranks + 1):
        if ranks % sharing == 0:
            yield (changes := {**changes, "sequence_parallel": sharing})
    limit = lengths.longest_prompt // 2
    while limit >= 1024:
        yield (changes := {**changes, "max_prompt_tokens": limit, "micro_batch_tokens": limit + lengths.longest_answer})
        limit //= 2


def _estimate(
    gspo: Settings, pretrain: Recipe, config: Any, counts: dict[str, int], gpu: Gpu, gpus: int, assumed: Assumptions
) -> RlCost:
    lengths = lengths_of(gspo, pretrain, assumed.prompt, assumed.answer)
    memory = step_memory(config, gspo, lengths, gpus, counts)
    done = operations(config, gspo, lengths)
    total, trained = parameters_of_policy(config, gspo, counts)
    seconds = _seconds(config, gspo, lengths, done, memory, total, trained, gpu, gpus, assumed)
    moment = max(memory.moments, key=memory.moments.__getitem__)
    largest = max(memory.parts, key=memory.parts.__getitem__)
    days = seconds.total * gspo.steps / DAY
    return RlCost(
        parameters=total, trained=trained, lengths=lengths,
        tokens=gspo.prompts * (lengths.prompt + gspo.group_size * lengths.answer), steps=gspo.steps, operations=done,
        memory=memory, host=_host(config, gspo, lengths, total, trained, gpus, assumed),
        fits=memory.peak <= assumed.usable * gpu.memory, seconds=seconds, days=days,
        dollars=days * DAY / HOUR * gpus * gpu.price, largest=largest,
        lowers=_lowers(gspo, largest, moment), remedy="",
    )  # fmt: skip


def _lowers(gspo: Settings, largest: str, moment: str) -> str:
    """The key that lowers the largest component at the moment of the peak."""
    if moment.startswith("while") and largest in ROLLING:
        return ROLLING[largest]
    if largest == "activations" and not gspo.checkpointing:
        return "gspo.checkpointing = true"
    return LOWERS[largest]


def _seconds(
    config: Any, gspo: Settings, lengths: Lengths, done: Operations, memory: StepMemory, total: int,
    trained: int, gpu: Gpu, gpus: int, assumed: Assumptions,
) -> Seconds:  # fmt: skip
    """Seconds of each part: products at their share of the peak rate, decoding at least at that of the bandwidth."""
    rate, read = gpus * gpu.peak * assumed.utilisation, gpu.bandwidth * assumed.bandwidth
    steps = gspo.mini_batches * UPDATE_PASSES * 4 * trained / gpus / gpu.bandwidth
    update = (done.update + done.again) / rate + steps
    if memory.rollout is None:
        return Seconds(0.0, 0.0, done.score / rate, update)
    text = config.text_config
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    per_token = 2 * text.num_hidden_layers * text.num_key_value_heads * head * gspo.element
    # A rank decodes `rows` answers at a time; a pass reads the weights, each prompt in flight once, and the answers.
    rows = memory.rollout.rows
    passes = math.ceil(gspo.prompts * gspo.group_size / gpus / rows) * lengths.answer
    cached = per_token * (rows / gspo.group_size * lengths.prompt + rows * lengths.answer / 2)
    decode = max(done.decode / rate, passes * (gspo.element * total + cached) / read)
    return Seconds(done.prefill / rate, decode, done.score / rate, update)


def _host(
    config: Any, gspo: Settings, lengths: Lengths, total: int, trained: int, gpus: int, assumed: Assumptions
) -> HostFootprint:
    """The memory of a node: the samples of a step, or of a batch of held-out questions, and the written checkpoint."""
    part = micro_batch_of(gspo, lengths, gpus)
    plan = plan_of(gspo, gpus, Loading(), 1)
    questions = max(math.ceil(gspo.prompts / gpus), BATCH)
    tokens = questions * lengths.prompt * gpus
    step = Share(tokens, round(lengths.pixels_of(tokens)), 0)
    made = host_footprint(
        config,
        plan,
        assumed.node,
        step,
        total,
        trained,
        cache=float(gspo.cache_mb << 20),
        pinned=math.ceil(part.tokens / gspo.sequence_parallel),
    )
    if gspo.offload_optimizer:  # fp32 weights, two moments and the gradients
        share = 16 * trained / gpus * min(assumed.node.ranks, gpus)
        made = dataclasses.replace(made, offload=made.offload + share)
    sample = (8 * 5 * step.tokens + 3 * config.vision_config.patch_size**2 * plan.pixel * step.patches) / gpus
    return dataclasses.replace(made, samples=min(assumed.node.ranks, gpus) * sample)
