"""A group at the price of one prompt: 8,000 prompt tokens and 8 × 200 answer tokens in the update and in the rollout.

The update reads the prompt once (`rl.policy.prefix`); its gradients are compared with those of eight separate
sequences, and its time with that of the fastest of three ways to read eight sequences. The rollout is compared with
`generate(num_return_sequences=8)` of transformers on the same weights.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from keye.errors import KeyeError, run
from keye.model.config import KeyeConfig
from keye.model.keye import KeyeForConditionalGeneration
from keye.processor.processor import KeyeProcessor, Sample
from keye.processor.tokenizer import train_tokenizer
from rl.policy.scoring import Group, banned_tokens, score, token_log_probs
from rl.rollout import InProcessRollout
from scripts.bench.common.record import ROOT, Claim, Table, arguments, forget_other_code, out_of, save
from scripts.bench.common.timing import ratio

SCRATCH = ROOT / ".cache" / "bench" / "rl_group_price"
SEED = 0
BOUND = 1e-6
FASTER_UPDATE, FASTER_ROLLOUT = 5.0, 3.0
EXAMPLES = """examples:
  python -m scripts.bench rl --part group_price
  python -m scripts.bench.rl.group_price --minutes 5      pauses after five minutes; the same command continues
"""
ADVANTAGES = torch.tensor([1.5, -0.5, 0.25, -1.25, 0.75, -1.0, 1.0, -0.75])


@dataclass(frozen=True)
class Setting:
    """One model and one group.

    model: with random weights. plain: transformers' model with the decoder's weights. prompt: int64 [P]. answers: int64
    [G, T], of equal length.
    """

    model: KeyeForConditionalGeneration
    plain: nn.Module
    processor: KeyeProcessor
    prompt: Tensor
    answers: Tensor

    @property
    def group(self) -> Group:
        """The group as a rollout returns it."""
        rows = list(self.answers)
        return Group(self.sample, rows, [torch.zeros(len(row)) for row in rows], [True] * len(rows), [""] * len(rows))

    @property
    def sample(self) -> Sample:
        """The prompt: text alone, because the model of transformers has no tower."""
        return Sample(self.prompt, torch.full_like(self.prompt, -100), torch.arange(len(self.prompt)).expand(3, -1))

    @property
    def rows(self) -> Tensor:
        """The sequences, each with its prompt: int64 [G, P + T]."""
        return torch.cat([self.prompt.expand(len(self.answers), -1), self.answers], 1)


def setting(prompt: int, answer: int, group: int, layers: int) -> Setting:
    """The decoder of the preset "tiny" with `layers` layers and random weights."""
    torch.manual_seed(SEED)
    tokenizer = train_tokenizer(["how many flashes does the lamp give? user assistant 0123456789"] * 4, 400)
    processor = KeyeProcessor(tokenizer)
    config = KeyeConfig.preset("tiny", vocab_size=len(tokenizer), num_hidden_layers=layers)
    config.text_config.max_position_embeddings = max(prompt + answer, config.text_config.max_position_embeddings)
    model = KeyeForConditionalGeneration(processor.configure(config)).train()
    text = copy.deepcopy(config.text_config)
    text._attn_implementation = "sdpa"
    plain = AutoModelForCausalLM.from_config(text).train()
    plain.model.load_state_dict(model.language_model.state_dict())
    plain.lm_head.load_state_dict(model.lm_head.state_dict())
    draw = torch.Generator().manual_seed(SEED)
    first = max(banned_tokens(model)) + 1
    ids = torch.randint(first, len(tokenizer), (prompt + group * answer,), generator=draw)
    return Setting(model, plain, processor, ids[:prompt], ids[prompt:].view(group, answer))


# --- the update -------------------------------------------------------------------------------------------------------


def loss_of(log_probs: Tensor, advantages: Tensor) -> Tensor:
    """The GSPO loss at equal policies, from log-probabilities [G, T] and advantages [G].

    There the ratio is 1 and its gradient is that of the mean log-probability.
    """
    means = log_probs.float().mean(1)
    return -((means - means.detach()).exp() * advantages).mean()


def update_once(case: Setting) -> None:
    """Forward and backward pass in which the group shares its prompt."""
    log_probs = score(case.model, [case.group]).log_probs.view(case.answers.shape)
    loss_of(log_probs, ADVANTAGES[: len(case.answers)]).backward()


def update_separately(case: Setting) -> None:
    """Eight forward and backward passes over one sequence each."""
    length = case.answers.shape[1] + 1
    for row, answer, advantage in zip(case.rows, case.answers, ADVANTAGES, strict=False):
        logits = case.model(input_ids=row[None], logits_to_keep=length).logits
        log_probs = chosen(case.model, logits[:, :-1], answer[None])
        (loss_of(log_probs, advantage[None]) / len(case.rows)).backward()


def update_packed(case: Setting) -> None:
    """One pass over a packed row of the eight sequences."""
    group, length = case.rows.shape
    answer = case.answers.shape[1]
    predictors = torch.cat([torch.arange(length - answer - 1, length - 1) + n * length for n in range(group)])
    logits = case.model(
        input_ids=case.rows.view(1, -1),
        position_ids=torch.arange(length).repeat(group).expand(3, 1, -1),
        cu_seqlens=torch.arange(0, group * length + 1, length, dtype=torch.int32),
        logits_to_keep=predictors,
    ).logits
    loss_of(chosen(case.model, logits.view(group, answer, -1), case.answers), ADVANTAGES[:group]).backward()


def update_transformers(case: Setting) -> None:
    """One pass of transformers' model over the batch of eight sequences, with SDPA."""
    logits = case.plain(input_ids=case.rows, use_cache=False, logits_to_keep=case.answers.shape[1] + 1).logits
    log_probs = chosen(case.model, logits[:, :-1], case.answers)
    loss_of(log_probs, ADVANTAGES[: len(case.answers)]).backward()


def chosen(model: nn.Module, logits: Tensor, answers: Tensor) -> Tensor:
    """Log-probabilities [G, T] of answers [G, T] from logits [G, T, V]."""
    return token_log_probs(logits, 1.0, banned_tokens(model)).gather(-1, answers[..., None])[..., 0]


def gradients(model: nn.Module, call: Callable[[], None]) -> list[Tensor]:
    """The gradients of the decoder, whose head is tied, after a call, in the order of its parameters."""
    model.zero_grad(set_to_none=True)
    call()
    decoder = getattr(model, "language_model", None) or model.model
    return [p.grad.clone() for p in decoder.parameters()]


def deviation(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference of two gradients, relative to the largest gradient."""
    largest = max(float(x.abs().max()) for x in theirs)
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)) / largest


def compare_gradients(case: Setting) -> dict[str, float]:
    """Deviations between the update and eight separate sequences.

    Returns:
        "float64", "float32": the two in that arithmetic. "rounding": eight separate sequences in float32 against the
        same in float64, as a scale for the second.
    """
    found, apart = {}, {}
    for dtype in (torch.float32, torch.float64):
        model = copy.deepcopy(case.model).to(dtype)
        twin = Setting(model, case.plain, case.processor, case.prompt, case.answers)
        ours = gradients(model, lambda twin=twin: update_once(twin))
        name = str(dtype).removeprefix("torch.")
        apart[name] = gradients(model, lambda twin=twin: update_separately(twin))
        found[name] = deviation(ours, apart[name])
    return found | {"rounding": deviation([x.double() for x in apart["float32"]], apart["float64"])}


# --- the rollout ------------------------------------------------------------------------------------------------------


def rollout_ours(case: Setting) -> None:
    """A group of answers; no token ends one, so that all have the same length."""
    engine = InProcessRollout(case.model, case.processor, torch.Generator().manual_seed(SEED), len(case.answers))
    engine.ends = frozenset()
    group = engine.generate([case.sample], len(case.answers), 1.0, case.answers.shape[1])[0]
    assert {len(row) for row in group.completions} == {case.answers.shape[1]}


def rollout_transformers(case: Setting, cache: str | None) -> None:
    """`generate` of transformers with as many answers of the same length."""
    group, length = case.answers.shape
    case.plain.eval()
    made = case.plain.generate(
        case.prompt[None], attention_mask=torch.ones_like(case.prompt)[None], do_sample=True, top_k=0, top_p=1.0,
        num_return_sequences=group, max_new_tokens=length, min_new_tokens=length, cache_implementation=cache,
        pad_token_id=0,
    )  # fmt: skip
    case.plain.train()
    assert made.shape == (group, len(case.prompt) + length)


# --- timing -----------------------------------------------------------------------------------------------------------


@dataclass
class Progress:
    """What was measured so far, in a file, so that an interrupted bench resumes; `ends`: when it pauses."""

    file: Path
    ends: float
    found: dict[str, Any] = field(default_factory=dict)

    def once(self, key: str, measure: Callable[[], Any]) -> Any:
        """The saved value of a key, or what is measured now.

        Raises:
            KeyeError: the time of this call is over.
        """
        if key not in self.found:
            if time.monotonic() > self.ends:
                raise KeyeError(f"paused before {key}; the same command continues")
            self.found[key] = measure()
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_text(json.dumps(self.found, indent=1))
        return self.found[key]


def timed(call: Callable[[], None]) -> dict[str, float]:
    """Seconds of the clock and of the processor."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def alternate(
    what: str, calls: Mapping[str, Callable[[], None]], rounds: int, progress: Progress
) -> dict[str, list[dict[str, float]]]:
    """Times of each round. The first round has all ways, the others ours and the fastest of the others.

    The first way is ours. Rounds run the ways in alternating order.
    """
    found: dict[str, list[dict[str, float]]] = {name: [] for name in calls}
    ours, *others = calls
    chosen = list(calls)
    for number in range(rounds):
        for name in chosen if number % 2 == 0 else reversed(chosen):
            took = progress.once(f"{what}, round {number}: {name}", lambda name=name: timed(calls[name]))
            found[name].append(took)
            print(f"  {what}, round {number}, {name}: {took['cpu']:.1f} s of the processor", flush=True)
        chosen = [ours, min(others, key=lambda name: found[name][0]["cpu"])]
    return found


def speed(
    what: str, times: dict[str, list[dict[str, float]]], goal: float, tokens: Mapping[str, int]
) -> tuple[Claim, Table]:
    """The ratio of the fastest of the others to ours in the same round, and a row for each way."""
    ours, *others = times
    best = max(others, key=lambda name: len(times[name])) if len(times[ours]) > 1 else min(
        others, key=lambda name: times[name][0]["cpu"]
    )  # fmt: skip
    column = {kind: {name: [t[kind] for t in ts] for name, ts in times.items()} for kind in ("wall", "cpu")}
    wall, cpu = (ratio(column[kind][best], column[kind][ours]) for kind in ("wall", "cpu"))
    figure = f"{median(column['cpu'][ours]):.2f} against {median(column['cpu'][best]):.2f} s of the processor ({best})"
    said = f"{cpu:.1f} × as fast ({wall:.1f} × by the clock)"
    rows = [
        (
            name, f"{tokens[name]:,}", len(ts), f"{median(column['wall'][name]):.2f}",
            f"{median(column['cpu'][name]):.2f}", f"{column['cpu'][name][0] / column['cpu'][ours][0]:.2f}",
        )
        for name, ts in times.items()
    ]  # fmt: skip
    columns = ("way", "tokens read", "rounds", "seconds", "seconds of the processor", "× ours, first round")
    return Claim(what, f"≥ {goal:g} × as fast", figure, said, cpu >= goal), Table(what, columns, rows)


def main() -> None:
    parser: argparse.ArgumentParser = arguments(__doc__, EXAMPLES, results="rl")
    parser.add_argument("--rounds", type=int, help="rounds of each comparison (3; 1 with --quick)")
    parser.add_argument("--prompt", type=int, help="tokens of the prompt (8,000; 256 with --quick)")
    parser.add_argument("--layers", type=int, default=4, help="layers of the decoder (4, as the preset)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (1)")
    parser.add_argument("--minutes", type=float, default=60.0, help="pause after these; the same command continues")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    began, rounds = time.monotonic(), args.rounds or (1 if args.quick else 3)
    prompt, answer, group = args.prompt or (256 if args.quick else 8000), 16 if args.quick else 200, 8
    case = setting(prompt, answer, group, args.layers)
    shared, apart = prompt + group * answer, group * (prompt + answer)
    file = SCRATCH / f"{prompt}_{args.layers}_{args.threads}.json"
    forget_other_code(SCRATCH, ("keye", "stages", "rl"))
    saved = json.loads(file.read_text()) if file.exists() and not args.quick else {}
    progress = Progress(file, began + 60 * args.minutes, saved)
    found = progress.once("gradients", lambda: compare_gradients(case))
    ways: dict[str, Callable[[], None]] = {
        "prompt shared": lambda: update_once(case),
        "eight sequences, one by one": lambda: update_separately(case),
        "eight sequences in a packed row": lambda: update_packed(case),
        "eight sequences in a batch, transformers": lambda: update_transformers(case),
    }
    update, update_table = speed(
        "forward and backward pass of a group", alternate("update", _cleared(case, ways), rounds, progress),
        FASTER_UPDATE, {name: shared if name == "prompt shared" else apart for name in ways},
    )  # fmt: skip
    sampled: dict[str, Callable[[], None]] = {
        "prompt shared": lambda: rollout_ours(case),
        "generate of transformers, growing cache": lambda: rollout_transformers(case, None),
        "generate of transformers, static cache": lambda: rollout_transformers(case, "static"),
    }
    rolled, rollout_table = speed(
        "rollout of a group", alternate("rollout", sampled, rounds, progress), FASTER_ROLLOUT,
        {name: shared if name == "prompt shared" else apart for name in sampled},
    )  # fmt: skip
    claims = [
        Claim("tokens read in the update of a group", f"{shared:,} instead of {apart:,}", f"{read(case):,}",
              f"{apart / read(case):.1f} × fewer", read(case) == shared),
        *(
            Claim(f"gradients of the update against eight separate sequences, relative to the largest, in {dtype}",
                  f"≤ {BOUND:.0e}", f"{found[dtype]:.1e}", met=found[dtype] <= BOUND)
            for dtype in ("float64", "float32")
        ),
        update,
        rolled,
    ]  # fmt: skip
    notes = [
        f"Prompt of {prompt:,} tokens of text, {group} answers of {answer}; the decoder of the preset tiny with "
        f"{args.layers} layers and random weights, float32, {torch.get_num_threads()} thread. {rounds} rounds in "
        "alternating order; figures are medians, ratios medians over the rounds. The goals are compared with seconds "
        "of the processor, because other work shares the machine. The rollout's tokens read are those of prefill and "
        "decoding.",
        f"In float32, the rounding of eight separate sequences is {found['rounding']:.1e} of the largest gradient.",
    ]
    save(
        out_of(args), "group_price", claims, [update_table, rollout_table], seconds=time.monotonic() - began,
        quick=args.quick, seeds={"weights, tokens and sampling": SEED}, notes=notes,
    )  # fmt: skip


def read(case: Setting) -> int:
    """Tokens that the decoder reads in the update, counted at its embedding."""
    counted: list[int] = []
    table = case.model.get_input_embeddings()
    handle = table.register_forward_hook(lambda _, args, __: counted.append(args[0].numel()))
    with torch.no_grad():
        score(case.model, [case.group])
    handle.remove()
    return sum(counted)


def _cleared(case: Setting, ways: Mapping[str, Callable[[], None]]) -> dict[str, Callable[[], None]]:
    """The calls, each of which begins without gradients."""

    def begin(call: Callable[[], None]) -> Callable[[], None]:
        def cleared() -> None:
            case.model.zero_grad(set_to_none=True)
            case.plain.zero_grad(set_to_none=True)
            call()

        return cleared

    return {name: begin(call) for name, call in ways.items()}


if __name__ == "__main__":
    run(main)
