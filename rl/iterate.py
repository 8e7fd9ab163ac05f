"""Iteration (report: RL → better cold start → RL): rounds of rejection sampling, SFT and RL, in one resumable call.

A round has four steps, in the folder `<run>/rounds/<number>`:

1. `cold.jsonl`: the policy answers the cold-start questions; the right answer with the highest reward is kept.
2. `sft`: the model that the recipe's `[sft]` starts from is tuned on these chats.
3. `rl.jsonl`: the tuned model answers the RL questions; those with 0 < accuracy < 1 are kept.
4. `gspo`: RL on these questions, from the tuned model. Its model is the policy of the next round.

A step that is finished is skipped. Sampled answers are kept in a journal, training resumes from its checkpoints, and
files appear only when they are complete, so a run that was killed continues at the same place.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from keye.errors import CheckpointError, ManifestError, RecipeError
from keye.files import write_atomically
from rl.phases import Done, post_train
from rl.preference.answers import Answers, Draw, Journal, Sampled, draw_all
from rl.preference.phase import finished
from rl.preference.selecting import Kept, best_answers, filter_questions
from rl.questions.prompts import load_prompts
from rl.recipe import RlRecipe
from rl.run.agree import agree, from_first
from rl.run.identity import check_finished
from stages.distributed.ranks import first_rank
from stages.distributed.weights import open_start

Select = Callable[[Path, Any, Path], dict[str, int]]
"""(manifest, its answers, file to write) → counts."""


@dataclass(frozen=True)
class Rounds:
    """What the rounds sample.

    number: of rounds. first: phase of the run whose model samples the first cold start. cold: the cold-start questions,
    relative to the run's folder; empty: those of `gspo.manifest`. samples: answers to each question. limit: questions
    of each manifest at most, 0 = all. temperature: of sampling.
    """

    number: int = 2
    first: str = "gspo"
    cold: str = ""
    samples: int = 8
    limit: int = 0
    temperature: float = 1.0


def iterate(recipe: RlRecipe, run: str | Path, rounds: Rounds, done: Done | None = None) -> list[dict[str, Any]]:
    """Run the rounds in the folder `run`; collective, on any number of processes.

    Args:
        recipe: with `[sft]` and `[gspo]`; `[sft].data` gives the settings of the data, and its one source the kind.
        done: called on rank 0 after each phase with its name, such as "rounds/1/gspo", and its result.

    Returns:
        For each round: `round`, the counts `cold` and `rl`, and the `eval.json` of `sft` and `gspo`. The same is in
        `<run>/rounds/rounds.json`.

    Raises:
        RecipeError: the recipe has not both tables, or not one source of data.
        CheckpointError: the model to start from is missing, or a step was begun with other settings.
        ManifestError: no answer of a step can be used.
    """
    run = Path(run)
    _check(recipe, rounds)
    results: list[dict[str, Any]] = []
    policy = run / rounds.first / "model"
    for number in range(1, rounds.number + 1):
        folder = run / "rounds" / str(number)
        results.append(_round(number, recipe, run, folder, policy, rounds, done))
        policy = folder / "gspo/model"
        text = json.dumps(results, indent=1) + "\n"
        first_rank(lambda text=text: write_atomically(run / "rounds/rounds.json", text), OSError)
    return results


def _check(recipe: RlRecipe, rounds: Rounds) -> None:
    if recipe.sft is None or recipe.gspo is None:
        raise RecipeError("iteration needs the tables [sft] and [gspo]; add the missing one to the recipe")
    if "accuracy" not in recipe.rewards:
        raise RecipeError(
            "iteration keeps questions by their share of right answers; add accuracy = 1.0 to [rewards], or "
            "accuracy = 0.0 to judge without rewarding it"
        )
    if len(recipe.sft.data.sources) != 1:
        raise RecipeError("iteration needs one source in sft.data.sources, for the kind of its data; keep one")
    if rounds.number < 1 or rounds.samples < 2 or rounds.limit < 0 or rounds.temperature <= 0:
        raise RecipeError("iteration needs rounds ≥ 1, samples ≥ 2, limit ≥ 0 and a temperature above 0")


def _round(
    number: int, recipe: RlRecipe, run: Path, folder: Path, policy: Path, rounds: Rounds, done: Done | None
) -> dict[str, Any]:
    """One round, with the model `policy` that samples the cold start."""
    inner = recipe_of_round(recipe, run, folder)

    def report(name: str, result: dict[str, Any]) -> None:
        if done is not None:
            done(f"rounds/{number}/{name}", result)

    cold = run / (rounds.cold or recipe.gspo.manifest)
    counts = {"cold": _step(recipe, rounds, cold, policy, folder / "cold.jsonl", best_answers, number)}
    tuned = post_train(inner, folder, "sft", report)["sft"]
    questions, kept = run / recipe.gspo.manifest, Kept(0.5 / rounds.samples, 1 - 0.5 / rounds.samples)

    def select(manifest: Path, answered: Any, out: Path) -> dict[str, int]:
        return filter_questions(manifest, answered, out, kept)

    counts["rl"] = _step(recipe, rounds, questions, folder / "sft/model", folder / "rl.jsonl", select, number)
    trained = finished(folder / "gspo")
    if trained is None or trained["steps"] != recipe.gspo.steps:
        trained = post_train(inner, folder, "gspo", report)["gspo"]
    else:
        check_finished(folder, inner)
    return {"round": number, **counts, "sft": tuned, "gspo": trained}


def recipe_of_round(recipe: RlRecipe, run: Path, folder: Path) -> RlRecipe:
    """The recipe of a round in `folder`: without MPO, with the round's own data and the run's start model.

    Paths are relative to the round's folder, so that a run can be moved.
    """
    [source] = recipe.sft.data.sources
    source = replace(source, path="{run}/cold.jsonl", families=())
    sft = replace(
        recipe.sft,
        data=replace(recipe.sft.data, sources=(source,)),
        start=os.path.relpath(run / recipe.sft.start, folder),
    )
    return replace(
        recipe,
        sft=sft,
        mpo=None,
        gspo=replace(recipe.gspo, start="sft", manifest="rl.jsonl"),
        heldout=replace(recipe.heldout, manifest=os.path.relpath(run / recipe.heldout.manifest, folder)),
    )


def _step(
    recipe: RlRecipe, rounds: Rounds, manifest: Path, model: Path, out: Path, select: Select, seed: int
) -> dict[str, int]:
    """Answer the questions of `manifest` with `model`, write what `select` keeps to `out`, and return its counts."""
    g = recipe.gspo
    if not (model / "config.json").is_file():
        raise CheckpointError(f"{model} has no model; train it first: keye posttrain RECIPE --out {model.parents[1]}")
    start = agree(lambda: open_start(model))
    sampled = Sampled(
        agree(lambda: load_prompts(manifest, g.families)), g.families, rounds.limit, recipe.rewards, g.precision,
        g.decode_batch_size, recipe.rollout,
    )  # fmt: skip
    draw = Draw(rounds.samples, rounds.temperature, g.max_new_tokens, recipe.seed * 1000 + seed)
    journal = draw_all(out.with_suffix(".answers"), start, sampled, draw)
    return from_first(lambda: _selected(journal, manifest, out, select))


def _selected(journal: Journal, manifest: Path, out: Path, select: Select) -> dict[str, int]:
    """The counts of a selection; those of an earlier start if `out` is there."""
    record = out.with_suffix(".counts.json")
    if out.is_file() and record.is_file():
        return json.loads(record.read_text(encoding="utf-8"))
    counts = select(manifest, (Answers(row.where, row.answers, row.error) for row in journal.rows()), out)
    write_atomically(record, json.dumps(counts) + "\n")
    if not counts["kept"]:
        out.unlink()
        raise ManifestError(
            f"of the questions of {manifest}, none can be used for {out.name} ({json.dumps(counts)}); use questions "
            "that are neither too hard nor too easy, or raise --samples"
        )
    return counts
