"""A temporary LoRA: a memory in low-rank weights that inference writes, for any linear layers of any model."""

from keye.memory.temporary import TemporaryLora, attach

__all__ = ["TemporaryLora", "attach"]
