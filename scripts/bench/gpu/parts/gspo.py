"""Part g: one step of GSPO with a video prompt of 32K tokens and eight answers: rollout and update.

The policy has the 8B shapes with as many decoder layers as fit with their optimizer states. The group shares its prompt
in the rollout and in the update (`rl.rollout`, `rl.policy`). Answers have a fixed length, rewards are drawn.
"""

import os
import time

import torch

from keye.errors import run
from keye.model.keye import KeyeForConditionalGeneration
from keye.processor.processor import Sample
from rl.policy.scoring import score
from rl.policy.update import PolicyUpdate
from rl.recipe import Gspo
from rl.rollout import InProcessRollout
from scripts.bench.common.record import Claim, Table
from scripts.bench.gpu.journal import Journal, Values, begin_peak, cell, parser, peak_gb, synchronize
from scripts.bench.gpu.plans import document, plans_in
from scripts.bench.gpu.steps import sizes_of
from scripts.bench.stages.simulated.drawn import processor
from stages.distributed import engine
from stages.distributed.activation_memory import apply_memory_options

PART = "gspo"
PROMPT, ANSWER, GROUP = 32_768, 256, 8
SMALL_PROMPT, SMALL_ANSWER = 256, 6
VISUAL = 0.95
STEPS = 2  # the first has the kernels to load and the optimizer's states to make
COLUMNS = (
    "step", "prompt tokens", "answers", "rollout s", "update s", "tokens sampled a second", "GB, rollout", "GB, update",
    "largest |log-probability of the sampler − of the policy|",
)  # fmt: skip
NOTES = [
    "The update scores the answers once without a gradient and once with it, and takes one optimizer step; layers are "
    "recomputed. The last column compares float32 log-probabilities of the sampled tokens: those of the decoding "
    "steps with those of the training pass over the same weights.",
]


class Policy:
    """The policy with its engine, its rollout and its update."""

    def __init__(self, journal: Journal) -> None:
        os.environ.setdefault("LOCAL_RANK", "0")
        engine.start()
        small, self.device = journal.small, journal.device
        memory = torch.cuda.get_device_properties(self.device).total_memory if self.device.type == "cuda" else 0.0
        sizes = sizes_of(small, memory, share=0.5)
        self.answer = SMALL_ANSWER if small else ANSWER
        torch.manual_seed(0)
        with torch.device(self.device):
            self.model = KeyeForConditionalGeneration(sizes.config)
        self.layers = sizes.config.text_config.num_hidden_layers
        settings = Gspo(
            steps=1 << 20, learning_rate=1e-6, prompts=1, group_size=GROUP, mini_batches=1, zero=2,
            max_new_tokens=self.answer, checkpointing=True, mlp_tiles=8, precision=sizes.precision,
        )  # fmt: skip
        apply_memory_options(self.model, settings.checkpointing, mlp_tiles=settings.mlp_tiles)
        built = engine.build(
            self.model.train(), settings, settings.steps, zero=settings.zero, precision=sizes.precision
        )  # fmt: skip
        self.rollout = InProcessRollout(self.model, processor(), torch.Generator().manual_seed(0), GROUP)
        self.rollout.ends = frozenset()  # every answer has `max_new_tokens`
        self.update = PolicyUpdate(built, settings)
        length = SMALL_PROMPT if small else PROMPT
        made = document(plans_in(journal.plans, small), sizes.config, length, VISUAL, 0)
        made["labels"] = torch.full_like(made["labels"], -100)
        self.prompt = Sample(**made)

    def step(self) -> Values:
        """Rollout and update of one group."""
        begin_peak(self.device)
        began = time.perf_counter()
        groups = self.rollout.generate([self.prompt], GROUP, 1.0, self.answer)
        synchronize(self.device)
        rolled, first = time.perf_counter(), peak_gb(self.device)
        begin_peak(self.device)
        advantages = torch.randn(1, GROUP, generator=torch.Generator().manual_seed(1))
        found = self.update.run(groups, advantages, [slice(0, 1)])
        synchronize(self.device)
        return {
            "prompt": len(self.prompt.input_ids), "rollout": rolled - began, "update": time.perf_counter() - rolled,
            "sampled": GROUP * self.answer, "rollout_peak": first, "update_peak": peak_gb(self.device),
            "layers": self.layers, "grad_norm": found[0].grad_norm, "apart": self.apart(),
        }  # fmt: skip

    @torch.no_grad()
    def apart(self) -> float:
        """Largest difference of log-probabilities between the rollout and a training pass, over a new group.

        The update has changed the weights, so a group is sampled from the new ones.
        """
        group = self.rollout.generate([self.prompt], 2, 1.0, min(16, self.answer))[0]
        scored = score(self.model, [group]).log_probs.cpu()
        return float((scored - torch.cat(group.log_probs)).abs().max())


def table_of(journal: Journal) -> Table:
    rows = [
        (
            key, f"{row['prompt']:,}", f"{GROUP} × {row['sampled'] // GROUP}", f"{row['rollout']:.2f}",
            f"{row['update']:.2f}", f"{row['sampled'] / row['rollout']:.0f}", cell(row["rollout_peak"]),
            cell(row["update_peak"]), f"{row['apart']:.1e}",
        )
        for key, row in journal.found.items()
    ]  # fmt: skip
    layers = next((row["layers"] for row in journal.found.values()), "–")
    return Table(f"A group of eight answers, {layers} decoder layers", COLUMNS, rows)


def claims_of(journal: Journal) -> list[Claim]:
    row = next((journal.found[key] for key in reversed(journal.found)), None)
    if row is None:
        return []
    total = row["rollout"] + row["update"]
    figure = f"{total:.1f} s, of them {row['rollout']:.1f} s of rollout"
    return [Claim(f"a step of GSPO, prompt of {row['prompt']:,} tokens, {GROUP} answers", "–", figure)]


def main() -> int:
    args = parser(__doc__, PART).parse_args()
    journal = Journal.open(args, PART)
    journal.tables = lambda: [table_of(journal)]
    made: list[Policy] = []

    def one() -> Values:
        if not made:
            made.append(Policy(journal))
        return made[0].step()

    for number in range(1, STEPS + 1):
        journal.row(f"step {number}", one)
    journal.save(claims_of(journal), NOTES)
    made.clear()
    engine.stop()
    return 0


if __name__ == "__main__":
    run(main)
