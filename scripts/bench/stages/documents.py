"""Mixed data and a recipe for the benches that train: long and short clips, stills of three sizes, text; all drawn."""

import os
import subprocess
import sys
from pathlib import Path

from keye.errors import KeyeError
from keye.world import generate
from scripts.bench.common.record import ROOT

MIXTURE = {"video": 0.24, "image": 0.50, "text": 0.26}  # the report's for annealing; stage 2's is not published
HEAD = """
name = "{name}"
[model]
preset = "{preset}"
vocab_size = 1024
[processor.encoder]
measure = "patch_l1"
threshold = 0.8
max_tokens = 1024
min_tokens_per_frame = 4
max_tokens_per_frame = 16
[processor.image]
min_tokens = 4
max_tokens = 256
"""
STAGE = """
[multitask]
steps = 100000
learning_rate = 1e-9
schedule = "constant"
context = {context}
global_batch_size = {packs}
mixture = {{ video = {video}, image = {image}, text = {text} }}
"""
DRAWN = {  # folder → counts, seconds, side in pixels
    "short": ({"count": 60, "order": 60, "caption": 80}, 4.0, 112),
    "long": ({"find": 40}, 16.0, 112),
    "middle": ({"image_read": 60, "image_ground": 60}, 3.0, 224),
    "large": ({"image_place": 60}, 3.0, 448),
    "words": ({"text": 400}, 3.0, 112),
}
KINDS = {"short": ("video", "image"), "long": ("video",), "middle": ("image",), "large": ("image",), "words": ("text",)}


def draw_mixed(folder: Path, seed: int, share: float = 1.0) -> None:
    """Draw the clips, stills and texts into folders below `folder`, unless they are there; `share` of each count."""
    for name, (counts, duration, side) in DRAWN.items():
        if not (folder / name / "train.jsonl").exists():
            fewer = {family: max(4, round(number * share)) for family, number in counts.items()}
            generate(
                folder / name, counts=fewer, seed=seed, size=(side, side), duration=duration, difficulty=0.2, fps=2,
                progress=False,
            )  # fmt: skip


def write_recipe(path: Path, folder: Path, context: int, packs: int, preset: str = "tiny") -> Path:
    """A recipe of stage 2 alone over what `draw_mixed` has drawn; the model hardly moves, so that steps compare."""
    if not folder.is_dir():
        raise KeyeError(f"{folder}: nothing was drawn; call draw_mixed first")
    text = HEAD.format(name=path.stem, preset=preset)
    for name, kinds in KINDS.items():
        for kind in kinds:
            manifest = (folder / name / "train.jsonl").resolve()
            text += f'[[data.sources]]\npath = "{manifest}"\nkind = "{kind}"\n'
    path.write_text(text + STAGE.format(context=context, packs=packs, **MIXTURE), encoding="utf-8")
    return path


def torchrun(command: list[str], log: Path, processes: int, limit: float) -> None:
    """A script on so many processes of one thread each, its output in `log`; KeyeError when it fails or takes too long.

    limit: seconds.
    """
    launch = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"),
    ]
    with log.open("w") as out:
        try:
            code = subprocess.run(
                [*launch, *command], cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, timeout=limit, check=False,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            raise KeyeError(f"{command[0]} took more than {limit:.0f} s; {log} says how far it came") from None
    if code:
        raise KeyeError(f"{command[0]} on {processes} processes failed; the end of {log} says why")
