"""The content of one step: lengths of prompts and answers, as the recipes' budgets allow them, and the work on them.

Nobody has looked at the questions: what the recipes do not say is assumed here.
"""

import math
from dataclasses import dataclass
from typing import Any

from keye.model import flops
from rl.cost.settings import Settings
from stages.cost.work import kinds_of, largest_frame, square
from stages.recipe import Recipe


@dataclass(frozen=True)
class Lengths:
    """Tokens of prompts and answers.

    prompt, answer: of an average one. longest_prompt, longest_answer: any rank may get them in any step. visual: share
    of visual tokens in a prompt. patches: four for each visual token of an average frame. frame: patches of the largest
    frame or still. encoded: a frame's own patches over `patches`, see `stages.cost.work.Kind`.
    """

    prompt: int
    longest_prompt: int
    answer: int
    longest_answer: int
    visual: float
    patches: float
    frame: int
    encoded: float = 1.0

    def pixels_of(self, tokens: float) -> float:
        """Patches in prompts of so many tokens."""
        return 4 * self.visual * tokens * self.encoded

    def frames_of(self, tokens: float) -> list[tuple[int, int]]:
        """(height, width) in patches of the frames in a prompt of so many tokens."""
        return [square(self.patches * self.encoded)] * round(4 * self.visual * tokens / self.patches)


def lengths_of(gspo: Settings, pretrain: Recipe, prompt: int | None = None, answer: int | None = None) -> Lengths:
    """The lengths that a pre-training recipe's encoder and `[gspo]` allow.

    An average prompt has a clip of half of the encoder's budget (`stages.cost.work.kinds_of`), the longest one a clip
    of the budget, up to `gspo.max_prompt_tokens`. An average answer has half of `gspo.max_new_tokens`.

    Args:
        pretrain: the recipe whose model is tuned.
        prompt, answer: average tokens that are known, instead of the assumed ones.
    """
    name = list(pretrain.chain)[-1]
    stage = pretrain.chain[name]
    video = kinds_of(pretrain, stage)["video"]
    budget = {**pretrain.processor.encoder, **stage.encoder}.get("max_tokens", 75_000)
    mark = (video.tokens * (1 - video.visual)) / (video.tokens * video.visual)  # text for each visual token
    longest = math.ceil(budget * (1 + mark))
    limit = gspo.max_prompt_tokens or longest
    mean = min(round(video.tokens), limit) if prompt is None else prompt
    return Lengths(
        prompt=mean,
        longest_prompt=max(mean, min(longest, limit)) if prompt is None else max(mean, gspo.max_prompt_tokens),
        answer=max(1, gspo.max_new_tokens // 2) if answer is None else answer,
        longest_answer=gspo.max_new_tokens,
        visual=video.visual,
        patches=video.patches,
        frame=min(largest_frame(pretrain, stage) * stage.sequence_parallel, round(4 * limit * video.encoded)),
        encoded=video.encoded,
    )


@dataclass(frozen=True)
class Operations:
    """Operations of a step over all ranks: prompts read once, answers decoded, scored once, and the optimizer steps.

    update: without recomputation. again: recomputed layers and logits of the update.
    """

    prefill: float
    decode: float
    score: float
    update: float
    again: float

    @property
    def total(self) -> float:
        """Operations that are performed."""
        return self.prefill + self.decode + self.score + self.update + self.again


def pieces(gspo: Settings, lengths: Lengths) -> int:
    """Micro-batches that an average group is divided into; each reads the prompt."""
    room = gspo.micro_batch_tokens - lengths.prompt
    if not gspo.micro_batch_tokens or room >= gspo.group_size * lengths.answer:
        return 1
    return math.ceil(gspo.group_size / max(1, room // lengths.answer))


def operations(config: Any, gspo: Settings, lengths: Lengths) -> Operations:
    """The operations of a step on the GPUs of the training, every group with an advantage."""
    vision, text = config.vision_config, config.text_config
    groups, size, prompt, answer = gspo.prompts, gspo.group_size, lengths.prompt, lengths.answer
    frames = lengths.frames_of(prompt)
    patches = sum(height * width for height, width in frames)
    tower = flops.tower(vision, frames)
    projector = flops.projector(vision.hidden_size, text.hidden_size, patches)
    read = flops.decoder(text, [prompt])
    # An answer continues its prompt: its pairs are those of the sequence without those of the prompt.
    sequence = flops.decoder(text, [prompt + answer])
    answers = flops.Flops(size * (sequence.linear - read.linear), size * (sequence.quadratic - read.quadratic))
    logits = flops.head(text, size * answer)
    parts = pieces(gspo, lengths)
    prompts = tower.total + projector.total + read.total
    once = parts * prompts + answers.total + logits.total  # a forward pass over a group
    frozen = parts * tower.total if "visual" in gspo.freeze else 0.0
    update = flops.TRAINING * (once - frozen) + frozen
    again = logits.total  # the log-probabilities are computed in chunks, twice
    if gspo.checkpointing:
        again += once - frozen - logits.total
    return Operations(
        prefill=0.0 if gspo.served else groups * (prompts + flops.head(text, 1).total),
        decode=0.0 if gspo.served else groups * (answers.total + logits.total),
        score=groups * once,
        update=groups * update,
        again=groups * again,
    )
