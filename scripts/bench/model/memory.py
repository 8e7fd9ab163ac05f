"""Peak memory of converting a sharded checkpoint to the released names and back: one shard at most, beyond the base."""

import json
import tempfile
import time
from pathlib import Path

from keye import KeyeConfig
from keye.checkpoint.convert import check, convert_released, export_released
from keye.errors import KeyeError, run
from scripts.bench.common.process import in_process, resident
from scripts.bench.common.record import ROOT, Claim, Table, arguments, out_of, save
from scripts.bench.model.released_checkpoint import write_random

MIB = 1 << 20
STEPS = {"export": "ours → released names", "convert": "released names → ours"}
EXAMPLES = "examples:\n  python -m scripts.bench model --part memory\n"


def config_of(quick: bool) -> KeyeConfig:
    """Some 800 MB in bfloat16 (60 MB when quick), none of whose tensors fills a shard."""
    width, layers = (512, 6) if quick else (1536, 12)
    text = {
        "hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers, "num_attention_heads": 12,
        "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 16_384,
    }  # fmt: skip
    vision = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 6}
    return KeyeConfig(vision_config=vision, text_config={"model_type": "qwen3", **text})


def alone(step: str, folder: Path, max_shard: int) -> tuple[int, int]:
    """Resident bytes before one step and at its peak, in a separate process."""
    options = ["--step", step, "--folder", str(folder), "--shard", str(max_shard)]
    found = in_process(__spec__.name, options, step)
    return found["before"], found["peak"]


def step(name: str, folder: Path, max_shard: int) -> None:
    """Run one step here and print what was resident before it and at its peak."""
    check(folder / "ours")  # reads headers and imports what a conversion needs
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here: imports had one of their own
    before = resident("VmRSS")
    if name == "export":
        export_released(folder / "ours", folder / "released", max_shard=max_shard)
    else:
        convert_released(folder / "released", folder / "again", max_shard=max_shard)
    print(json.dumps({"before": before, "peak": resident("VmHWM")}))


def main() -> None:
    parser = arguments(__doc__, EXAMPLES, results="model")
    parser.add_argument("--step", choices=STEPS, help="one step in this process; what the part runs for each")
    parser.add_argument("--folder", type=Path, help="with --step: where the directories are")
    parser.add_argument("--shard", type=int, default=128 * MIB, help="bytes of a shard")
    args = parser.parse_args()
    if args.step:
        return step(args.step, args.folder, args.shard)
    if not Path("/proc/self/clear_refs").exists():
        raise KeyeError("the peak of a process is read from /proc, which this system has not: run this part on Linux")
    began = time.monotonic()
    shard = 24 * MIB if args.quick else args.shard
    scratch = ROOT / ".cache" / "bench"
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        size = write_random(config_of(args.quick), Path(folder) / "ours", shard)
        peaks = {name: alone(name, Path(folder), shard) for name in STEPS}
    rows, claims = [], []
    for name, what in STEPS.items():
        before, peak = peaks[name]
        above = peak - before
        figure = f"{above / MIB:.0f} MB above the {before / MIB:.0f} MB of the process before"
        goal = f"≤ one shard ({shard / MIB:.0f} MB)"
        claims.append(Claim(f"peak memory of {what}, {size / MIB:.0f} MB of weights", goal, figure, met=above <= shard))
        rows.append((what, f"{before / MIB:.0f}", f"{peak / MIB:.0f}", f"{above / MIB:.0f}"))
    table = Table("Resident memory of a process, MB", ("what", "before", "at the peak", "above"), rows)
    notes = ["Before: a process that has imported what it needs and read the headers once."]
    save(
        out_of(args), "memory", claims, [table], seconds=time.monotonic() - began, quick=args.quick,
        seeds={"weights": 0}, notes=notes
    )  # fmt: skip


if __name__ == "__main__":
    run(main)
