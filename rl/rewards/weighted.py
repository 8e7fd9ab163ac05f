"""The weighted sum of rewards that a recipe names. A reward that fails costs its answer, not the run."""

from __future__ import annotations

import dataclasses
import inspect
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keye.errors import KeyeError, RecipeError
from rl.rewards.base import REGISTRY, Earned, Judgement, Outcome, Reward
from rl.rewards.workers import Workers, importable, outcome
from stages import typed_toml

ON_FAILURE = ("zero", "skip", "stop")


@dataclass(frozen=True, kw_only=True)
class RewardOptions:
    """The keys that every table `[rewards.<name>]` may have; its other keys are those of the reward."""

    weight: float = 1.0
    """Factor of the reward in the sum."""

    kind: str = ""
    """Registered reward; default: the table's name. With it, two tables may use the same reward."""

    families: tuple[str, ...] = ()
    """Families of questions that the reward applies to; empty = all."""

    on_failure: str = ""
    """After a failure: "zero", "skip" (the answer does not count) or "stop". Default: "zero"; of models "skip"."""

    time_limit: float = 5.0
    """Seconds for an answer in the worker process; a slower reward has failed."""


@dataclass(frozen=True)
class Term:
    """A reward of the sum with its options."""

    reward: Reward
    options: RewardOptions

    def applies(self, judgement: Judgement) -> bool:
        """Whether the reward applies to the question's family."""
        return not self.options.families or judgement.prompt.family in self.options.families


@dataclass(frozen=True)
class RewardSum:
    """Weighted rewards by name.

    A reward that raises, takes longer than its limit, or gives something else than a finite number has failed: its part
    is 0, and the answer's `Earned.failures` has the cause.

    Raises:
        KeyeError: when called, after a failure of a reward with `on_failure = "stop"`; names question and cause.
    """

    terms: dict[str, Term]
    workers: Workers = field(default_factory=lambda: Workers({}), compare=False)

    def __call__(self, judgement: Judgement) -> Earned:
        return self.all([judgement])[0]

    def all(self, judgements: list[Judgement]) -> list[Earned]:
        """What each answer earns, in order. Rewards that judge many answers at once get all of them."""
        found: list[dict[str, Outcome]] = [{} for _ in judgements]
        for name, term in self.terms.items():
            places = [place for place, one in enumerate(judgements) if term.applies(one)]
            given = self._outcomes(name, term, [judgements[place] for place in places]) if places else []
            for place, got in zip(places, given, strict=True):
                if got.value is None and term.options.on_failure == "stop":
                    raise KeyeError(_sentence(name, judgements[place], got.cause))
                found[place][name] = got
        return [self._earned(outcomes) for outcomes in found]

    def _outcomes(self, name: str, term: Term, judgements: list[Judgement]) -> list[Outcome]:
        if name in self.workers.rewards:
            return self.workers.score(name, judgements, term.options.time_limit)
        if not hasattr(term.reward, "score"):
            return [outcome(term.reward, judgement) for judgement in judgements]
        try:
            found = [_checked(one) for one in term.reward.score(judgements)]
            return [got for got, _ in zip(found, judgements, strict=True)]
        except KeyeError:
            raise  # a reward that is set to stop the run
        except Exception as error:
            return [Outcome(None, f"{type(error).__name__}: {error}"[:200])] * len(judgements)

    def _earned(self, outcomes: dict[str, Outcome]) -> Earned:
        parts = {name: got.value or 0.0 for name, got in outcomes.items()}
        failures = {name: got.cause for name, got in outcomes.items() if got.value is None}
        counts = not any(self.terms[name].options.on_failure == "skip" for name in failures)
        total = sum(self.terms[name].options.weight * value for name, value in parts.items())
        return Earned(total, parts, failures, counts)


def _checked(found: Outcome) -> Outcome:
    bad = found.value is not None and not math.isfinite(found.value)
    return Outcome(None, f"it gave {found.value!r}, not a finite number") if bad else found


def _sentence(name: str, judgement: Judgement, cause: str) -> str:
    prompt, reply = judgement.prompt, judgement.text
    return (
        f"reward {name!r} failed for an answer to {prompt.id!r} ({prompt.where}): {reply!r:.80}: {cause}; correct the "
        f'reward, or set on_failure = "zero" or "skip" in [rewards.{name}]'
    )


def rewards_from(weights: Mapping[str, float | Mapping[str, Any]], folder: str | Path | None = None) -> RewardSum:
    """The rewards that a recipe names, with their weights and options.

    Args:
        weights: name → weight, or name → table of options (see `RewardOptions`) and of the reward's own keys.
        folder: directory of the run, for rewards that read or keep files.

    Raises:
        RecipeError: a name that is not registered, an unknown key, or no rewards.
    """
    if not weights:
        raise RecipeError(f"[rewards] names no reward: use one or more of {', '.join(sorted(REGISTRY))}")
    terms = {name: _term(name, given) for name, given in weights.items()}
    isolated = {}
    for name, term in terms.items():
        if hasattr(term.reward, "open"):
            term.reward.open(Path(folder) if folder is not None else Path())
        if getattr(term.reward, "in_process", False) or hasattr(term.reward, "score"):
            continue
        if importable(term.reward):
            isolated[name] = term.reward
        else:
            remedy = "define its class in a module that can be imported"
            print(f"the reward {name} runs without a time limit: {remedy}", file=sys.stderr)
    return RewardSum(terms, Workers(isolated))


def _term(name: str, given: float | Mapping[str, Any]) -> Term:
    table = dict(given) if isinstance(given, Mapping) else {"weight": given}
    common = {spec.name for spec in dataclasses.fields(RewardOptions)}
    prefix = f"rewards.{name}."
    options = typed_toml.build(RewardOptions, {k: v for k, v in table.items() if k in common}, "the recipe", prefix)
    need = typed_toml.requirement("the recipe")
    need(math.isfinite(options.weight), f"{prefix}weight must be a finite number")
    need(options.on_failure in ("", *ON_FAILURE), f"{prefix}on_failure must be one of {', '.join(ON_FAILURE)}")
    need(options.time_limit > 0, f"{prefix}time_limit must be above 0 seconds")
    factory = REGISTRY.get(options.kind or name)
    if factory is None:
        raise RecipeError(
            f"[rewards] names {options.kind or name!r}: use one or more of {', '.join(sorted(REGISTRY))}; another name "
            f"needs the key kind in [rewards.{name}]"
        )
    reward = _made(factory, {k: v for k, v in table.items() if k not in common}, prefix)
    return Term(
        reward, dataclasses.replace(options, on_failure=options.on_failure or getattr(reward, "on_failure", "zero"))
    )


def _made(factory: Any, table: dict[str, Any], prefix: str) -> Reward:
    if dataclasses.is_dataclass(factory):
        return typed_toml.build(factory, table, "the recipe", prefix)
    try:
        inspect.signature(factory).bind(**table)
    except TypeError as error:
        raise RecipeError(f"the recipe: keys of [{prefix.rstrip('.')}] do not fit ({error}); correct them") from None
    return factory(**table)
