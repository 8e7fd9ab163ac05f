"""Part b: every attention backend alone, forward and backward, against plain attention in float32.

The tower's attention (heads of 72, full) runs over the frames of real plans, the decoder's (heads of 128, causal, four
queries a key) over packed documents and over one long document.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from keye.errors import run
from keye.model import flops
from keye.model.attention import available, choose, varlen
from scripts.bench.common.record import Claim, Table
from scripts.bench.common.timing import in_turn, ratio
from scripts.bench.gpu.journal import Journal, Values, parser
from scripts.bench.gpu.plans import plans_in
from scripts.bench.gpu.settings import Sizes, sizes_of
from scripts.bench.gpu.stacks import ceiling_of, ceiling_table
from scripts.bench.model.layers import bounds

PART = "attention"
# Relative errors that a few roundings explain; a wrong mask or scale is off by a tenth and more.
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2**-6}
COLUMNS = (
    "over", "backend", "forward ms", "forward + backward ms", "TFLOP/s", "error", "error of gradients",
)  # fmt: skip
NOTES = [
    "Errors are relative, of the output and the worst of the gradients of queries, keys and values, against plain "
    "attention in float32. Times are medians over rounds. A backend that takes no heads of this size or dtype, or that "
    "is not installed, has no row.",
]


@dataclass(frozen=True)
class Case:
    """Attention over segments of these lengths; shared: heads of keys and values."""

    name: str
    lengths: Sequence[int]
    heads: int
    shared: int
    size: int
    causal: bool


def cases_of(sizes: Sizes) -> list[Case]:
    vision, text = sizes.config.vision_config, sizes.config.text_config
    frames = [height * width for height, width in list(sizes.frames.values())[-1]]
    heads, size = vision.num_attention_heads, vision.hidden_size // vision.num_attention_heads
    found = [Case(f"frames of real plans, heads of {size}", frames, heads, heads, size, False)]
    for name, lengths in sizes.documents.items():
        name = f"decoder, {name}, heads of {text.head_dim}"
        found.append(Case(name, lengths, text.num_attention_heads, text.num_key_value_heads, text.head_dim, True))
    return found


def measure(case: Case, backend: str, sizes: Sizes, device: torch.device) -> Values:
    """Times, rate and errors of one backend."""
    total = sum(case.lengths)
    draw = torch.Generator().manual_seed(2)
    shapes = [(total, case.heads, case.size)] + [(total, case.shared, case.size)] * 2
    drawn = [torch.randn(shape, generator=draw).to(device, sizes.dtype) for shape in (*shapes, shapes[0])]
    cu_seqlens = bounds(case.lengths, device)
    exact = attended([x.float() for x in drawn], cu_seqlens, case.causal, "plain")
    found = attended(drawn, cu_seqlens, case.causal, backend)
    errors = [float((a.float() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]
    q, k, v = (x.clone().requires_grad_() for x in drawn[:3])

    def forward() -> Tensor:
        return varlen(q, k, v, cu_seqlens, case.causal, backend=backend)

    calls = {
        "forward": torch.no_grad()(forward),
        "both": lambda: torch.autograd.grad(forward(), (q, k, v), drawn[3]),
    }
    times = in_turn(calls, sizes.rounds, device, warm_up=2)
    work = 4 * case.heads * case.size * flops.attention_pairs(case.lengths, case.causal)
    return {
        "forward": median(times["forward"]),
        "both": times["both"],
        "rate": flops.TRAINING * work / median(times["both"]),
        "error": errors[0],
        "gradients": max(errors[1:]),
    }


def attended(drawn: Sequence[Tensor], cu_seqlens: Tensor, causal: bool, backend: str) -> tuple[Tensor, ...]:
    """Output and the gradients of q, k and v for the last of `drawn`."""
    q, k, v = (x.clone().requires_grad_() for x in drawn[:3])
    out = varlen(q, k, v, cu_seqlens, causal, backend=backend)
    return (out.detach(), *torch.autograd.grad(out, (q, k, v), drawn[3]))


def backends_of(case: Case, sizes: Sizes, device: torch.device) -> list[str]:
    """The backends that compute this kind of attention themselves."""
    kind = (device, sizes.dtype, case.size, case.heads // case.shared)
    return [name for name in available(device) if choose(name, *kind) == name]


def table_of(journal: Journal, cases: Sequence[Case]) -> Table:
    rows = []
    for case in cases:
        for key, found in journal.found.items():
            if key.startswith(f"{case.name}: "):
                times = (f"{found['forward'] * 1e3:.2f}", f"{median(found['both']) * 1e3:.2f}")
                errors = (f"{found['error']:.1e}", f"{found['gradients']:.1e}")
                backend = key.removeprefix(f"{case.name}: ")
                rows.append((case.name, backend, *times, f"{found['rate'] / 1e12:.3g}", *errors))
    return Table("Packed attention alone", COLUMNS, rows)


def claims_of(journal: Journal, cases: Sequence[Case], sizes: Sizes) -> list[Claim]:
    """Each backend equals plain attention, and the fastest is no slower than sdpa."""
    claims, bound = [], BOUNDS[sizes.dtype]
    for case in cases:
        found = {key.partition(": ")[2]: row for key, row in journal.found.items() if key.startswith(f"{case.name}: ")}
        for backend, row in found.items():
            if backend != "plain":
                worst = max(row["error"], row["gradients"])
                figure = f"{row['error']:.1e}, gradients {row['gradients']:.1e}"
                claim = f"{case.name}, {backend}: relative error against plain attention in float32"
                claims.append(Claim(claim, f"≤ {bound:.1e}", figure, met=worst <= bound))
        if len(found) > 2 and "sdpa" in found:
            best = min(found, key=lambda name: median(found[name]["both"]))
            fast, sdpa = found[best]["both"], found["sdpa"]["both"]
            figure = f"{median(fast) * 1e3:.2f} against {median(sdpa) * 1e3:.2f} ms ({best})"
            claim, times = f"{case.name}: the fastest backend compared with sdpa", ratio(fast, sdpa)
            claims.append(Claim(claim, "no slower", figure, f"{times:.2f} × its time", times <= 1.0))
    return claims


def main() -> int:
    args = parser(__doc__, PART).parse_args()
    journal = Journal.open(args, PART)
    sizes = sizes_of(journal.small, plans_in(journal.plans, journal.small))
    cases = cases_of(sizes)
    journal.tables = lambda: [ceiling_table(journal), table_of(journal, cases)]
    ceiling_of(journal, sizes)
    for case in cases:
        for backend in backends_of(case, sizes, journal.device):
            journal.row(f"{case.name}: {backend}", lambda c=case, b=backend: measure(c, b, sizes, journal.device))
    journal.save(claims_of(journal, cases, sizes), NOTES)
    return 0


if __name__ == "__main__":
    run(main)
