"""Constraints on the form of an answer that rules check, their drawing and their reward (report: alignment RL)."""

from rl.alignment import counts, keywords, layout, letters
from rl.alignment.base import KINDS, Constraint, Counted, constraint, read_constraints

__all__ = ["KINDS", "Constraint", "Counted", "constraint", "counts", "keywords", "layout", "letters",
           "read_constraints"]  # fmt: skip
