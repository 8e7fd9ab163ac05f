"""Pairs that the start model of `[mpo]` makes of its own answers, before training."""

from __future__ import annotations

import json
from pathlib import Path

from rl.preference.answers import Draw, Sampled, draw_all
from rl.preference.phase import write_text
from rl.preference.selecting import make_pairs
from rl.questions.prompts import load_prompts
from rl.recipe import RlRecipe
from rl.run.agree import agree
from stages.distributed.ranks import first_rank
from stages.distributed.weights import Start

PAIRS, COUNTS, ANSWERS = "pairs.jsonl", "pairs.json", "answers"


def sample_pairs(recipe: RlRecipe, run: Path, start: Start) -> Path:
    """`run/mpo/pairs.jsonl`, of answers that are drawn now as far as an earlier start has not drawn them; collective.

    Raises:
        CheckpointError: the answers of an earlier start were drawn by another model or with other settings.
    """
    out, m = run / "mpo", recipe.mpo
    manifest = run / m.sampling.manifest
    found = agree(lambda: load_prompts(manifest, m.families))
    sampled = Sampled(
        found, m.families, m.sampling.limit, recipe.rewards, m.precision, m.decode_batch_size, recipe.rollout
    )
    draw = Draw(m.sampling.samples, m.sampling.temperature, m.max_new_tokens, recipe.seed)
    journal = draw_all(out / ANSWERS, start, sampled, draw)

    def write() -> None:
        counts = make_pairs(manifest, journal.rows(), out / PAIRS, m.sampling.method, m.sampling.per_question)
        write_text(out / COUNTS, json.dumps(counts | {"left_out": len(found.rejected)}) + "\n")
        print("pairs: " + ", ".join(f"{count} {name}" for name, count in counts.items()), flush=True)

    first_rank(write, OSError)
    return out / PAIRS
