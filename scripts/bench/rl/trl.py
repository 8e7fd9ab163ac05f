"""GSPO here beside TRL's GRPOTrainer with sequence-level ratios: time of a step, and reward after equal samples.

Both tune the same decoder, which transformers loads as Qwen3ForCausalLM, on sums of two numbers, with the same prompts
(token for token), reward, batch, clip range, optimizer and learning rate. The start model was trained on sums of which
half are right. In each seed the two take turns: a step of TRL (one batch of answers and its optimizer steps), then one
of this project.
"""

import argparse
import json
import os
import random
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import torch

from keye.errors import KeyeError, run
from keye.model.config import KeyeConfig
from keye.model.keye import KeyeForConditionalGeneration
from keye.processor.processor import KeyeProcessor
from keye.processor.stream import IM_END
from keye.processor.tokenizer import train_tokenizer
from rl.questions.prompts import Prompt
from rl.recipe import Gspo, HeldOut, RlRecipe
from rl.rewards import Judgement, rewards_from
from rl.rollout import InProcessRollout
from rl.trainer import GspoTrainer
from scripts.bench.common.record import ROOT, Claim, Table, arguments, out_of, save
from scripts.bench.common.timing import ratio

SCRATCH = ROOT / ".cache" / "bench" / "rl_trl"
NUMBERS = range(20)
NEW_TOKENS = 4
PROMPTS, GROUP, MINI_BATCHES = 32, 8, 4
LEARNING_RATE = 2e-4
LOW, HIGH = 3e-4, 4e-4
EXAMPLES = """examples:
  python -m scripts.bench rl --part trl       about ten minutes; needs pip install -e '.[trl]'
  python -m scripts.bench.rl.trl --seeds 0    one seed; seeds that were measured are kept
"""


@dataclass
class Clock:
    """Seconds and processor seconds of each step, and the mean reward of its samples."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    reward: list[float] = field(default_factory=list)


def questions() -> list[dict[str, Any]]:
    """Rows of a manifest: all sums of two numbers."""
    return [
        {"id": f"{a}+{b}", "answer": str(a + b), "messages": [{"role": "user", "content": f"{a}+{b}="}]}
        for a in NUMBERS
        for b in NUMBERS
    ]


def make_start(folder: Path, steps: int) -> None:
    """Write a start model and its manifest: the decoder of the preset tiny, trained on sums of which half are right."""
    torch.manual_seed(0)
    words = [f"{a}+{b}={a + b}" for a in NUMBERS for b in NUMBERS]
    processor = KeyeProcessor(train_tokenizer([*words, "user assistant"], 300))
    processor.tokenizer.eos_token = IM_END
    config = KeyeConfig.preset("tiny", vocab_size=len(processor.tokenizer))
    model = KeyeForConditionalGeneration(processor.configure(config)).train()
    draw, end = random.Random(0), processor.token_id(IM_END)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95))
    samples = [(processor.sample(row["messages"], add_generation_prompt=True).input_ids, row) for row in questions()]
    for number in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (steps - number) / (steps / 2))
        ids, labels = [], []
        for prompt, row in draw.choices(samples, k=64):
            right = draw.random() < 0.5
            answer = row["answer"] if right else str(draw.randrange(2 * len(NUMBERS) - 1))
            target = torch.tensor([*processor.tokenizer(answer, add_special_tokens=False).input_ids, end])
            ids.append(torch.cat([prompt, target]))
            labels.append(torch.cat([torch.full_like(prompt, -100), target]))
        pad = torch.nn.utils.rnn.pad_sequence
        mask = pad([torch.ones_like(x) for x in ids], batch_first=True)
        loss = model(
            input_ids=pad(ids, batch_first=True), attention_mask=mask,
            labels=pad(labels, batch_first=True, padding_value=-100),
        ).loss  # fmt: skip
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval().save_pretrained(folder / "annealing/model")
    processor.save_pretrained(folder / "annealing/model")
    (folder / "world").mkdir(exist_ok=True)
    for split in ("train", "heldout"):
        text = "".join(json.dumps(row) + "\n" for row in questions())
        (folder / f"world/{split}.jsonl").write_text(text)


def plain_model(model: KeyeForConditionalGeneration) -> Any:
    """Transformers' own causal model with the decoder's weights."""
    import copy

    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(model.config.text_config)
    config._attn_implementation = "sdpa"
    plain = AutoModelForCausalLM.from_config(config)
    plain.model.load_state_dict(model.language_model.state_dict())
    plain.lm_head.load_state_dict(model.lm_head.state_dict())
    return plain


def ours(folder: Path, seed: int, steps: int) -> GspoTrainer:
    """The trainer of this project, ready for its first step."""
    gspo = Gspo(
        steps=steps, learning_rate=LEARNING_RATE, prompts=PROMPTS, group_size=GROUP, mini_batches=MINI_BATCHES,
        max_new_tokens=NEW_TOKENS, epsilon_low=LOW, epsilon_high=HIGH, checkpoint_every=steps, freeze=("visual",),
        precision="fp32",
    )  # fmt: skip
    recipe = RlRecipe(gspo=gspo, heldout=HeldOut(limit=1, samples=1), rewards={"accuracy": 1.0}, seed=seed)
    return GspoTrainer(recipe, folder)


def judged(rows: dict[str, dict[str, Any]], processor: KeyeProcessor) -> Any:
    """The reward of this project as a reward function of TRL; an answer without its end token is wrong, as in ours."""
    reward, end = rewards_from({"accuracy": 1.0}), processor.token_id(IM_END)

    def accuracy(prompts: list[str], completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        made = []
        for prompt, text, ids in zip(prompts, completions, completion_ids, strict=True):
            row = rows[prompt]
            question = Prompt(row["id"], "", row["messages"], row["answer"], None, (), ROOT)
            made.append(reward(Judgement(question, text, end in ids)).total)
        return made

    return accuracy


def theirs(folder: Path, seed: int, steps: int, model: Any, processor: KeyeProcessor, turn: Any, whole: bool) -> Any:
    """TRL's trainer of the same model, which calls `turn` after each batch of answers and its optimizer steps.

    Args:
        whole: mini-batches have whole groups, as in this project. TRL shuffles the answers of a batch over them.
    """
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    from trl.trainer import grpo_trainer

    if whole:
        grpo_trainer.shuffle_sequence_dict = lambda batch: batch

    rows = {}
    for row in questions():
        text = processor.apply_chat_template(row["messages"], add_generation_prompt=True, tokenize=False)
        ids = processor.sample(row["messages"], add_generation_prompt=True).input_ids.tolist()
        if processor.tokenizer(text).input_ids != ids:
            raise KeyeError(f"{row['id']}: TRL would read other tokens than this project")
        rows[text] = row

    class Turn(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % MINI_BATCHES == 0:
                turn(trainer)

    config = GRPOConfig(
        str(folder / "trl"), per_device_train_batch_size=PROMPTS * GROUP // MINI_BATCHES, num_generations=GROUP,
        steps_per_generation=MINI_BATCHES, gradient_accumulation_steps=1, max_steps=steps * MINI_BATCHES,
        importance_sampling_level="sequence", loss_type="grpo", beta=0.0, epsilon=LOW, epsilon_high=HIGH,
        max_completion_length=NEW_TOKENS, temperature=1.0, learning_rate=LEARNING_RATE, lr_scheduler_type="constant",
        adam_beta1=0.9, adam_beta2=0.95, adam_epsilon=1e-8, weight_decay=0.0, max_grad_norm=1.0, seed=seed,
        use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", save_strategy="no",
        logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=model, reward_funcs=judged(rows, processor), args=config, processing_class=processor.tokenizer,
        train_dataset=Dataset.from_list([{"prompt": text} for text in rows]), callbacks=[Turn()],
    )  # fmt: skip
    return trainer


def accuracy_of(model: KeyeForConditionalGeneration, processor: KeyeProcessor, samples: int) -> dict[str, float]:
    """Mean accuracy over all questions, sampled and greedy, by the sampler of this project."""
    engine = InProcessRollout(model, processor, torch.Generator().manual_seed(99), 400)
    reward, found = rewards_from({"accuracy": 1.0}), {}
    rows = questions()
    inputs = [processor.sample(row["messages"], add_generation_prompt=True) for row in rows]
    for name, count, temperature in (("sampled", samples, 1.0), ("greedy", 1, 0.0)):
        groups = engine.generate(inputs, count, temperature, NEW_TOKENS)
        earned = [
            reward(Judgement(Prompt(row["id"], "", row["messages"], row["answer"], None, (), ROOT), text, end)).total
            for row, group in zip(rows, groups, strict=True)
            for text, end in zip(group.texts, group.finished, strict=True)
        ]
        found[name] = fmean(earned)
    return found


def one_seed(start: Path, seed: int, steps: int, whole: bool = False) -> dict[str, Any]:
    """Both trainings from the same model, in turns; times, rewards of the samples, and accuracy afterwards."""
    from stages.distributed import engine as deep

    deep.start(threads=1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        shutil.copytree(start, folder, dirs_exist_ok=True)
        trainer = ours(folder, seed, steps)
        processor = trainer.processor
        before = accuracy_of(trainer.model, processor, 4)
        plain = plain_model(trainer.model)
        mine, other = Clock(), Clock()
        since = [0.0, 0.0]

        def turn(trl: Any) -> None:
            other.wall.append(time.perf_counter() - since[0])
            other.cpu.append(time.process_time() - since[1])
            other.reward.append(trl._metrics["train"]["reward"][-1])
            wall, cpu = time.perf_counter(), time.process_time()
            metrics = trainer.train_step()
            mine.wall.append(time.perf_counter() - wall)
            mine.cpu.append(time.process_time() - cpu)
            mine.reward.append(metrics["reward_mean"])
            print(f"  seed {seed}, step {len(mine.wall)}: TRL {other.cpu[-1]:.1f} s {other.reward[-1]:.2f}, "
                  f"ours {mine.cpu[-1]:.1f} s {mine.reward[-1]:.2f}", flush=True)  # fmt: skip
            since[:] = time.perf_counter(), time.process_time()

        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
            os.environ.pop(name, None)  # with them, accelerate wraps the model for several processes
        trl = theirs(folder, seed, steps, plain, processor, turn, whole)
        since[:] = time.perf_counter(), time.process_time()
        trl.train()
        after = accuracy_of(trainer.model, processor, 4)
        state = {name: x for name, x in plain.state_dict().items() if name.startswith("model.")}
        trainer.model.language_model.load_state_dict({k.removeprefix("model."): x for k, x in state.items()})
        trainer.model.tie_weights()
        found = {"before": before, "ours": after, "trl": accuracy_of(trainer.model, processor, 4)}
    deep.stop()
    return {**found, "mine": vars(mine), "other": vars(other)}


def main() -> None:
    parser: argparse.ArgumentParser = arguments(__doc__, EXAMPLES, results="rl")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--whole", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)), help="seeds (0 to 9)")
    parser.add_argument("--steps", type=int, help="batches of answers, with 4 optimizer steps each (20; 2 if quick)")
    args = parser.parse_args()
    try:
        import trl
    except ModuleNotFoundError as error:
        raise KeyeError("this part needs TRL: pip install -e '.[trl]'") from error
    steps, began = args.steps or (2 if args.quick else 20), time.monotonic()
    scratch = SCRATCH / ("quick" if args.quick else "full")
    start = scratch / "start"
    if not (start / "world/heldout.jsonl").exists():
        make_start(start, 20 if args.quick else 400)
    if args.one is not None:
        found = one_seed(start, args.one, steps, args.whole)
        _result(scratch, steps, args.one, args.whole).write_text(json.dumps(found))
        return
    import subprocess
    import sys

    seeds = args.seeds[:1] if args.quick else args.seeds
    for seed in seeds:
        for whole in (False, True):
            if not _result(scratch, steps, seed, whole).exists():
                flags = [*(["--quick"] if args.quick else []), *(["--whole"] if whole else [])]
                command = [sys.executable, "-m", __spec__.name, "--one", str(seed), "--steps", str(steps), *flags]
                subprocess.run(command, check=True, cwd=ROOT)
    results, whole = (
        [json.loads(_result(scratch, steps, seed, kind).read_text()) for seed in seeds] for kind in (False, True)
    )
    publish(args, seeds, results, whole, steps, trl.__version__, time.monotonic() - began)


def _result(scratch: Path, steps: int, seed: int, whole: bool) -> Path:
    return scratch / f"{steps}_{seed}{'_whole' if whole else ''}.json"


def publish(
    args: argparse.Namespace,
    seeds: list[int],
    results: list[dict[str, Any]],
    whole: list[dict[str, Any]],
    steps: int,
    version: str,
    seconds: float,
) -> None:
    """Write the claims and the table. whole: with TRL's mini-batches of whole groups."""
    faster = [ratio(r["other"]["cpu"][1:], r["mine"]["cpu"][1:]) for r in results]
    clock = [ratio(r["other"]["wall"][1:], r["mine"]["wall"][1:]) for r in results]
    gaps, same = ([r["ours"]["sampled"] - r["trl"]["sampled"] for r in found] for found in (results, whole))
    rows = [
        (
            seed, *(f"{r[name]['sampled']:.3f}" for name in ("before", "ours", "trl")),
            *(f"{r[name]['greedy']:.3f}" for name in ("before", "ours", "trl")),
            f"{median(r['mine']['cpu'][1:]):.2f}", f"{median(r['other']['cpu'][1:]):.2f}", f"{faster[place]:.1f}",
            f"{same[place]:+.3f}",
        )
        for place, (seed, r) in enumerate(zip(seeds, results, strict=True))
    ]  # fmt: skip
    claims = [
        Claim("a step of GSPO compared with TRL's GRPOTrainer, sequence level", "faster",
              f"{median(median(r['mine']['cpu'][1:]) for r in results):.2f} against "
              f"{median(median(r['other']['cpu'][1:]) for r in results):.2f} s of the processor",
              f"{median(faster):.1f} × as fast ({median(clock):.1f} × by the clock)", median(faster) > 1),
        Claim("accuracy after equal samples, ours − TRL's, mean of the seeds", "≥ −0.02",
              _mean(gaps), met=fmean(gaps) >= -0.02),
        Claim("the same, TRL with whole groups in a mini-batch", "≥ −0.02", _mean(same), met=fmean(same) >= -0.02),
    ]  # fmt: skip
    columns = (
        "seed", "sampled accuracy before", "ours", "TRL", "greedy accuracy before", "ours", "TRL",
        "s a step, ours", "TRL", "×", "ours − TRL, whole groups",
    )  # fmt: skip
    notes = [
        f"{steps} steps of {PROMPTS} prompts with {GROUP} answers of up to {NEW_TOKENS} tokens and {MINI_BATCHES} "
        f"optimizer steps, learning rate {LEARNING_RATE:g}, clip range 1 − {LOW:g} … 1 + {HIGH:g}; TRL {version} with "
        "importance_sampling_level = \"sequence\", loss_type = \"grpo\", beta = 0, steps_per_generation = "
        f"{MINI_BATCHES}, without gradient checkpointing and logging. The model is the decoder of the preset tiny; "
        "transformers loads it as Qwen3ForCausalLM, with SDPA. Float32, one thread; seconds of the processor, medians "
        "without the first step. Accuracy is over all 400 sums, by the sampler of this project with the same seed.",
        "TRL shuffles the answers of a batch over its mini-batches, so that each has answers to more questions. Here a "
        "mini-batch has whole groups, so that a prompt is read once for its group. The last column and the last claim "
        "repeat both trainings with TRL's shuffle switched off: what remains of the difference has another cause.",
    ]
    save(out_of(args), "trl", claims, [Table("Sums of two numbers", columns, rows)], seconds=seconds,
         quick=args.quick, seeds={"training": ", ".join(map(str, seeds)), "start model": 0}, notes=notes)  # fmt: skip


def _mean(gaps: list[float]) -> str:
    """The mean over seeds and its standard error."""
    error = stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else 0.0
    return f"{fmean(gaps):+.3f} ± {error:.3f}"


if __name__ == "__main__":
    run(main)
