"""Layers of the 8B shapes on one GPU with 8K packed tokens: their share of the machine's matrix rate.

Needs torch, transformers and this repository. Rows are independent: a row that fails or exceeds the time limit is
reported, and the others continue. `--small --device cpu` runs the same code on small shapes as a smoke test.
"""

import argparse
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from keye.errors import KeyeError, run
from keye.model import flops
from keye.model.attention import available, choose, varlen
from scripts.bench.common.record import ROOT, Claim, Table, arguments, out_of, save
from scripts.bench.common.timing import in_turn, ratio
from scripts.bench.model import layers as layers_of
from scripts.bench.model.settings import Row, Sizes, groups, sizes_of

EXAMPLES = """examples:
  python -m scripts.bench model --gpu                       on a machine with a GPU; eight minutes at most
  python -m scripts.bench model --gpu --small --device cpu  the same code on small shapes, anywhere
"""
GOAL = 0.5
COLUMNS = ("layers", "setting", "ms, forward + backward", "TFLOP/s", "of the ceiling", "MB kept", "MB at the peak")
# Relative errors that a few roundings explain; a wrong mask or scale is off by a tenth and more.
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2**-6}


class Bench:
    """Measures on one device until its time is up, prints each row, and keeps what it has in a file."""

    def __init__(self, sizes: Sizes, device: torch.device, out: Path, part: str, limit: float) -> None:
        self.sizes, self.device, self.out, self.part = sizes, device, out, part
        self.began, self.limit = time.monotonic(), limit
        self.ceiling, self.claims, self.tables = 0.0, [], []
        self.rows: list[Row] = []

    @property
    def spent(self) -> float:
        return time.monotonic() - self.began

    def keep(self, final: bool = False) -> None:
        """Write what there is; under a name of its own until all is measured, so that no whole result is lost."""
        partial = self.out / f"{self.part}_partial.json"
        quick = self.sizes.dtype is torch.float32
        name = self.part if final else partial.stem
        claims = self.claims if final else []
        save(self.out, name, claims, self.tables, seconds=self.spent, quick=quick, notes=NOTES)
        if final:
            partial.unlink(missing_ok=True)

    def add(self, table: Table) -> None:
        self.tables.append(table)
        self.keep()

    def matrices(self) -> None:
        """The ceiling: the fastest product of two large random matrices."""
        rows = []
        for m, n, k in self.sizes.matrices:
            a, b = (torch.randn(s, device=self.device, dtype=self.sizes.dtype) for s in ((m, k), (k, n)))
            calls = {"product": lambda a=a, b=b: a @ b}
            took = median(in_turn(calls, self.sizes.rounds, self.device, warm_up=5)["product"])
            rate = 2 * m * n * k / took
            self.ceiling = max(self.ceiling, rate)
            rows.append((f"{m} × {k} by {k} × {n}", f"{took * 1e3:.3f}", f"{rate / 1e12:.3g}"))
            say(f"matrix product {rows[-1][0]}: {rate / 1e12:.3g} TFLOP/s")
        self.add(Table("The ceiling, products of random matrices", ("shape", "ms", "TFLOP/s"), rows))

    def attention(self) -> None:
        """Every backend alone, forward and backward, against plain attention in float32."""
        vision, text = self.sizes.config.vision_config, self.sizes.config.text_config
        frames, documents = next(iter(self.sizes.frames.values())), list(self.sizes.documents.values())[-1]
        head = vision.hidden_size // vision.num_attention_heads
        cases = {
            "frames of the tower": ([h * w for h, w in frames], vision.num_attention_heads, 0, head, False),
            "documents of the decoder": (
                documents, text.num_attention_heads, text.num_key_value_heads, text.head_dim, True
            ),
        }  # fmt: skip
        rows = []
        for case, (lengths, heads, shared, size, causal) in cases.items():
            rows += self._attention_case(case, lengths, heads, shared or heads, size, causal)
        columns = ("over", "backend", "forward ms", "forward + backward ms", "TFLOP/s", "error", "error of gradients")
        self.add(
            Table("Packed attention alone; errors are relative, against plain attention in float32", columns, rows)
        )

    def _attention_case(
        self, case: str, lengths: list[int], heads: int, shared: int, size: int, causal: bool
    ) -> Iterable[tuple]:
        draw = torch.Generator().manual_seed(2)
        shapes = [(sum(lengths), heads, size)] + [(sum(lengths), shared, size)] * 2
        drawn = [torch.randn(s, generator=draw).to(self.device, self.sizes.dtype) for s in (*shapes, shapes[0])]
        cu_seqlens = layers_of.bounds(lengths, self.device)
        work = 4 * heads * size * flops.attention_pairs(lengths, causal)
        bound, exact, fastest = BOUNDS[self.sizes.dtype], None, {}
        for backend in available(self.device):
            if choose(backend, self.device, self.sizes.dtype, size, heads // shared) != backend:
                yield (case, backend, "–", "–", "–", "takes no heads of this size or dtype", "–")
                continue
            try:
                if exact is None:
                    exact = _attended([x.float() for x in drawn], cu_seqlens, causal, "plain")
                q, k, v = (x.clone().requires_grad_() for x in drawn[:3])
                found = _attended(drawn, cu_seqlens, causal, backend)
                errors = [float((a.float() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]

                def forward(q=q, k=k, v=v, backend=backend) -> Tensor:
                    return varlen(q, k, v, cu_seqlens, causal, backend=backend)

                def both(forward=forward, inputs=(q, k, v)) -> object:
                    return torch.autograd.grad(forward(), inputs, drawn[3])

                calls = {"forward": torch.no_grad()(forward), "both": both}
                times = in_turn(calls, self.sizes.rounds, self.device, warm_up=2)
                ahead, whole = (median(times[name]) for name in calls)
            except Exception as error:  # a foreign kernel may raise anything; the others are still measured
                yield (case, backend, "–", "–", "–", f"failed: {first_line(error)}", "–")
                self.claims.append(_same(case, backend, "failed", False))
                continue
            worst = max(errors[1:])
            rate = flops.TRAINING * work / whole / 1e12
            row = (f"{ahead * 1e3:.2f}", f"{whole * 1e3:.2f}", f"{rate:.3g}", f"{errors[0]:.1e}", f"{worst:.1e}")
            fastest[backend] = times["both"]
            say(f"attention, {case}, {backend}: {row[1]} ms, {row[2]} TFLOP/s, error {row[3]}, {row[4]}")
            if backend != "plain":
                figure = f"{errors[0]:.1e}, gradients {worst:.1e}"
                self.claims.append(_same(case, backend, figure, max(errors) < bound, f"≤ {bound:.1e}"))
            yield (case, backend, *row)
        if len(fastest) > 2 and "sdpa" in fastest:
            best = min(fastest, key=lambda name: median(fastest[name]))
            times = ratio(fastest[best], fastest["sdpa"])
            figure = f"{median(fastest[best]) * 1e3:.2f} against {median(fastest['sdpa']) * 1e3:.2f} ms ({best})"
            claim = f"attention over {case}: the fastest backend compared with sdpa, forward + backward"
            self.claims.append(Claim(claim, "no slower", figure, f"{times:.2f} × its time", times <= 1.0))

    def stacks(self, rows: Sequence[Row]) -> None:
        """Warm all up, then time them in turn; each one's memory is taken alone."""
        calls = {}
        for number, row in enumerate(rows):
            if self.spent > self.limit:
                row.failure = "not measured: the time was up"
                continue
            try:
                calls[str(number)] = self._ready(row)
            except Exception as error:  # out of memory, a compiler's own; the others are still measured
                row.failure = f"failed: {first_line(error)}"
                say(f"{row.name}, {row.setting}: {row.failure}")
        for number, times in in_turn(calls, self.sizes.rounds, self.device).items():
            row = rows[int(number)]
            row.times = times
            say(f"{row.name}, {row.setting}: {row.took / row.count * 1e3:.2f} ms, {row.rate / 1e12:.3g} TFLOP/s")
        self.rows += rows
        self.add(Table(f"One layer: {rows[0].name}", COLUMNS, [self._cells(row) for row in rows]))
        calls.clear()
        torch.compiler.reset()  # the next packing has other shapes: it would count as recompilation
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _ready(self, row: Row) -> Callable[[], object]:
        """Build and compile a stack, run it, note its memory."""
        stack = row.make()
        if row.compiled:
            stack.compile(self.sizes.compiler, fullgraph=row.setting.startswith("ours"))
        row.flops, row.count = stack.flops, len(stack.layers)
        for _ in range(2):
            stack.step(row.recompute)
        if self.device.type == "cuda":
            stack.forget()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            output = stack.forward(row.recompute)
            row.kept = (torch.cuda.memory_allocated() - before) / row.count / 2**20
            stack.backward(output)
            row.peak = (torch.cuda.max_memory_allocated() - before) / row.count / 2**20
        return lambda: stack.step(row.recompute)

    def _cells(self, row: Row) -> tuple:
        if row.failure:
            return (row.name, row.setting, row.failure, *["–"] * 4)
        memory = [f"{size:.0f}" if size else "–" for size in (row.kept, row.peak)]
        share = f"{row.rate / self.ceiling:.0%}"
        return (row.name, row.setting, f"{row.took / row.count * 1e3:.3f}", f"{row.rate / 1e12:.3g}", share, *memory)

    def conclude(self) -> None:
        """The claims on layers: the share of the ceiling, and the comparison with transformers."""
        for kind in ("vision", "decoder"):
            ours, theirs = ([r for r in self._of(kind) if r.setting.startswith(w)] for w in ("ours", "Qwen2.5-VL"))
            if ours:
                best = max(ours, key=lambda r: r.rate)
                share = best.rate / self.ceiling
                figure = f"{share:.0%} ({best.rate / 1e12:.3g} TFLOP/s; {best.name}, {best.setting})"
                claim = f"{kind} layers, forward + backward, share of the measured matrix ceiling"
                self.claims.append(Claim(claim, f"≥ {GOAL:.0%}", figure, met=share >= GOAL))
            for name in dict.fromkeys(row.name for row in theirs):
                self._compare([r for r in ours if r.name == name], [r for r in theirs if r.name == name])

    def _of(self, kind: str) -> list[Row]:
        return [row for row in self.rows if row.name.startswith(kind) and row.times]

    def _compare(self, ours: list[Row], theirs: list[Row]) -> None:
        if not ours:
            return
        mine, other = (min(rows, key=lambda r: r.took) for rows in (ours, theirs))
        times = ratio(mine.times, other.times)
        figure = f"{mine.took / mine.count * 1e3:.2f} against {other.took / other.count * 1e3:.2f} ms a layer"
        claim = f"{mine.name}: compared with transformers' Qwen2.5-VL, each in its fastest setting"
        self.claims.append(Claim(claim, "no slower", figure, f"{times:.2f} × its time", times <= 1.0))


NOTES = [
    "Operations are those of the model (forward, and twice that backward); what checkpointing computes again is not "
    "counted, causal attention counts the pairs it sees. 'ours' names the attention backend. Qwen2.5-VL is run with "
    "sdpa: frame by frame in the tower, documents kept apart by a mask in the decoder. Its gated vision MLPs are two "
    "thirds as wide inside, so that both take the same number of operations.",
    "Times and memory are a layer's, times medians over rounds in alternating order after a warm-up; 'kept' is what a "
    "forward pass leaves for the backward pass, the peak is the most above the weights in a step, gradients included.",
]


def _attended(drawn: Sequence[Tensor], cu_seqlens: Tensor, causal: bool, backend: str) -> tuple[Tensor, ...]:
    """Output and the gradients of q, k and v for the last of `drawn`."""
    q, k, v = (x.clone().requires_grad_() for x in drawn[:3])
    out = varlen(q, k, v, cu_seqlens, causal, backend=backend)
    return (out.detach(), *torch.autograd.grad(out, (q, k, v), drawn[3]))


def _same(case: str, backend: str, figure: str, met: bool, goal: str = "runs") -> Claim:
    return Claim(f"attention over {case}, {backend}: relative error against plain in float32", goal, figure, met=met)


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no reason given'])[0][:160]}"


def say(line: str) -> None:
    print(line, flush=True)


def parser() -> argparse.ArgumentParser:
    found = arguments(__doc__, EXAMPLES, results="model")
    found.add_argument("--gpu", action="store_true", help="this part; what python -m scripts.bench model --gpu runs")
    found.add_argument("--device", default="cuda", help="cuda, or cpu with --small")
    found.add_argument("--small", action="store_true", help="small shapes: shows that it runs, proves nothing")
    found.add_argument("--limit", type=float, default=390, help="seconds after which no new row is begun")
    return found


def main() -> int:
    args = parser().parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(
            "no CUDA here, so nothing was measured and no earlier result was touched: TFLOP/s, share of the matrix "
            "ceiling and memory of the 8B layers, and the fused attention backends, need a GPU. On a machine with one: "
            "python -m scripts.bench model --gpu. The same code on small shapes: add --small --device cpu"
        )
        return 0
    if device.type != "cuda" and not args.small:
        raise KeyeError(f"--device {args.device} takes --small: the 8B layers are measured on a GPU")
    if args.small and args.out is None:
        args.out = ROOT / ".cache" / "bench" / "quick_model"
    measure(sizes_of(args.small), device, out_of(args), args.limit)
    return 0


def measure(sizes: Sizes, device: torch.device, out: Path, limit: float) -> None:
    """All of it, into `<out>/gpu.json`."""
    torch.manual_seed(0)
    bench = Bench(sizes, device, out, "gpu", limit)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU (no GPU)"
    memory = f"{torch.cuda.mem_get_info(device)[1] / 2**30:.0f} GB" if device.type == "cuda" else "–"
    backends = ", ".join(available(device))
    cells = (name, memory, torch.version.cuda or "–", backends, str(sizes.dtype).removeprefix("torch."))
    say(f"device: {name}; attention backends that run here: {backends}")
    bench.add(Table("Device", ("device", "memory", "CUDA", "attention backends", "dtype"), [cells]))
    bench.matrices()
    bench.attention()
    for rows in groups(sizes, device):
        bench.stacks(rows)
    bench.conclude()
    bench.keep(final=True)
    say(f"took {bench.spent:.0f} s")


if __name__ == "__main__":
    run(main)
