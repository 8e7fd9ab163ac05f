"""Stage 0, vision: the tower learns to tell what its frames show, by SigLIP's loss against a text tower.

A visual is a still or a whole clip (its frames' patches pooled together). The text tower and the pooling head serve
this stage alone: they are in its checkpoints, not in its model.

Every pair of a step is a negative of every other, so that all of them are one batch. `micro_pairs` bounds how many go
through the towers at once (GradCache, arXiv 2101.06983): a first pass without gradients makes all vectors, the loss of
the whole batch gives the gradient of each vector, and a second pass carries these into the towers, micro-batch by
micro-batch. The loss and its gradients are those of one batch.
"""

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from keye.model.keye import KeyeForConditionalGeneration
from keye.processor.processor import KeyeProcessor
from keye.processor.tokenizer import open_tokenizer
from stages import contrastive as contrast
from stages.data.batches import BatchStream
from stages.data.items import Item
from stages.data.loader import Loader
from stages.data.packing.balance import TowerCost, deal_parts
from stages.data.packing.mixture import Mixture
from stages.data.packing.packer import PairPacker
from stages.data.packing.planner import Planner
from stages.data.thinned import count_thinned
from stages.distributed.parallel import ParallelDims
from stages.losses import siglip_loss
from stages.recipe import VisionRecipe
from stages.stage import count_kinds, visual_samples


class Vision:
    """See the module's docstring."""

    name = "vision"
    parts = ("visual",)

    def __init__(self, recipe: VisionRecipe, processor: KeyeProcessor) -> None:
        self.recipe = recipe
        if recipe.text_model:
            self.captions = open_tokenizer(recipe.text_model)
            # SigLIP knows texts of one length alone, and reads the last token of them.
            self.length = contrast.text_config(recipe.text_model).max_position_embeddings
        else:
            # Padding is a state of a fast tokenizer, which threads that encode samples meanwhile would take away.
            self.captions, self.length = copy.deepcopy(processor.tokenizer), recipe.text_length

    def prepare(self, model: KeyeForConditionalGeneration) -> nn.Module:
        if self.recipe.text_model:
            module = contrast.pretrained(self.recipe.text_model, model.visual)
        else:
            module = contrast.fresh(self.recipe, model.visual, self.captions)
        return module.requires_grad_(True)

    def loader(self, mixture: Mixture, grid: ParallelDims, model: KeyeForConditionalGeneration, workers: int) -> Loader:
        def assemble(items: list[Item]) -> dict[str, Any]:
            pixels, grids, owners = visual_samples([item.sample for item in items])
            batch = {"pixels": pixels, "grids": grids, "owners": owners}
            batch["captions"] = self.tokens([item.caption for item in items])
            return {**batch, "kinds": count_kinds(items), "thinned": count_thinned(items)}

        planner, parts = Planner(mixture, PairPacker(self.recipe.pairs)), self.recipe.micro_batches(grid.data_size)
        cost, deal = TowerCost(model.config.vision_config), partial(deal_parts, parts=parts)
        # A step's micro-batches are asked for at once; all of them are made while the step before trains.
        return Loader(BatchStream(planner, cost, deal, assemble, grid, workers), grid, ahead=max(2, parts))

    def tokens(self, captions: list[str]) -> Tensor:
        """Token ids `[B, T]` of captions, cut and padded to the text tower's length."""
        made = self.captions(
            captions, padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        )
        return made["input_ids"]

    def weight(self, batch: dict[str, Any], grid: ParallelDims) -> float:
        return len(batch["captions"]) / self.recipe.pairs

    def begin(self, module: nn.Module, batches: list[dict[str, Any]], grid: ParallelDims) -> None:
        """The first pass over a step of several micro-batches: `cached` of each, see `loss`. Collective."""
        if len(batches) == 1:
            return
        with torch.no_grad():
            passes = [_vectors(module, batch) for batch in batches]
        vision, text = (torch.cat(vectors).requires_grad_() for vectors in list(zip(*passes, strict=True))[:2])
        scale, bias = (value.clone().requires_grad_() for value in passes[0][2:])
        captions = torch.cat([batch["captions"] for batch in batches])
        loss = siglip_loss(vision, text, captions, scale, bias)
        gradients = torch.autograd.grad(loss, (vision, text, scale, bias))
        sizes = [len(batch["captions"]) for batch in batches]
        parts = zip(gradients[0].split(sizes), gradients[1].split(sizes), strict=True)
        for batch, part in zip(batches, parts, strict=True):
            shared = (loss.detach(), *gradients[2:])
            value, *rest = (x / len(batches) for x in shared)
            batch["cached"] = value, (*part, *rest)

    def loss(self, module: nn.Module, batch: dict[str, Any], grid: ParallelDims) -> Tensor:
        """This rank's part of the loss of all pairs; of a micro-batch the same share of it each.

        A micro-batch's value is not what it is a function of: its gradient is that of the whole batch's loss with
        respect to this micro-batch's vectors.
        """
        vectors = _vectors(module, batch)
        if "cached" not in batch:
            vision, text, scale, bias = vectors
            return siglip_loss(vision, text, batch["captions"], scale, bias)
        value, gradients = batch["cached"]
        inner = sum((vector * gradient).sum() for vector, gradient in zip(vectors, gradients, strict=True))
        return inner + (value - inner.detach())


def _vectors(module: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, ...]:
    return module(batch["pixels"], batch["grids"], batch["owners"], batch["captions"])
