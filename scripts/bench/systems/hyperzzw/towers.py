"""The tiny model with either mixer: the same data, steps and decoder; stills with corners and clips of two sizes."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from keye.evaluation import Question, evaluate
from keye.hyperzzw.mixer import SIDE, FrameGroups
from keye.model import flops
from keye.model.config import KeyeConfig
from keye.model.keye import KeyeForConditionalGeneration
from keye.model.vision import KeyeVisionModel
from keye.processor.processor import KeyeProcessor, Sample
from keye.processor.tokenizer import train_tokenizer
from keye.world import texts
from scripts.bench.places import HELDOUT, TRAIN, drawn, messages
from stages.data.collate import pack
from stages.optimizer import OptimizerConfig, build_optimizer

FAMILIES = {"image_place": 1.0, "motion": 2.0}
ARMS = {"attention": "attention", "convolution": "attention + convolution", "hyperzzw": "mixer"}
TOKENS, RATE = 2048, 2e-3


class AttentionAndConvolution(nn.Module):
    """A layer's attention, and beside it a depthwise convolution with the mixer's local window over each frame.

    The control for what the mixer has built in and attention must learn: which patches are neighbours.
    """

    def __init__(self, attention: nn.Module, width: int) -> None:
        super().__init__()
        self.attention = attention
        self.near = nn.Conv2d(width, width, SIDE, padding=SIDE // 2, groups=width, bias=False)
        self.groups = FrameGroups(())

    def forward(self, x: Tensor, *others: Any) -> Tensor:
        """x `[N, C]` of the frames in `groups`, and what the attention takes → `[N, C]`."""
        ordered = x if self.groups.order is None else x[self.groups.order]
        near = torch.cat([self.near(maps).permute(0, 2, 3, 1).flatten(0, 2) for maps in self.groups.maps(ordered)])
        return self.attention(x, *others) + (near if self.groups.back is None else near[self.groups.back])


def add_convolutions(tower: KeyeVisionModel) -> None:
    """Put a convolution beside the attention of each layer."""
    layers = tower.encoder.layers
    for layer in layers:
        layer.self_attn = AttentionAndConvolution(layer.self_attn, tower.config.hidden_size)
    encode = tower._encode

    def given(pixels: Tensor, grids: Tensor, *others: Any, **named: Any) -> Tensor:
        groups = FrameGroups.of(grids[:, 1:])
        for layer in layers:
            layer.self_attn.groups = groups
        return encode(pixels, grids, *others, **named)

    tower._encode = given


def new_processor() -> KeyeProcessor:
    """The tiny recipe's: slow frames of 16 tokens and fast ones of 4."""
    encoder = {
        "measure": "patch_l1", "threshold": 0.8, "fps": 2.0, "max_tokens": 512, "min_tokens_per_frame": 4,
        "max_tokens_per_frame": 16,
    }  # fmt: skip
    return KeyeProcessor(train_tokenizer(texts(0), 1024), encoder=encoder, image={"min_tokens": 4, "max_tokens": 16})


class Heldout:
    """Held-out questions in memory, the same for every run."""

    name = "SlowFastWorld"

    def __init__(self, number: int) -> None:
        drafts = [(f, i, drawn(f, HELDOUT, i)) for f in FAMILIES for i in range(number)]
        self.questions = [Question(f"{f}-{i}", f, messages(d), d.answer, d.options) for f, i, d in drafts]

    def __len__(self) -> int:
        return len(self.questions)

    def __iter__(self) -> Any:
        return iter(self.questions)


def frames_of(sample: Sample) -> list[tuple[int, int]]:
    """(height, width) in patches of every frame and still."""
    grids = [grid for grid in (sample.image_grid_thw, sample.video_grid_thw) if grid is not None]
    return [(int(row[1]), int(row[2])) for grid in grids for row in grid]


def new_model(arm: str, processor: KeyeProcessor, seed: int) -> KeyeForConditionalGeneration:
    """A new tiny model of an arm, a key of `ARMS`; the two arms with attention begin with the same weights."""
    torch.manual_seed(seed)
    mixer = "hyperzzw" if arm == "hyperzzw" else "attention"
    config = KeyeConfig.preset("tiny", {"mixer": mixer}, vocab_size=1024)
    model = KeyeForConditionalGeneration(processor.configure(config))
    if arm == "convolution":
        add_convolutions(model.visual)
    return model


def operations_of(arm: str, config: KeyeConfig, samples: list[Sample], labels: int) -> int:
    """Floating-point operations of a training step of an arm."""
    frames = [frame for sample in samples for frame in frames_of(sample)]
    found = flops.training_step(config, frames, [len(sample) for sample in samples], labels)
    if arm == "convolution":
        tower = config.vision_config
        patches = sum(height * width for height, width in frames)
        found += 3 * 2 * SIDE**2 * tower.hidden_size * patches * tower.num_hidden_layers
    return found


def run_of(arm: str, seed: int, marks: Sequence[int], questions: int) -> dict[str, Any]:
    """Train to the last of `marks` and evaluate after each: right answers of each family, CPU seconds, operations.

    Samples are those of the seed; all arms read the same ones in the same order. The learning rate is constant after
    the warm-up, so the model at a mark is that of a run that ends there.
    """
    processor = new_processor()
    model = new_model(arm, processor, seed)
    settings = OptimizerConfig(learning_rate=RATE, warmup=20, schedule="constant")
    optimizer, schedule = build_optimizer(model, settings, marks[-1])
    heldout = Heldout(questions)
    counts, spent = dict.fromkeys(FAMILIES, 1_000_000 * seed), dict.fromkeys(FAMILIES, 0.0)
    seconds, operations, found = 0.0, 0, []
    for step in range(1, marks[-1] + 1):
        samples = list[Sample]()
        while sum(map(len, samples)) < TOKENS:
            family = min(spent, key=lambda name: spent[name] / FAMILIES[name])
            draft = drawn(family, TRAIN, counts[family])
            samples.append(processor.sample([*messages(draft), {"role": "assistant", "content": draft.answer}]))
            counts[family] += 1
            spent[family] += len(samples[-1])
        batch = pack(samples, pad=processor.tokenizer.pad_token_id)
        operations += operations_of(arm, model.config, samples, int((batch["shift_labels"] != -100).sum()))
        began = time.process_time()
        loss = model.train()(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        seconds += time.process_time() - began
        if step in marks:
            right = {family: list[bool]() for family in FAMILIES}
            for answer in evaluate(model, processor, heldout, batch_size=25, max_new_tokens=26).outcomes:
                right[answer.family].append(bool(answer.correct))
            found.append(
                {"steps": step, "right": right, "seconds": seconds, "operations": operations, "loss": loss.item()}
            )
    return {"marks": found, "tower": sum(p.numel() for p in model.visual.parameters())}
