"""What `keye cost` estimates for the steps that the parts d, e and g measure on one H200, beside what was measured.

Nothing is measured here, and no GPU is needed. The estimates use the shapes, the memory and the rate of the data sheet
and 40 % utilisation. A cell of a measured value is empty until the part has run on a GPU.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keye.errors import run
from keye.model.vision import FRAME_PATCHES
from rl.cost.memory import step_memory
from rl.cost.settings import Settings
from rl.cost.work import Lengths, operations
from scripts.bench.common.record import RESULTS, Table, arguments, save
from scripts.bench.gpu.journal import QUICK, complete_lines
from scripts.bench.gpu.parts import context, gspo, training
from scripts.bench.gpu.plans import STAMP
from scripts.bench.gpu.steps import Setting, Sizes, sizes_of
from stages.cost.estimate import Assumptions, parameters_of, step_flops, step_seconds
from stages.cost.footprint import Plan, Share, footprint
from stages.cost.gpus import gpu_named
from stages.cost.work import Work
from stages.recipe import StageRecipe

PART = "estimates"
GPU = gpu_named("h200")
FRAME = (20, 46)  # patches of a frame of the default plans: (height, width)
BF16 = 2
COLUMNS = (
    "part", "row", "decoder layers", "tokens", "GB, estimated", "GB, measured", "s, estimated", "s, measured",
)  # fmt: skip
NOTES = [
    f"One {GPU.name} with {GPU.memory / 1e9:.0f} GB and {GPU.peak / 1e12:.0f} TFLOP/s by its data sheet; 40 % of it, "
    "recomputed operations included, bf16 with fp32 master weights and moments. The depth is chosen as the parts "
    f"choose it for this memory. Frames of {FRAME[0]} × {FRAME[1]} patches. The stack is not among the estimates: "
    "`keye cost` has no pass without an optimizer.",
]


@dataclass(frozen=True)
class Row:
    """An estimate: bytes at the peak and seconds."""

    part: str
    key: str
    layers: int
    tokens: int
    peak: float
    seconds: float


def work_of(documents: int, length: int, visual: float) -> Work:
    """A pack of equal documents, a share `visual` of whose tokens are frames and their time stamps."""
    tokens = FRAME[0] * FRAME[1] // 4
    frames = documents * int(visual * length / (tokens + STAMP))
    labels = documents * (length - 1) - frames * tokens
    return Work([length] * documents, [FRAME] * frames, labels)


def step_of(part: str, key: str, sizes: Sizes, setting: Setting, work: Work) -> Row:
    """The estimate of a training step of packs such as `work`."""
    config = sizes.config
    total = sum(parameters_of(config).values())
    recipe = StageRecipe(
        steps=1, learning_rate=1e-6, context=sum(work.documents), zero=setting.zero, mlp_tiles=setting.mlp_tiles,
        checkpointing=setting.checkpointing, offload=setting.offload,
    )  # fmt: skip
    plan = Plan(
        BF16, setting.zero, 1, setting.checkpointing, setting.offload, setting.mlp_tiles,
        micro_batches=setting.micro_batches,
    )  # fmt: skip
    share = Share(sum(work.documents), work.patches, work.labels)
    done = setting.micro_batches * step_flops(config, "multitask", work, recipe)[1]
    seconds = step_seconds(done, total, GPU, 1, Assumptions().utilisation)
    tokens = setting.micro_batches * sum(work.documents)
    return Row(part, key, _layers(config), tokens, footprint(config, plan, share, total, total).peak, seconds)


def group_of(sizes: Sizes) -> Row:
    """The estimate of part g: a step of GSPO with one prompt. The time is that of the products alone."""
    config = sizes.config
    settings = Settings(
        prompts=1, group_size=gspo.GROUP, mini_batches=1, zero=2, max_new_tokens=gspo.ANSWER, checkpointing=True,
        mlp_tiles=8,
    )  # fmt: skip
    patches = FRAME[0] * FRAME[1]
    lengths = Lengths(gspo.PROMPT, gspo.PROMPT, gspo.ANSWER, gspo.ANSWER, gspo.VISUAL, patches, patches)
    done = operations(config, settings, lengths)
    memory = step_memory(config, settings, lengths, 1, parameters_of(config))
    products = done.prefill + done.decode + done.score + done.update + done.again
    total = sum(parameters_of(config).values())
    seconds = step_seconds(products, total, GPU, 1, Assumptions().utilisation)
    tokens = gspo.PROMPT + gspo.GROUP * gspo.ANSWER
    return Row("gspo", f"step {gspo.STEPS}", _layers(config), tokens, memory.peak, seconds)


def _layers(config: Any) -> int:
    return config.text_config.num_hidden_layers


def rows_of() -> Iterator[Row]:
    """The estimates of all parts."""
    sizes = sizes_of(False, GPU.memory)
    pack = work_of(sizes.documents, sizes.context // sizes.documents, 0.7)
    for name, setting in training.SETTINGS.items():
        if setting.patches != FRAME_PATCHES:  # the estimate has chunks of this size only
            continue
        yield step_of("training", name, sizes, setting, pack)
    sizes = sizes_of(False, GPU.memory, share=0.5)
    for variant, (setting, contexts) in context.VARIANTS.items():
        for length in sorted(contexts) if variant != "stack" else ():
            work = work_of(1, length, context.VISUAL)
            yield step_of("context", context.key_of(variant, length), sizes, setting, work)
    yield group_of(sizes)


def measured(out: Path, row: Row) -> tuple[str, str]:
    """GB and seconds that a part has measured on a GPU, or empty cells."""
    path = out / "rows" / f"{row.part}.jsonl"
    lines = complete_lines(path) if path.exists() else []
    if not lines or lines[0]["small"]:
        return "", ""
    for line in lines[1:]:
        if line["key"] == row.key and line["state"] == "done":
            values = line["values"]
            peaks = [values[name] for name in ("peak", "rollout_peak", "update_peak") if values.get(name)]
            seconds = values["seconds"] if "seconds" in values else values["rollout"] + values["update"]
            return (f"{max(peaks):.0f}" if peaks else ""), f"{seconds:.1f}"
    return "", ""


def main() -> int:
    parser = arguments(__doc__, f"examples:\n  python -m scripts.bench.gpu.parts.{PART}\n", results="gpu")
    args = parser.parse_args()
    began, out = time.monotonic(), args.out or (QUICK if args.quick else RESULTS / "gpu")
    rows = []
    for row in rows_of():
        gigabytes, seconds = measured(out, row)
        fits = "" if row.peak <= Assumptions().usable * GPU.memory else " (does not fit)"
        rows.append((
            row.part, row.key, row.layers, f"{row.tokens:,}", f"{row.peak / 1e9:.0f}{fits}", gigabytes,
            f"{row.seconds:.1f}", seconds,
        ))  # fmt: skip
    table = Table("Steps on one H200, estimated and measured", COLUMNS, rows)
    save(out, PART, [], [table], seconds=time.monotonic() - began, quick=False, notes=NOTES)
    return 0


if __name__ == "__main__":
    run(main)
