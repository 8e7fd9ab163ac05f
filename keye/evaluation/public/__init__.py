"""Public benchmarks read from their official local directories, behind one protocol.

Prompts, frames and answer rules are those that the authors of a benchmark publish; the module of each benchmark names
its sources. Nothing is downloaded.
"""

from pathlib import Path
from typing import Any

from keye.checks import suggestion
from keye.errors import KeyeError
from keye.evaluation.public.longvideobench import LongVideoBench
from keye.evaluation.public.mvbench import MVBench
from keye.evaluation.public.question import PublicBenchmark, PublicQuestion, Verdict
from keye.evaluation.public.tempcompass import TempCompass
from keye.evaluation.public.video_mme import VideoMME

__all__ = ["BENCHMARKS", "PublicBenchmark", "PublicQuestion", "Verdict", "open_benchmark"]

BENCHMARKS: dict[str, type[PublicBenchmark]] = {
    benchmark.name: benchmark for benchmark in (VideoMME, LongVideoBench, MVBench, TempCompass)
}


def open_benchmark(name: str, data: str | Path, **options: Any) -> PublicBenchmark:
    """A public benchmark of `BENCHMARKS` in its official directory; options: those of `PublicBenchmark`.

    Raises:
        KeyeError: an unknown benchmark, or a directory whose layout is incomplete.
    """
    if name not in BENCHMARKS:
        raise KeyeError(f"--benchmark {name} is not known; {suggestion(name, BENCHMARKS)}")
    return BENCHMARKS[name](data, **options)
