"""The rows of a part: each is written when it is measured, kept by a rerun, and a failure is a row with its sentence.

`<out>/rows/<part>.jsonl` has a line when a row begins and one when it ends. A rerun on the same device takes finished
rows from there and measures the others, those that failed included. A row that has twice ended its process is left
out; a row that the runner has stopped for its time is not. `<out>/<part>.json` is written again after each row, in the
format of `scripts.bench.common.record`.
"""

import argparse
import gc
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from keye.errors import KeyeError
from keye.files import write_atomically
from scripts.bench.common.record import RESULTS, ROOT, Claim, Table, arguments, save

Values = dict[str, Any]
LIMIT = 420.0  # seconds after which a part begins no further row
QUICK = ROOT / ".cache" / "bench" / "quick_gpu"
PLANS = ROOT / ".cache" / "bench" / "gpu_plans"
TIMES_UP = "not measured: the time of the part was up; the same command continues"
STOPPED = "not measured: it was stopped when the time of the part was up; the same command continues"
SMALL = (
    "Small shapes on a CPU: this shows that the part runs and that its results agree with their references. Its times "
    "are not those of a GPU, and nothing is claimed."
)


def parser(about: str | None, part: str) -> argparse.ArgumentParser:
    """The options that every part has."""
    module = f"python -m scripts.bench.gpu.parts.{part}"
    examples = (
        f"examples:\n  {module}                        on a machine with a GPU; eight minutes at most\n"
        f"  {module} --small --device cpu   the same code on small shapes, anywhere\n"
    )
    made: argparse.ArgumentParser = arguments(about or "", examples, results="gpu")
    made.add_argument("--device", default="cuda", help="cuda, or cpu with --small")
    made.add_argument("--small", action="store_true", help="small shapes: shows that it runs, proves nothing")
    made.add_argument(
        "--limit", type=float, default=LIMIT, help=f"seconds after which no further row is begun ({LIMIT:.0f})"
    )
    made.add_argument("--plans", type=Path, default=PLANS, help="folder of decoded plans (.cache/bench/gpu_plans)")
    made.add_argument("--again", action="store_true", help="measure all rows again")
    made.add_argument("--parent", type=int, metavar="PROCESS", help="end with this process, which has started the part")
    return made


def check_device(name: str, small: bool, what: str) -> torch.device:
    """The device that `what` is measured on.

    Raises:
        KeyeError: the device is not there, or a CPU is to measure shapes of a GPU.
    """
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise KeyeError(
            f"{what} is measured on a GPU, and torch finds none here; no earlier result was touched. The same code "
            "on small shapes: --small --device cpu"
        )
    if device.type != "cuda" and not small:
        raise KeyeError(f"--device {name} takes --small: {what} at the shapes of the 8B model needs a GPU")
    return device


@dataclass
class Journal:
    """What a part has measured, and where it goes.

    Attributes:
        part: name of the part's module.
        device, small: what is measured on, and whether the shapes are small.
        found: key → values of the finished rows. failed: key → sentence of the others.
        tables: makes the tables of the rows so far, for the record that is written after each row.
    """

    part: str
    out: Path
    device: torch.device
    small: bool
    limit: float
    plans: Path
    began: float = field(default_factory=time.monotonic)
    found: dict[str, Values] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    tables: Callable[[], Sequence[Table]] = tuple
    _fatal: dict[str, int] = field(default_factory=dict)
    _before: float = 0.0  # seconds of the rows of earlier calls

    @classmethod
    def open(cls, args: argparse.Namespace, part: str) -> "Journal":
        """The journal of a part as an earlier call left it.

        Raises:
            KeyeError: the device is not there, or a CPU is to measure shapes of a GPU.
        """
        if args.quick:
            args.small, args.device = True, "cpu"
        device = check_device(args.device, args.small, part)
        if args.parent:
            end_with(args.parent)
        out = args.out or (QUICK if args.small else RESULTS / "gpu")
        journal = cls(part, out.resolve(), device, args.small, args.limit, args.plans.resolve())
        journal._read(args.again)
        return journal

    @property
    def path(self) -> Path:
        return self.out / "rows" / f"{self.part}.jsonl"

    @property
    def name(self) -> str:
        """The device in words."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "the CPU"

    @property
    def spent(self) -> float:
        return time.monotonic() - self.began

    @property
    def time_is_up(self) -> bool:
        return self.spent > self.limit

    def row(self, key: str, measure: Callable[[], Values], retry: bool = True) -> Values | None:
        """The values of a row: those of an earlier call, or what is measured now; None if it fails or time is up.

        Args:
            key: name of the row, unique in the part.
            measure: returns plain values.
            retry: whether a row that failed in an earlier call is measured again.
        """
        if key in self.found:
            return self.found[key]
        if self._fatal.get(key, 0) >= 2:
            self.failed[key] = "not measured: it ended its process twice; --again measures it once more"
            return None
        if not retry and key in self.failed:
            return None
        if self.time_is_up:
            self.failed[key] = TIMES_UP
            return None
        self._write({"key": key, "state": "begun"})
        began = time.monotonic()
        try:
            values = measure()
            self.found[key] = values
            self.failed.pop(key, None)
            self._write({"key": key, "state": "done", "seconds": round(time.monotonic() - began, 2), "values": values})
            say(f"{key}: {', '.join(f'{name} {short(value)}' for name, value in values.items())}")
        except Exception as error:  # a kernel, a compiler or an allocator may raise anything; other rows still run
            self.failed[key] = failure(error)
            self._write({"key": key, "state": "failed", "reason": self.failed[key]})
            say(f"{key}: {self.failed[key]}")
            return None
        finally:
            release(self.device)
            self.save()
        return self.found[key]

    def save(self, claims: Sequence[Claim] = (), notes: Sequence[str] = ()) -> Path:
        """Write the record with the rows so far; without claims where the shapes are small."""
        device = Table("Device", ("device", "memory", "CUDA", "torch", "transformers"), [self._device()])
        tables = [device, *self.tables()]
        if self.failed:
            rows = list(self.failed.items())
            tables.append(Table("Failed or not measured", ("row", "reason"), rows))
        return save(
            self.out, self.part, () if self.small else claims, tables, seconds=self._before + self.spent,
            quick=self.small, seeds={"weights and data": 0},
            notes=[*([SMALL] if self.small else []), *notes],
        )  # fmt: skip

    def _device(self) -> tuple[str, ...]:
        memory = "–"
        if self.device.type == "cuda":
            memory = f"{torch.cuda.get_device_properties(self.device).total_memory / 1e9:.0f} GB"
        return self.name, memory, torch.version.cuda or "–", torch.__version__, transformers.__version__

    def _header(self) -> Values:
        return {"device": self.name, "small": self.small, "torch": torch.__version__}

    def _read(self, again: bool) -> None:
        if self.path.exists():
            lines = complete_lines(self.path)
            # A line that a kill cut off would spoil the next one.
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            write_atomically(self.path, text)
            if again or not lines or lines[0] != self._header():
                self.path.replace(self.path.with_suffix(".jsonl.old"))  # of another device or version, kept aside
            else:
                self._replay(lines[1:])
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._write(self._header())

    def _replay(self, lines: list[Values]) -> None:
        for line in lines:
            key, state = line["key"], line["state"]
            if state == "begun":
                self._fatal[key] = self._fatal.get(key, 0) + 1
                continue
            if state == "stopped":
                self._fatal[key] = max(0, self._fatal.get(key, 0) - 1)
                self.failed[key] = STOPPED
                continue
            self._fatal.pop(key, None)
            if state == "done":
                self.found[key] = line["values"]
                self.failed.pop(key, None)
                self._before += line["seconds"]
            else:
                self.failed[key] = line["reason"]

    def _write(self, line: Values) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


def mark_stopped(out: Path, part: str) -> None:
    """Note that the row that a part was measuring was stopped from outside, and did not end the process itself."""
    path = out / "rows" / f"{part}.jsonl"
    lines = complete_lines(path)[1:] if path.exists() else []
    if lines and lines[-1]["state"] == "begun":
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": lines[-1]["key"], "state": "stopped"}, ensure_ascii=False) + "\n")


def end_with(parent: int, period: float = 0.5) -> None:
    """From a thread, end the process group of this process once its parent is another than `parent`."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(period)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def complete_lines(path: Path) -> list[Values]:
    """The objects of a JSONL file; a last line that a kill cut off is left out."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found


def release(device: torch.device) -> None:
    """Give back what a row has allocated on the device."""
    gc.collect()
    torch.compiler.reset()  # shapes of the next row would count as recompilations
    if device.type == "cuda":
        torch.cuda.empty_cache()


def failure(error: BaseException) -> str:
    """The sentence of a row that failed; where it does not say all, the traceback goes to stderr."""
    if not isinstance(error, KeyeError):
        traceback.print_exception(error, file=sys.stderr)
    return f"failed: {type(error).__name__}: {(str(error).strip().splitlines() or ['no reason given'])[0][:200]}"


def short(value: object) -> str:
    """A value as it is printed while the part runs."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value) if len(str(value)) <= 60 else f"{str(value)[:57]}…"


def say(line: str) -> None:
    print(line, flush=True)


def synchronize(device: torch.device) -> None:
    """Wait for what is queued on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def begin_peak(device: torch.device) -> int:
    """Bytes allocated on the GPU now; its peak counts from here. 0 on a CPU."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def peak_gb(device: torch.device) -> float | None:
    """GB allocated on the GPU at the peak since `begin_peak`; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None


def cell(value: float | None, form: str = ".3g") -> str:
    """A number for a table; "–" where there is none."""
    return "–" if value is None else format(value, form)
