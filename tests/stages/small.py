"""Shared parts of the tests of the stages: a processor, a model, a generated world, samples of a given length."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from keye.model.config import KeyeConfig
from keye.model.keye import KeyeForConditionalGeneration
from keye.processor.processor import KeyeProcessor, Sample
from keye.processor.tokenizer import train_tokenizer
from keye.world import generate
from stages.data.items import Cache, Item
from stages.data.quarantine import Quarantine
from stages.data.sources.source import Source
from stages.distributed.checkpoints import checkpoints, validate_checkpoint
from stages.distributed.engine import master_weight
from stages.optimizer import OptimizerConfig
from stages.recipe import SourceRecipe

WORDS = ["user assistant how many flashes which colour came first red green blue day night 0123456789"] * 4
ENCODER = {"max_tokens": 32, "min_tokens_per_frame": 1, "max_tokens_per_frame": 4, "fps": 2.0}


def processor() -> KeyeProcessor:
    return KeyeProcessor(train_tokenizer(WORDS, 400), encoder=ENCODER, image={"min_tokens": 1, "max_tokens": 4})


def model(made_for: KeyeProcessor | None = None, seed: int = 0, **text: Any) -> KeyeForConditionalGeneration:
    """A tiny Keye of two decoder layers and one of the tower; ids of the placeholders 1 and 2 without a processor."""
    torch.manual_seed(seed)
    vocabulary = 64 if made_for is None else len(made_for.tokenizer)
    config = KeyeConfig.preset("tiny", vocab_size=vocabulary, num_hidden_layers=2, **text)
    config.vision_config.num_hidden_layers = 1
    config.image_token_id, config.video_token_id = 1, 2
    return KeyeForConditionalGeneration(config if made_for is None else made_for.configure(config))


def world(folder: Path) -> Path:
    """The manifest of a generated world: four samples each of video, image and text."""
    counts = {"count": 4, "image_read": 4, "text": 4}
    generate(folder, "train", counts=counts, seed=0, size=(56, 84), duration=3.0)
    return folder / "train.jsonl"


def source(
    manifest: Path, kind: str, made_for: KeyeProcessor, quarantine: Quarantine | None = None, **more: Any
) -> Source:
    quarantine = Quarantine() if quarantine is None else quarantine
    return Source(SourceRecipe(str(manifest), kind), made_for, 0, Cache(1 << 24), quarantine, **more)


def lines(manifest: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in manifest.read_text().splitlines()]


def text_sample(length: int, first: int = 3) -> Sample:
    """`length` tokens counting up from `first`; every one is a label."""
    ids = torch.arange(first, first + length)
    return Sample(input_ids=ids, labels=ids.clone(), position_ids=torch.arange(length).expand(3, -1))


class Lengths:
    """A source of text samples of the given lengths, repeated; replaces one of `stages.data.sources.source`.

    A length of 0 is a bad sample. seen: indices encoded here.
    """

    def __init__(self, name: str, kind: str, lengths: list[int]) -> None:
        self.name, self.lengths, self.at = name, lengths, 0
        self.recipe = SimpleNamespace(kind=kind)
        self.seen: list[int] = []
        self.bad: dict[int, str] = {}
        self.mark = {"rows": len(lengths)}

    def draw_many(self, count: int) -> np.ndarray:
        self.at += count
        return np.arange(self.at - count, self.at)

    def owners(self, indices: np.ndarray, ranks: int) -> np.ndarray:
        return indices % ranks

    def items(self, index: int) -> list[Item]:
        self.seen.append(index)
        length = self.lengths[index % len(self.lengths)]
        return [Item(text_sample(length), self.name, index, self.recipe.kind, "")] if length else []

    def results(self, good: np.ndarray, causes: dict[int, str]) -> None:
        """Never gives up."""

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


def optimizer(learning_rate: float, **more: Any) -> OptimizerConfig:
    """At a constant learning rate."""
    return OptimizerConfig(learning_rate=learning_rate, schedule="constant", **more)


def complete_checkpoints(directory: Path) -> list[Path]:
    """Checkpoints under `directory` that are complete and unchanged, oldest first."""
    return [path for path in checkpoints(directory) if validate_checkpoint(path) is None]


def master_weights(model: nn.Module) -> dict[str, Tensor]:
    """The fp32 values of an engine's model, on the CPU of every rank; collective."""
    parameters = model.named_parameters(remove_duplicate=False)
    return {name: master_weight(parameter).clone() for name, parameter in parameters}
