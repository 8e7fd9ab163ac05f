"""Documents of mixed lengths packed or padded, and frames of mixed sizes in one call or in one call for each."""

import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from keye import KeyeForConditionalGeneration
from keye.errors import run
from keye.model import flops
from keye.model.vision import KeyeVisionModel
from scripts.bench.common.record import Claim, Table, arguments, out_of, save
from scripts.bench.common.timing import in_turn, ratio
from scripts.bench.model.pairs import our_config

CPU = torch.device("cpu")
SEED = 4
EXAMPLES = "examples:\n  python -m scripts.bench model --part packing\n"


def mixed_lengths(count: int, longest: int, draw: torch.Generator) -> list[int]:
    """Lengths as of a training mixture: log-normal, sigma 1, the longest of them `longest`."""
    drawn = torch.randn(count, generator=draw).exp()
    return (drawn / drawn.max() * longest).round().clamp(min=8).int().tolist()


def rows(lengths: list[int], vocab: int, draw: torch.Generator) -> dict[str, dict[str, Tensor]]:
    """The same documents as one packed row and as a padded batch; every token but the first of each is learnt."""
    documents = [torch.randint(8, vocab, (length,), generator=draw) for length in lengths]
    longest = max(lengths)
    ids = torch.stack([F.pad(d, (0, longest - len(d))) for d in documents])
    mask = torch.stack([torch.arange(longest) < length for length in lengths]).long()
    shifted = [F.pad(d[1:], (0, 1), value=-100) for d in documents]
    packed = {
        "input_ids": torch.cat(documents)[None],
        "shift_labels": torch.cat(shifted)[None],
        "cu_seqlens": F.pad(torch.tensor(lengths).cumsum(0), (1, 0)),
        "position_ids": torch.cat([torch.arange(length) for length in lengths]).expand(3, 1, -1),
    }
    padded = {
        "input_ids": ids,
        "attention_mask": mask,
        "shift_labels": torch.stack([F.pad(s, (0, longest - len(s)), value=-100) for s in shifted]),
    }
    return {"packed": packed, "padded": padded}


def documents(quick: bool, rounds: int) -> tuple[list[Claim], Table]:
    """A train step of the decoder on packed and on padded documents."""
    draw = torch.Generator().manual_seed(SEED)
    torch.manual_seed(0)
    model = KeyeForConditionalGeneration(our_config("tiny" if quick else "middle")).train()
    lengths = mixed_lengths(6 if quick else 12, 128 if quick else 512, draw)
    given = rows(lengths, model.config.text_config.vocab_size, draw)
    losses = {}

    def step(name: str) -> Callable[[], None]:
        def call() -> None:
            model.zero_grad(set_to_none=True)
            loss = model(**given[name]).loss
            loss.backward()
            losses[name] = float(loss.detach())

        return call

    times = in_turn({name: step(name) for name in given}, rounds, CPU)
    filled = sum(lengths) / (len(lengths) * max(lengths))
    text = model.config.text_config
    work = [flops.decoder(text, x).total for x in (lengths, [max(lengths)] * len(lengths))]
    share = ratio(times["packed"], times["padded"])
    took = {name: median(values) for name, values in times.items()}
    figure = (
        f"{took['packed'] * 1e3:.0f} against {took['padded'] * 1e3:.0f} ms; text fills {filled:.0%} of the padded batch"
    )
    claims = [
        Claim("train step on packed documents of mixed lengths compared with padded ones", "faster", figure,
              f"{share:.2f} × its time", share < 1),
        Claim("the same loss", "≤ 1e-5", f"{abs(losses['packed'] - losses['padded']):.1e}",
              met=abs(losses["packed"] - losses["padded"]) <= 1e-5),
    ]  # fmt: skip
    cells = [
        (name, tokens, f"{part / work[1]:.2f}", f"{took[name] * 1e3:.1f}", f"{sum(lengths) / took[name]:.0f}")
        for name, tokens, part in zip(given, (sum(lengths), len(lengths) * max(lengths)), work, strict=True)
    ]
    columns = ("documents", "positions computed", "share of operations", "ms a step", "tokens of text a second")
    return claims, Table(f"{len(lengths)} documents of {min(lengths)} to {max(lengths)} tokens", columns, cells)


def frames(quick: bool, rounds: int) -> tuple[list[Claim], Table]:
    """The tower over frames of many sizes: one packed call, and a call for each frame."""
    draw = torch.Generator().manual_seed(SEED)
    torch.manual_seed(0)
    tower = KeyeVisionModel(our_config("tiny" if quick else "middle").vision_config).train()
    count = 8 if quick else 24
    grid = torch.cat((torch.ones(count, 1, dtype=torch.long), 2 * torch.randint(1, 11, (count, 2), generator=draw)), 1)
    sizes = grid.prod(1).tolist()
    pixels = torch.randn(sum(sizes), 3, 14, 14, generator=draw)
    parts = list(zip(pixels.split(sizes), grid.split(1), strict=True))

    def together() -> None:
        tower.zero_grad(set_to_none=True)
        tower(pixels, grid).sum().backward()

    def alone() -> None:
        tower.zero_grad(set_to_none=True)
        for part, size in parts:
            tower(part, size).sum().backward()

    times = in_turn({"one packed call": together, "a call for each frame": alone}, rounds, CPU)
    share = ratio(*times.values())
    took = [(name, f"{median(values) * 1e3:.1f}") for name, values in times.items()]
    figure = f"{took[0][1]} against {took[1][1]} ms"
    claim = "tower, frames of mixed sizes in one packed call compared with a call for each, forward + backward"
    claims = [Claim(claim, "faster", figure, f"{share:.2f} × its time", share < 1)]
    return claims, Table(f"{count} frames of {min(sizes)} to {max(sizes)} patches, milliseconds", ("how", "ms"), took)


def main() -> None:
    parser = arguments(__doc__, EXAMPLES, results="model")
    parser.add_argument("--rounds", type=int, help="rounds of each comparison (7; 2 with --quick)")
    args = parser.parse_args()
    began = time.monotonic()
    rounds = args.rounds or (2 if args.quick else 7)
    claims, tables = [], []
    for part in (documents, frames):
        found, table = part(args.quick, rounds)
        claims += found
        tables.append(table)
    notes = [
        f"The middle widths of the part `speed`, float32, processor time, threads: {torch.get_num_threads()}; rounds "
        "alternate after a warm-up, ratios are medians."
    ]
    save(
        out_of(args), "packing", claims, tables, seconds=time.monotonic() - began, quick=args.quick,
        seeds={"lengths and sizes": SEED}, notes=notes
    )  # fmt: skip


if __name__ == "__main__":
    run(main)
