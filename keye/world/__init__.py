"""SlowFastWorld: a procedural video world rendered to real files, with questions whose answers are known exactly."""

from keye.world.families import FAMILIES
from keye.world.generate import generate, texts
from keye.world.manifest import iter_manifest, parse_line, read_manifest, write_manifest
from keye.world.scene import Setting

__all__ = [
    "FAMILIES", "Setting", "generate", "iter_manifest", "parse_line", "read_manifest", "texts", "write_manifest",
]  # fmt: skip
