"""SlowFastBench v1: drawn clips whose questions cannot be answered from the plan, the file or the text."""

from keye.world.slowfastbench.family import Family
from keye.world.slowfastbench.film import Film, Painter
from keye.world.slowfastbench.questions import EACH, SPLITS, VERSION, Item, check_frozen, checksum, draw, row_of
from keye.world.slowfastbench.table import FAMILIES
from keye.world.slowfastbench.write import painter_of, write

__all__ = [
    "EACH", "FAMILIES", "SPLITS", "VERSION", "Family", "Film", "Item", "Painter", "check_frozen", "checksum", "draw",
    "painter_of", "row_of", "write",
]  # fmt: skip
