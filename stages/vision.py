"""Stage 0, vision: the tower is trained on pairs of pictures and captions, with SigLIP's loss and a text tower.

A visual is a still or a complete clip (the patches of its frames are pooled together). Only this stage uses the text
tower and the pooling head: they are in its checkpoints, not in its model.

Every pair of a step is a negative of every other, so all pairs form one batch. `micro_pairs` limits how many pass
through the towers at the same time (GradCache, arXiv 2101.06983): a first pass without gradients computes all vectors,
the loss of the batch gives the gradient of each vector, and a second pass propagates these into the towers, micro-batch
by micro-batch. The loss and its gradients are those of one batch.
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
from stages.data.items import Item, count_thinned
from stages.data.loader import BatchStream, Loader
from stages.data.packing.balance import TowerCost, assign_parts
from stages.data.packing.mixture import Mixture
from stages.data.packing.packer import PairPacker
from stages.data.packing.planner import Planner
from stages.distributed.parallel import ParallelDims
from stages.losses import siglip_loss
from stages.recipe import VisionRecipe
from stages.stage import count_kinds, visual_samples


class Vision:
    """Stage 0."""

    name = "vision"
    parts = ("visual",)

    def __init__(self, recipe: VisionRecipe, processor: KeyeProcessor) -> None:
        self.recipe = recipe
        if recipe.text_model:
            self.captions = open_tokenizer(recipe.text_model)
            # SigLIP was trained on texts of one length, and reads their last token.
            self.length = contrast.text_config(recipe.text_model).max_position_embeddings
        else:
            # A copy: padding is a state of a fast tokenizer, which threads that encode samples change.
            self.captions, self.length = copy.deepcopy(processor.tokenizer), recipe.text_length

    def prepare(self, model: KeyeForConditionalGeneration) -> nn.Module:
        if self.recipe.text_model:
            module = contrast.siglip_text_tower(self.recipe.text_model, model.visual)
        else:
            module = contrast.random_text_tower(self.recipe, model.visual, self.captions)
        return module.requires_grad_(True)

    def loader(self, mixture: Mixture, grid: ParallelDims, model: KeyeForConditionalGeneration, workers: int) -> Loader:
        def assemble(items: list[Item]) -> dict[str, Any]:
            pixels, grids, owners = visual_samples([item.sample for item in items])
            batch = {"pixels": pixels, "grids": grids, "owners": owners}
            batch["captions"] = self.tokens([item.caption for item in items])
            return {**batch, "kinds": count_kinds(items), "thinned": count_thinned(items)}

        planner, parts = Planner(mixture, PairPacker(self.recipe.pairs)), self.recipe.micro_batches(grid.data_size)
        cost, assign = TowerCost(model.config.vision_config), partial(assign_parts, parts=parts)
        # A step takes all of its micro-batches first; they are made while the step before trains.
        return Loader(BatchStream(planner, cost, assign, assemble, grid, workers), grid, ahead=max(2, parts))

    def tokens(self, captions: list[str]) -> Tensor:
        """Token ids `[B, T]` of captions, truncated and padded to the text tower's length."""
        made = self.captions(
            captions, padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        )
        return made["input_ids"]

    def weight(self, batch: dict[str, Any], grid: ParallelDims) -> float:
        return len(batch["captions"]) / self.recipe.pairs

    def begin(self, module: nn.Module, batches: list[dict[str, Any]], grid: ParallelDims) -> None:
        """The first pass over a step of several micro-batches, which sets `cached` of each, see `loss`; collective."""
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
        """This rank's part of the loss of all pairs, divided evenly among its micro-batches.

        The value of a micro-batch is a constant share of the batch's loss. Its gradient is that of the batch's loss
        with respect to this micro-batch's vectors.
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
