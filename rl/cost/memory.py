"""The memory of one rank in a step of GSPO by component, computed from shapes; nothing is built or run.

The update is that of a training step (`stages.cost.footprint`) over one micro-batch. The rollout has in addition the
keys and values: each prompt's once for its group (`rl.rollout.cache`), and each answer's own.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

from keye.model.heads import SCORE_CHUNK
from keye.model.vision import FRAME_PATCHES
from rl.cost.settings import Settings, lora_parameters
from rl.cost.work import Lengths
from rl.rollout.cache import room_for
from rl.rollout.inprocess import PREFILL_TOKENS
from rl.rollout.sampling import CHUNK as SAMPLED_ROWS
from stages.cost.footprint import CHANNELS, FP32, Footprint, Plan, Share, activations, reduced, states


@dataclass(frozen=True)
class MicroBatch:
    """The largest row of a forward and backward pass: tokens, those of them in answers, patches, and prompts.

    With `gspo.sequence_parallel` several ranks share it.
    """

    tokens: int
    labels: int
    patches: int
    prompts: int


@dataclass(frozen=True)
class RolloutMemory:
    """Bytes of a rank that only a rollout needs.

    cache: keys and values of prompts and answers in flight. prefill: the widest layer of a pass over prompts, without
    gradient. pixels: of these prompts. decoding: logits, and the widest layer, of a token for every answer in flight.
    gathered: weights that a rollout with ZeRO-3 gathers in addition to those of an update. rows: answers in flight.
    prompts: in flight.
    """

    cache: float
    prefill: float
    pixels: float
    decoding: float
    gathered: float
    rows: int
    prompts: int


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one rank in a step.

    update: as of a training step. rollout: None where other servers sample. reference: weights of the start model for
    the KL.
    """

    update: Footprint
    rollout: RolloutMemory | None
    reference: float = 0.0

    @property
    def components(self) -> dict[str, dict[str, float]]:
        """Time at which the memory may peak → component → bytes at that time."""
        u, r = self.update, self.rollout
        always = {"weights": u.weights + self.reference, "optimizer": u.optimizer}
        training = {**always, "pixels": u.pixels}
        sampling = {}
        if r is not None:
            rolling = {**always, "weights": always["weights"] + r.gathered, "kv cache": r.cache}
            sampling = {
                "while prompts are read": {**rolling, "pixels": r.pixels, "one layer": r.prefill},
                "while answers are decoded": {**rolling, "logits": r.decoding},
            }
        return {
            "at the start": {"weights": u.start + self.reference},
            **sampling,
            "at the loss": {**training, "gradients": u.before, "activations": u.activations, "logits": u.logits},
            "in the backward pass": {
                **training, "gradients": u.gradients, "buckets": u.buckets, "activations": u.activations,
                "one layer": u.layer,
            },
            "in the optimizer's step": {**training, "gradients": u.gradients, "step": u.step},
        }  # fmt: skip

    @property
    def moments(self) -> dict[str, float]:
        """Time at which the memory may peak → bytes at that time."""
        return {moment: sum(parts.values()) for moment, parts in self.components.items()}

    @property
    def peak(self) -> float:
        """The largest of the moments, in bytes."""
        return max(self.moments.values())

    @property
    def parts(self) -> dict[str, float]:
        """Component → bytes at the time of the peak; the sum is the peak."""
        moment = max(self.moments, key=self.moments.__getitem__)
        return {name: size for name, size in self.components[moment].items() if size}


@dataclass(frozen=True)
class Loading:
    """Options of the estimate that tests change. fused, buckets: as in `Plan`."""

    fused: bool = True
    buckets: int = 2
    pixel: int = 4  # samples are passed as floats (`PromptStream._encode`)


def plan_of(gspo: Settings, ranks: int, loading: Loading, micro_batches: int) -> Plan:
    """The training settings of a rank."""
    return Plan(
        gspo.element, gspo.zero, ranks, gspo.checkpointing, gspo.offload, gspo.mlp_tiles, fused=loading.fused,
        buckets=loading.buckets, pixel=loading.pixel, micro_batches=micro_batches,
    )  # fmt: skip


def micro_batch_of(gspo: Settings, lengths: Lengths, ranks: int) -> MicroBatch:
    """The largest row: longest prompts with longest answers, up to `gspo.micro_batch_tokens`.

    An answer whose prompt leaves no room for it has a micro-batch of its own (`rl.policy.microbatch`).
    """
    prompt, answer = lengths.longest_prompt, lengths.longest_answer
    group = prompt + gspo.group_size * answer
    groups = gspo.sequence_parallel * math.ceil(gspo.prompts / gspo.mini_batches / ranks)
    budget = gspo.micro_batch_tokens or groups * group
    if budget < group:
        answers = max(1, (budget - prompt) // answer)
        prompts = 1
    else:
        prompts = min(groups, budget // group)
        answers = prompts * gspo.group_size
    tokens = prompts * prompt + answers * answer
    return MicroBatch(tokens, answers * answer, round(lengths.pixels_of(prompts * prompt)), prompts)


def step_memory(
    config: Any, gspo: Settings, lengths: Lengths, ranks: int, counts: dict[str, int],
    loading: Loading | None = None,
) -> StepMemory:  # fmt: skip
    """The memory of a step on one of `ranks`.

    Args:
        counts: parameters, see `stages.cost.estimate.parameters_of`.

    Raises:
        KeyeError: not even one answer to the longest prompt fits into the cache.
    """
    loading = loading or Loading()
    part = micro_batch_of(gspo, lengths, ranks)
    total, trained = parameters_of_policy(config, gspo, counts)
    tokens = (
        gspo.sequence_parallel
        * math.ceil(gspo.prompts / gspo.mini_batches / ranks)
        * (lengths.longest_prompt + gspo.group_size * lengths.longest_answer)
    )
    plan = plan_of(gspo, ranks, loading, math.ceil(tokens / part.tokens))
    fixed = "visual" in gspo.freeze or gspo.lora_rank > 0
    update = _update(config, plan, part, gspo.sequence_parallel, lengths, total, trained, not fixed)
    if gspo.offload_optimizer:
        update = replace(update, optimizer=0.0, gradients=0.0, before=0.0, step=0.0)
    copied = gspo.kl and not gspo.lora_rank  # with LoRA the start model is the policy without LoRA's change
    reference = gspo.element * sum(counts.values()) if copied else 0.0
    return StepMemory(update, None if gspo.served else _rollout(config, gspo, plan, lengths, total), reference)


def parameters_of_policy(config: Any, gspo: Settings, counts: dict[str, int]) -> tuple[int, int]:
    """Parameters of the policy, and those of them that train: LoRA's, or those of the parts that are not frozen."""
    total = sum(counts.values())
    if gspo.lora_rank:
        own = lora_parameters(config.text_config, gspo.lora_rank)
        return total + own, own
    return total, sum(size for name, size in counts.items() if name not in gspo.freeze)


def _update(
    config: Any, plan: Plan, part: MicroBatch, sharing: int, lengths: Lengths, total: int, trained: int,
    tower_trains: bool,
) -> Footprint:  # fmt: skip
    text, e = config.text_config, plan.element
    share = share_of(part, sharing, lengths)
    kept, layer, _ = activations(config, plan, share, False, reduced(trained, plan), tower_trains)
    merged, again = _merged(text, plan, part)
    # A rank has its share of the heads for all tokens: as many numbers as all heads of its share of the tokens.
    kept, layer = kept + merged / sharing, layer + again / sharing
    head = text.vocab_size * text.hidden_size
    held = states(total, trained, plan, head)
    return Footprint(
        **held,
        before=held["gradients"] * (plan.micro_batches > 1),
        activations=kept,
        pixels=plan.pixel * CHANNELS * config.vision_config.patch_size**2 * share.patches,
        layer=layer,
        logits=_scored(text, e, share.labels),
    )


def share_of(part: MicroBatch, sharing: int, lengths: Lengths) -> Share:
    """The largest share of a row of one of the `sharing` ranks; the last ones have the answers of a single prompt."""
    frame = min(lengths.frame, part.patches)
    tokens = math.ceil(part.tokens / sharing)
    return Share(tokens, max(frame, math.ceil(part.patches / sharing)), min(tokens, part.labels), frame)


def _merged(text: Any, plan: Plan, part: MicroBatch) -> tuple[float, float]:
    """Bytes of the shared attention (`rl.policy.shared_attention`) besides attention: (kept, in a recomputed layer).

    The results for prompts and for answers are joined to one tensor. With recomputed layers, answers keep the result of
    each of two kernels.
    """
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    joined = plan.element * text.num_attention_heads * head * part.tokens
    if not plan.checkpointing:
        return joined * text.num_hidden_layers, 0.0
    second = (plan.element * head + FP32) * text.num_attention_heads * part.labels * text.num_hidden_layers
    return (0.0 if plan.offload else second), joined


def _scored(text: Any, element: int, labels: int) -> float:
    """Bytes of a chunk of log-probabilities: its logits, tables in fp32, and the gradient of the head's weight."""
    rows = min(SCORE_CHUNK, labels)
    tables = rows * text.vocab_size * (2 * element + 4 * FP32)
    head = element * text.vocab_size * text.hidden_size
    return tables + head * (2 if labels > rows else 1)


def _rollout(config: Any, gspo: Settings, plan: Plan, lengths: Lengths, total: int) -> RolloutMemory:
    text, e = config.text_config, plan.element
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    queries, keys = text.num_attention_heads * head, text.num_key_value_heads * head
    per_token = 2 * text.num_hidden_layers * keys * e
    own = math.ceil(gspo.prompts / plan.ranks)
    longest, new = lengths.longest_prompt, lengths.longest_answer
    wanted = min(gspo.decode_batch_size, own * gspo.group_size)
    room = room_for(longest, gspo.group_size, new, wanted, gspo.cache_bytes, per_token)
    prompts = min(own, max(1, room.prompt_tokens // longest), math.ceil(room.rows / gspo.group_size) + 1)
    cache = per_token * (prompts * longest + room.rows * new)
    passed = max(longest, min(PREFILL_TOKENS, prompts * longest))
    attention, mlp = e * (2 * queries + 3 * keys) + FP32 * queries, 3 * e * text.intermediate_size
    widest = 2 * e * text.hidden_size + max(attention, mlp)
    seen = e * text.hidden_size * lengths.visual * passed
    vision = config.vision_config
    tower = (
        e
        * (4 * vision.hidden_size + 2 * vision.intermediate_size)
        * max(min(FRAME_PATCHES, lengths.pixels_of(passed)), lengths.frame)
    )
    scores = 2 * FP32 * text.num_attention_heads * gspo.group_size * longest
    sampled = min(SAMPLED_ROWS, room.rows) * text.vocab_size * (4 * FP32 + 2 * 8)
    return RolloutMemory(
        cache=cache,
        prefill=seen + max(widest * passed, tower),
        pixels=plan.pixel * CHANNELS * vision.patch_size**2 * lengths.pixels_of(passed),
        decoding=2 * e * room.rows * text.vocab_size + max(sampled, scores, widest * room.rows),
        gathered=e * max(0.0, total - total / plan.ranks - plan.live) if plan.zero == 3 else 0.0,
        rows=room.rows,
        prompts=prompts,
    )
