"""A local task for lmms-eval about drawn clips.

python -m tests.keye.adapters.lmms_task FOLDER      # then: lmms-eval --tasks drawn_clips --include_path FOLDER …
"""

import sys
from pathlib import Path

from keye.evaluation import ManifestBenchmark
from keye.world import generate
from scripts.bench.lmms_eval import write_task


def draw_task(folder: Path, count: int = 3, seconds: float = 3) -> Path:
    """Draw `count` clips of two families and write the task into `folder`; returns the JSONL of the questions."""
    counts = {"count": count, "order": count}
    manifest = generate(folder, "heldout", counts, duration=seconds, size=(112, 112), workers=1, progress=False)
    return write_task(folder, list(ManifestBenchmark(manifest)), limit=8)


if __name__ == "__main__":
    print(draw_task(Path(sys.argv[1])))
