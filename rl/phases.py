"""The phases of post-training in order: SFT, MPO, GSPO. Each starts with a model of the run and resumes by itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from keye.errors import RecipeError
from rl.preference.phase import release
from rl.preference.trainer import MpoTrainer
from rl.recipe import RlRecipe
from rl.sft import SftTrainer
from rl.trainer import GspoTrainer
from stages.run import write_report

Done = Callable[[str, dict[str, Any]], None]
TRAINERS: dict[str, Callable[[RlRecipe, Path], Any]] = {"sft": SftTrainer, "mpo": MpoTrainer, "gspo": GspoTrainer}


def post_train(
    recipe: RlRecipe,
    run: str | Path,
    only: str | None = None,
    done: Done | None = None,
) -> dict[str, dict[str, Any]]:
    """Run the phases of a recipe in the folder `run`; finished ones return their result, one that was begun resumes.

    `report.html` of the run is written after each phase, also after one that was stopped.

    Args:
        only: a phase to run instead of all. done: called on rank 0 after each phase with its name and its result.

    Returns:
        Phase → the content of its `eval.json`.

    Raises:
        KeyeError: a mistake that the user can correct; or SIGTERM, after a checkpoint.
    """
    if only is not None and only not in recipe.phases:
        raise RecipeError(f"the recipe has no phase {only}; it has {', '.join(recipe.phases)}")
    results = {}
    for name in recipe.phases:
        if only in (None, name):
            try:
                results[name] = TRAINERS[name](recipe, Path(run)).train()
            finally:
                if dist.get_rank() == 0 and (Path(run) / name / "metrics.jsonl").exists():
                    write_report(Path(run))
            release()
            if done is not None and dist.get_rank() == 0:
                done(name, results[name])
    return results
