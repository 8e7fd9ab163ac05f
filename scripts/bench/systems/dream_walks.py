"""The walks of the study of SlowFast-VGen: trained models, arms, and their measures on walks that return."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from keye.dream.episode import Episode, FastSettings
from keye.dream.model import DreamModel
from keye.dream.scenes import CHUNK, circling_walk, returning_walk
from keye.dream.scenes import Path as Walk
from stages.dream.loop import loop
from stages.dream.recipe import DreamRecipe
from stages.dream.slow import train
from stages.dream.walk import measures

ARMS = {
    "no memory": "none",
    "temporary LoRA": "temporary",
    "text-style original": "text",
    "whole past": "past",
    "both directions (ours)": "both",
    "temporary LoRA of another walk": "temporary",
    "copy last frame": "none",
}
"""Arm → form of the write."""
LOOPED = {"no loop": None, "same steps without memory": False, "loop": True}
"""Model → loop.memory, None: the model of the slow stage."""


def draw_walks(seed: int, count: int) -> list[Walk]:
    """Walks that no training and no choice of settings has drawn: half return the same way, half circle."""
    rng = np.random.default_rng([seed, 77])
    return [circling_walk(rng) if index % 2 else returning_walk(rng) for index in range(count)]


def walk_arm(
    model: DreamModel, walks: Sequence[Walk], arm: str, fast: FastSettings, seed: int, watched: bool = True
) -> list[dict[str, float]]:
    """Measures of each walk.

    Args:
        watched: the way out is seen; otherwise all but the first frame is dreamed, and there is no truth to compare.
    """
    settings = dataclasses.replace(fast, write=ARMS[arm])
    found = []
    for index, walk in enumerate(walks):
        walk = walk if watched else dataclasses.replace(walk, outward=0)
        began = time.process_time()
        frames = dream_frames(model, walk, walks[(index + 2) % len(walks)], arm, settings, seed * 1000 + index)
        found.append({**measures(walk, frames, settings.past), "seconds": time.process_time() - began})
    return found


def dream_frames(
    model: DreamModel, walk: Walk, other: Walk, arm: str, settings: FastSettings, seed: int
) -> torch.Tensor:
    """The frames of one walk under one arm. other: the walk whose way out another walk's memory is written with."""
    truth, begin = walk.frames, 1 + walk.outward * CHUNK
    if arm == "copy last frame":
        return torch.cat([truth[:begin], truth[begin - 1 : begin].expand(len(truth) - begin, -1, -1, -1)])
    source = other if arm == "temporary LoRA of another walk" else walk
    with Episode(model, source.frames[:1], settings, seed) as episode:
        for chunk in range(source.outward if walk.outward else 0):
            start = 1 + chunk * CHUNK
            episode.watch(source.frames[start : start + CHUNK], source.actions[chunk])
        if source is other:  # the memory stays, the context becomes that of the walk
            actions = [action for action in walk.actions[: walk.outward] for _ in range(CHUNK)]
            episode.frames, episode.actions = truth[:begin], [episode.actions[0], *actions]
            episode.edges = [0, *range(1, begin + 1, CHUNK)]
        for action in walk.actions[walk.outward :]:
            episode.dream(action)
        return episode.frames


def trained_model(recipe: DreamRecipe, folder: Path, kind: str) -> DreamModel:
    """The model of the slow stage, or one of `LOOPED` that continues from it; finished or begun work is resumed."""
    model = train(recipe, folder / "slow")
    if LOOPED[kind] is None:
        return model
    recipe = dataclasses.replace(recipe, loop=dataclasses.replace(recipe.loop, memory=LOOPED[kind]))
    return loop(model, recipe, folder / kind.replace(" ", "_"))
