"""Tracing an answer: which tokens of a prompt carry it, in which layers, and when it is settled (docs/five-systems)."""

from keye.evaluation.trace.groups import TokenGroup, groups_of, of_kind, words_of
from keye.evaluation.trace.knockout import Effect, commitment_by_cut, knock_out, shares, windows_of
from keye.evaluation.trace.lens import Lens, lens
from keye.evaluation.trace.patching import Patching, patch
from keye.evaluation.trace.prompt import Prompt
from keye.evaluation.trace.tracer import Cut, Patch, Row, Runs, Tracer

__all__ = [
    "Cut",
    "Effect",
    "Lens",
    "Patch",
    "Patching",
    "Prompt",
    "Row",
    "Runs",
    "TokenGroup",
    "Tracer",
    "commitment_by_cut",
    "groups_of",
    "knock_out",
    "lens",
    "of_kind",
    "patch",
    "shares",
    "windows_of",
    "words_of",
]
