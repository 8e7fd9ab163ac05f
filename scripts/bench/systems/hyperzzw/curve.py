"""Time and memory of one tower layer against the number of patches, with attention and with the mixer, alternating."""

import statistics
from typing import Any

import torch
from torch import Tensor

from keye.hyperzzw.mixer import FrameGroups
from keye.model.config import KeyeVisionConfig
from keye.model.flops import frame_layers
from keye.model.rope import vision_tables
from keye.model.vision import MIXERS, VisionLayer, places_of
from scripts.bench.common.timing import in_turn

WIDTH, HEADS, MLP = 192, 4, 768


def layer_of(mixer: str) -> VisionLayer:
    """A layer with the mixer, weights with the usual initial spread."""
    torch.manual_seed(0)
    return VisionLayer(config_of(mixer))


def config_of(mixer: str) -> KeyeVisionConfig:
    """A tower of one such layer."""
    return KeyeVisionConfig(
        hidden_size=WIDTH, num_attention_heads=HEADS, intermediate_size=MLP, num_hidden_layers=1, mixer=mixer
    )


def saved_bytes(layer: VisionLayer, x: Tensor, *rest: Any) -> int:
    """Bytes that autograd keeps of activations for the backward pass; each storage counts once, weights do not."""
    known = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    kept: dict[int, Any] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage  # alive, so that no later tensor gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(x, *rest)
    return sum(storage.nbytes() for storage in kept.values())


def measured(side: int, rounds: int) -> dict[str, Any]:
    """One square frame of side² patches: mixer → median seconds of a forward pass, saved bytes, operations.

    "ratios" are seconds with the mixer per second with attention, in each round.
    """
    patches = side * side
    frames = torch.tensor([[side, side]])
    places = places_of(frames, patches)
    x = torch.randn(patches, WIDTH, generator=torch.Generator().manual_seed(side))
    ends = torch.tensor([0, patches], dtype=torch.int32)
    tables = {
        "attention": vision_tables(places.row, places.column, WIDTH // HEADS, 10_000.0),
        "hyperzzw": FrameGroups.of(frames),
    }
    layers = {mixer: layer_of(mixer) for mixer in MIXERS}

    def forward(mixer: str) -> Tensor:
        with torch.no_grad():
            return layers[mixer](x, ends, tables[mixer])

    times = in_turn({mixer: lambda mixer=mixer: forward(mixer) for mixer in MIXERS}, rounds, x.device)
    return {
        "patches": patches,
        "ratios": [mixer / attention for mixer, attention in zip(times["hyperzzw"], times["attention"], strict=True)],
        **{
            mixer: {
                "seconds": statistics.median(times[mixer]),
                "bytes": saved_bytes(layers[mixer], x, ends, tables[mixer]),
                "operations": frame_layers(config_of(mixer), [(side, side)]).total,
            }
            for mixer in MIXERS
        },
    }
