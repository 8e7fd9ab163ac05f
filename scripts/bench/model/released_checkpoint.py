"""Checkpoints for the benches: a random one of any size, its way to the released names and back, the 8B's count."""

from pathlib import Path

import torch

from keye import KeyeConfig, KeyeForConditionalGeneration
from keye.checkpoint.convert import convert_released, export_released
from keye.checkpoint.initialise import expected_shapes
from keye.checkpoint.shards import Computed, open_checkpoint, write_shards


def write_random(config: KeyeConfig, out: Path, max_shard: int) -> int:
    """A sharded directory in our layout with random bfloat16 weights, one tensor in memory at a time; its bytes."""
    draw = torch.Generator().manual_seed(0)

    def drawn(shape: tuple[int, ...]) -> Computed:
        return Computed(shape, torch.bfloat16, lambda: torch.randn(shape, generator=draw).to(torch.bfloat16))

    out.mkdir(parents=True)
    tensors = {name: drawn(tuple(shape)) for name, shape in expected_shapes(config).items()}
    write_shards(tensors, out, max_shard)
    config.architectures = [KeyeForConditionalGeneration.__name__]
    config.dtype = torch.bfloat16
    config.save_pretrained(out)
    return sum(tensor.size for tensor in tensors.values())


def round_trip(config: KeyeConfig, folder: Path, max_shard: int = 1 << 20) -> tuple[int, int, int]:
    """Ours → released → ours: tensors that differ in any bit, tensors, values."""
    write_random(config, folder / "ours", max_shard)
    export_released(folder / "ours", folder / "released", max_shard=max_shard)
    convert_released(folder / "released", folder / "again", max_shard=max_shard)
    before, after = open_checkpoint(folder / "ours"), open_checkpoint(folder / "again")
    same = [name for name, tensor in before.items() if name in after and _equal(tensor, after[name])]
    return len(before) - len(same), len(before), sum(torch.Size(t.shape).numel() for t in before.values())


def _equal(one: object, other: object) -> bool:
    same = (one.code, one.shape) == (other.code, other.shape)
    return same and b"".join(one.pieces()) == b"".join(other.pieces())


def meta_counts() -> list[tuple[str, int, int]]:
    """Claim, parameters of `keye_8b` on the meta device, and the same worked out from the published shapes."""
    with torch.device("meta"):
        model = KeyeForConditionalGeneration(KeyeConfig.preset("keye_8b"))
    width, mlp = 1152, 4304
    layer = 4 * (width * width + width) + 2 * width * mlp + mlp + width + 4 * width
    tower = 27 * layer + (3 * 14 * 14 * width + width) + 27 * 27 * width + 2 * width
    merged, hidden = 4 * width, 4096
    projector = 2 * merged + merged * merged + merged + merged * hidden + hidden
    queries, keys, inner = 32 * 128, 8 * 128, 12_288
    block = hidden * (2 * queries + 2 * keys + 3 * inner) + 2 * hidden + 2 * 128
    decoder = 36 * block + hidden + 2 * 151_936 * hidden
    parts = {
        "tower (SigLIP-so400m without its pooling head)": (model.visual, tower),
        "projector": (model.projector, projector),
        "whole model": (model, tower + projector + decoder),
    }
    return [
        (f"parameters of keye_8b, {name}, against the published shapes", sum(p.numel() for p in m.parameters()), n)
        for name, (m, n) in parts.items()
    ]
