"""Probes once which of deepspeed's operators can be compiled here, as every rank does that starts an engine."""

from deepspeed.ops import __compatible_ops__

OPS = __compatible_ops__
