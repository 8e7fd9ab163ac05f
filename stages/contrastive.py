"""The module of stage 0: the vision tower with a pooling head, and a text tower, random or from a SigLIP."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, SiglipTextConfig, SiglipTextModel

from keye.checkpoint.shards import Stored, open_checkpoint
from keye.errors import CheckpointError
from keye.model.heads import PoolingHead
from keye.model.vision import KeyeVisionModel
from stages.recipe import VisionRecipe

# Start values of SigLIP's loss, with which the many negatives have a small loss at first (arXiv 2303.15343).
SCALE, BIAS = math.log(10), -10.0
HEAD, TEXT = "vision_model.head.", "text_model."


class Contrast(nn.Module):
    """Vision tower with pooling head, and a SigLIP text tower; forward returns the vectors of pairs.

    Args:
        visual, text: the towers; the text tower projects to the vision tower's width.
        scale, bias: start values of the log temperature and the bias of the logits.
    """

    def __init__(
        self, visual: KeyeVisionModel, text: SiglipTextModel, scale: float = SCALE, bias: float = BIAS
    ) -> None:
        super().__init__()
        self.visual, self.text = visual, text
        self.head = PoolingHead(visual.config)
        # The parameters are differences from the start values: near -10, bf16 has steps of 1/16.
        self.start = scale, bias
        self.scale, self.bias = (nn.Parameter(torch.zeros(1)) for _ in range(2))

    def forward(
        self, pixels: Tensor, grids: Tensor, owners: Tensor, captions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The vectors of some pairs, all fp32.

        Args:
            pixels: `[N, 3, P, P]` bytes or floats. grids: `[F, 3]` of stills and frames. owners: `[F]` their pairs.
            captions: `[B, T]` token ids, padded.

        Returns:
            Unit vectors of the visuals and of the captions `[B, width]`; log temperature and bias of the logits `[1]`.
        """
        features = self.visual(pixels, grids)
        patches = owners.repeat_interleave(grids.prod(1), output_size=len(features))
        seen = self.head(features, patches, len(captions)).float()
        words = self.text(input_ids=captions).pooler_output.float()
        scale, bias = (start + x.float() for start, x in zip(self.start, (self.scale, self.bias), strict=True))
        return F.normalize(seen, dim=-1), F.normalize(words, dim=-1), scale, bias


def random_text_tower(recipe: VisionRecipe, visual: KeyeVisionModel, tokenizer: PreTrainedTokenizerBase) -> Contrast:
    """A text tower of the recipe's sizes for Keye's own tokenizer, and a pooling head, both drawn at random."""
    config = SiglipTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.text_width,
        intermediate_size=4 * recipe.text_width,
        num_hidden_layers=recipe.text_layers,
        num_attention_heads=recipe.text_heads,
        max_position_embeddings=recipe.text_length,
        projection_size=visual.config.hidden_size,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Contrast(visual, SiglipTextModel(config))


def text_config(directory: str | Path) -> SiglipTextConfig:
    """The config of a SigLIP's text tower.

    Raises:
        CheckpointError: the directory has no SigLIP with a text tower.
    """
    path = Path(directory)
    if not (path / "config.json").is_file():
        raise CheckpointError(
            f"{path}: no config.json of a SigLIP; name the directory of one in vision.text_model, or give "
            "--set vision.text_model= for a text tower that is drawn at random"
        )
    config = SiglipTextConfig.from_pretrained(path)
    if config.model_type != "siglip_text_model":
        raise CheckpointError(f"{path}: {config.model_type} is not a SigLIP with a text tower; name another")
    return config


def siglip_text_tower(directory: str | Path, visual: KeyeVisionModel) -> Contrast:
    """The text tower, the pooling head, the temperature and the bias of a SigLIP, in float32.

    The directory of a text model has no head: the head is then random, and temperature and bias have their start
    values. The vision tower is not changed: it comes from the same SigLIP (`keye.checkpoint.initialise`) or was trained
    further.

    Raises:
        CheckpointError: the directory has no SigLIP, or one that does not fit the vision tower.
    """
    config, stored = text_config(directory), open_checkpoint(directory)
    width = visual.config.hidden_size
    if config.projection_size != width:
        raise CheckpointError(
            f"{directory}: its text tower projects to {config.projection_size} values and the vision tower is {width} "
            "wide; name the SigLIP that the tower came from in vision.text_model"
        )
    start = [stored[n].read().item() if n in stored else value for n, value in _START.items()]
    module = Contrast(visual, SiglipTextModel(config), *start)
    text = {name.removeprefix(TEXT): tensor for name, tensor in stored.items() if not name.startswith("vision_model.")}
    _fill(module.text, {name: tensor.read() for name, tensor in text.items() if tensor.dtype is not None}, directory)
    if any(name.startswith(HEAD) for name in stored):
        _fill(module.head, _head(stored), directory)
    return module


_START = {"logit_scale": SCALE, "logit_bias": BIAS}


def _head(stored: Mapping[str, Stored]) -> dict[str, Tensor]:
    """SigLIP's pooling head with the names of ours: its joined query, key and value projections are split."""
    found = {name.removeprefix(HEAD): tensor.read() for name, tensor in stored.items() if name.startswith(HEAD)}
    for kind in ("weight", "bias"):
        joined = found.pop(f"attention.in_proj_{kind}", None)
        if joined is not None:
            found |= {f"{part}_proj.{kind}": value for part, value in zip("qkv", joined.chunk(3), strict=True)}
    return {name.removeprefix("attention."): value for name, value in found.items()}


def _fill(module: nn.Module, found: Mapping[str, Tensor], directory: str | Path) -> None:
    """Copy every parameter of `module` from `found`, which may have more.

    Raises:
        CheckpointError: one is missing or of another shape.
    """
    for name, parameter in module.named_parameters():
        value = found.get(name)
        if value is None or value.shape != parameter.shape:
            fault = "is missing" if value is None else f"has the shape {list(value.shape)}, not {list(parameter.shape)}"
            raise CheckpointError(f"{directory}: {name} {fault}; name the SigLIP that the vision tower came from")
        with torch.no_grad():
            parameter.copy_(value)
