"""Benchmarks, answer matching and evaluation."""

from keye.evaluation.benchmark import Benchmark, ManifestBenchmark, Question
from keye.evaluation.controls import CONTROLS, Control
from keye.evaluation.evaluate import evaluate, gather, generate_replies
from keye.evaluation.match import extract_answer, match
from keye.evaluation.report import Outcome, Report, Score, control_table, merge

__all__ = [
    "CONTROLS", "Benchmark", "Control", "ManifestBenchmark", "Outcome", "Question", "Report", "Score", "control_table",
    "evaluate", "extract_answer", "gather", "generate_replies", "match", "merge",
]  # fmt: skip
