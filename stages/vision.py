"""Stage 0, vision: the tower learns to tell what its frames show, by SigLIP's loss against a text tower.

A visual is a still or a whole clip (its frames' patches pooled together). The text tower and the pooling serve this
stage alone: they are in its checkpoints, not in its model.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import SiglipTextConfig, SiglipTextModel

from keye.model.keye import KeyeForConditionalGeneration
from keye.model.vision import KeyeVisionModel
from keye.prompt.processor import KeyeProcessor
from stages.data.balance import TowerCost, deal_sums
from stages.data.feed import Feed
from stages.data.forming import Pairs
from stages.data.items import Item
from stages.data.loader import Loader
from stages.data.mixture import Mixture
from stages.data.planner import Planner
from stages.data.thinned import count_thinned
from stages.losses import siglip_loss
from stages.parallel import Grid
from stages.recipe import VisionRecipe
from stages.stage import count_kinds, visual_samples


class Pooling(nn.Module):
    """Attention pooling with one learned query a head over the patches of each visual."""

    def __init__(self, width: int, out: int, heads: int = 4) -> None:
        super().__init__()
        self.score, self.value, self.out = nn.Linear(width, heads), nn.Linear(width, out), nn.Linear(out, out)
        self.heads = heads

    def forward(self, features: Tensor, owner: Tensor, count: int) -> Tensor:
        """features `[N, width]`, owner `[N]` → `[count, out]`."""
        scores = self.score(features).float()
        index = owner[:, None].expand_as(scores)
        top = scores.new_full((count, self.heads), -torch.inf).scatter_reduce(0, index, scores.detach(), "amax")
        weights = (scores - top[owner]).exp()
        total = weights.new_zeros(count, self.heads).index_add(0, owner, weights)
        values = self.value(features).unflatten(-1, (self.heads, -1)) * weights[..., None].to(features.dtype)
        pooled = values.new_zeros(count, *values.shape[1:]).index_add(0, owner, values)
        return self.out((pooled / total[..., None].to(values.dtype)).flatten(1))


class Contrast(nn.Module):
    """Vision tower + pooling against a SigLIP text tower; forward gives this rank's part of the loss."""

    def __init__(self, visual: KeyeVisionModel, text: SiglipTextModel) -> None:
        super().__init__()
        self.visual, self.text = visual, text
        self.pool = Pooling(visual.config.hidden_size, text.config.projection_size)
        # SigLIP's start: log 10 and -10, so that the many negatives cost little at first.
        self.scale, self.bias = nn.Parameter(torch.tensor([10.0]).log()), nn.Parameter(torch.tensor([-10.0]))

    def forward(self, pixels: Tensor, grids: Tensor, owners: Tensor, captions: Tensor) -> Tensor:
        """pixels `[N, 3, 14, 14]` bytes or floats, grids `[F, 3]`, owners `[F]` pairs of frames, captions `[B, T]`."""
        features = self.visual(pixels, grids)
        pooled = self.pool(features, owners.repeat_interleave(grids.prod(1)), len(captions))
        words = self.text(input_ids=captions).pooler_output
        return siglip_loss(F.normalize(pooled, dim=-1), F.normalize(words, dim=-1), captions, self.scale, self.bias)


class Vision:
    """See the module's docstring."""

    name = "vision"
    parts = ("visual",)

    def __init__(self, recipe: VisionRecipe, processor: KeyeProcessor) -> None:
        self.recipe, self.processor = recipe, processor
        # Padding is a state of a fast tokenizer, which threads that encode samples meanwhile would take away.
        self.captions = copy.deepcopy(processor.tokenizer)

    def prepare(self, model: KeyeForConditionalGeneration) -> nn.Module:
        if self.recipe.text_model:
            text = SiglipTextModel.from_pretrained(self.recipe.text_model)
        else:
            width = self.recipe.text_width
            text = SiglipTextModel(
                SiglipTextConfig(
                    vocab_size=len(self.processor.tokenizer),
                    hidden_size=width,
                    intermediate_size=4 * width,
                    num_hidden_layers=self.recipe.text_layers,
                    num_attention_heads=self.recipe.text_heads,
                    max_position_embeddings=self.recipe.text_length,
                    projection_size=width,
                    bos_token_id=None,
                    eos_token_id=self.processor.tokenizer.eos_token_id,
                    pad_token_id=self.processor.tokenizer.pad_token_id,
                )
            )
        return Contrast(model.visual, text).requires_grad_(True)

    def loader(self, mixture: Mixture, grid: Grid, model: KeyeForConditionalGeneration, workers: int) -> Loader:
        def assemble(items: list[Item]) -> dict[str, Any]:
            pixels, grids, owners = visual_samples([item.sample for item in items])
            captions = self.captions(
                [item.caption for item in items],
                padding="max_length", truncation=True, max_length=self.recipe.text_length, return_tensors="pt",
            )["input_ids"]  # fmt: skip
            batch = {"pixels": pixels, "grids": grids, "owners": owners, "captions": captions}
            return {**batch, "kinds": count_kinds(items), "thinned": count_thinned(items)}

        planner = Planner(mixture, Pairs(self.recipe.pairs))
        return Loader(Feed(planner, TowerCost(model.config.vision_config), deal_sums, assemble, grid, workers), grid)

    def weight(self, batch: dict[str, Any], grid: Grid) -> float:
        return 1.0 / grid.world

    def loss(self, module: nn.Module, batch: dict[str, Any], grid: Grid) -> Tensor:
        return module(batch["pixels"], batch["grids"], batch["owners"], batch["captions"])
