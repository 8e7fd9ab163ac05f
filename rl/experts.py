"""Experts: models that GSPO trains on different families of questions, merged, and compared on held-out questions.

Each expert starts from the same model and trains on its families. Merged models are the plain average of the experts,
and the start model plus a factor times the sum of what each expert changed (task arithmetic), for several factors. All
of them, the start model included, answer the same held-out questions of all families with the same random numbers.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from keye.errors import RecipeError
from keye.files import write_atomically
from rl.phases import Done, post_train
from rl.preference.phase import HeldOutQuestions, find_start, finished, heldout_questions
from rl.questions.heldout import Answered, compare, summary
from rl.recipe import RlRecipe
from rl.run.agree import from_first
from rl.run.identity import check_finished, model_files
from stages.distributed.ranks import first_rank
from stages.distributed.weights import open_start
from stages.merge import merge


@dataclass(frozen=True)
class Expert:
    """An expert's name, which is that of its folder, and the families of its questions."""

    name: str
    families: tuple[str, ...]


def parse_experts(texts: Sequence[str]) -> list[Expert]:
    """`["time=when,order", "space=read"]` → experts.

    Raises:
        RecipeError: not NAME=FAMILY,…, fewer than two experts, or a name twice.
    """
    found = []
    for text in texts:
        name, equals, families = text.partition("=")
        listed = tuple(family.strip() for family in families.split(",") if family.strip())
        if not equals or not listed or not name.replace("-", "").replace("_", "").isalnum():
            raise RecipeError(f"--expert {text}: write NAME=FAMILY,FAMILY such as time=when,order")
        found.append(Expert(name, listed))
    if len(found) < 2 or len({expert.name for expert in found}) < len(found):
        raise RecipeError("give --expert two times or more, each with a name of its own")
    return found


def train_experts(
    recipe: RlRecipe,
    run: str | Path,
    experts: Sequence[Expert],
    factors: Sequence[float] = (0.5, 1.0),
    done: Done | None = None,
) -> dict[str, Any]:
    """Train experts in `<run>/experts/<name>`, merge them and compare all models; collective and resumable.

    A finished step is skipped while the models that it was made from are the same: an expert that is trained further is
    merged and measured again. `<run>/experts/experts.json` has the result.

    Args:
        recipe: with `[gspo]`; an expert replaces `gspo.families`.
        factors: of the sum of the experts' changes, above 0.
        done: called on rank 0 after each expert with its folder and the content of its `eval.json`.

    Returns:
        Model → its means with standard errors, of all questions and of each family; and for each but the start model
        the `gain` over it, paired by question, with its standard error.

    Raises:
        RecipeError: no `[gspo]`, or a factor that is not above 0.
        CheckpointError: the start model is missing, or an expert was begun with another recipe.
    """
    run, g = Path(run), recipe.gspo
    if g is None or not all(0 < factor < float("inf") for factor in factors):
        raise RecipeError("experts need the table [gspo] in the recipe and factors above 0")
    out = run / "experts"
    models: dict[str, Path] = {"start": find_start(run, g.start, "gspo").directory}
    for expert in experts:
        _train(recipe, run, out / expert.name, expert, done)
        models[expert.name] = out / expert.name / "gspo/model"
    trained = [models[expert.name] for expert in experts]
    models["average"] = _merged(trained, out / "average", None, None)
    for factor in factors:
        name = f"sum-{factor:g}"
        models[name] = _merged(trained, out / name, models["start"], [factor] * len(trained))
    return _compared(recipe, run, experts, models)


def _train(recipe: RlRecipe, run: Path, folder: Path, expert: Expert, done: Done | None) -> None:
    """Train an expert in `folder`, unless it is finished."""
    g = recipe.gspo
    own = replace(
        g,
        families=expert.families,
        start=os.path.relpath(run / g.start, folder),
        manifest=os.path.relpath(run / g.manifest, folder),
    )
    heldout = replace(recipe.heldout, manifest=os.path.relpath(run / recipe.heldout.manifest, folder))
    inner = replace(recipe, gspo=own, heldout=heldout, sft=None, mpo=None)
    result = finished(folder / "gspo")
    if result is not None and result["steps"] == g.steps:
        check_finished(folder, inner)
        return

    def report(_: str, result: dict[str, Any]) -> None:
        if done is not None:
            done(f"experts/{expert.name}/gspo", result)

    # The system follows `..` in a path only through folders that exist.
    first_rank(lambda: folder.mkdir(parents=True, exist_ok=True), OSError)
    post_train(inner, folder, "gspo", report)


def _merged(models: list[Path], out: Path, base: Path | None, weights: list[float] | None) -> Path:
    """The folder of a merged model, which rank 0 writes if it is not there or of other models."""

    def write() -> None:
        parts = [model_files(model) for model in (*models, *([base] if base else []))]
        record, now = out.with_name(f"{out.name}.models.json"), {"models": parts, "weights": weights}
        if (out / "config.json").is_file() and _recorded(record, now):
            return
        shutil.rmtree(out, ignore_errors=True)
        merge(models, out, weights, progress=False, base=base)
        write_atomically(record, json.dumps(now, indent=1) + "\n")

    first_rank(write, OSError)
    return out


def _recorded(record: Path, now: dict[str, Any]) -> bool:
    """Whether the file `record` has the content `now`."""
    try:
        return json.loads(record.read_text(encoding="utf-8")) == now
    except (OSError, ValueError):
        return False


def _compared(recipe: RlRecipe, run: Path, experts: Sequence[Expert], models: dict[str, Path]) -> dict[str, Any]:
    """The answers of all models to the held-out questions of all experts, compared with those of the start model."""
    g, out = recipe.gspo, run / "experts"
    families = tuple(dict.fromkeys(family for expert in experts for family in expert.families))
    questions = HeldOutQuestions(out, heldout_questions(recipe, run, families), recipe, g.max_new_tokens)
    rows: dict[str, list[Answered]] = {}
    how = {"heldout": questions.found.digest, "rewards": recipe.rewards, "seed": recipe.seed, "limit":
           recipe.heldout.limit, "samples": recipe.heldout.samples, "temperature": recipe.heldout.temperature,
           "families": families, "max_new_tokens": g.max_new_tokens, "sampling": recipe.rollout.sampling}  # fmt: skip
    for name, model in models.items():
        record, now = out / f"{name}.answers.json", json.loads(json.dumps(how | {"model": model_files(model)}))
        known = questions.known(name) if from_first(lambda record=record, now=now: _recorded(record, now)) else None
        if known is None:
            known = questions.measure(name, open_start(model), g.precision, g.decode_batch_size)
            first_rank(
                lambda record=record, now=now: write_atomically(record, json.dumps(now, indent=1) + "\n"), OSError
            )
        rows[name] = known
    results: dict[str, Any] = {}
    for name, answered in rows.items():
        results[name] = summary(answered)
        if name != "start":
            found = compare(rows["start"], answered)
            results[name] |= {key: found[key] for key in ("gain", "gain_stderr", "greedy_gain", "greedy_gain_stderr")}
    text = json.dumps(results, indent=1) + "\n"
    first_rank(lambda: write_atomically(out / "experts.json", text), OSError)
    return results


def table(results: dict[str, Any]) -> str:
    """The mean sampled reward of each model, of all questions and of each family, as lines."""
    families = list(results["start"]["families"])
    lines = [f"{'model':<16}{'all':>8}{'gain':>18}" + "".join(f"{family:>14}" for family in families)]
    for name, row in results.items():
        gain = f"{row['gain']:+.3f} ± {row['gain_stderr']:.3f}" if "gain" in row else "–"
        cells = "".join(f"{row['families'][family]['reward_mean']:>14.3f}" for family in families)
        lines.append(f"{name:<16}{row['reward_mean']:>8.3f}{gain:>18}{cells}")
    return "\n".join(lines)
