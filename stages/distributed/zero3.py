"""ZeRO-3 gathers parameters by units: once when a unit is called, and once before its backward pass.

DeepSpeed gathers by itself what each innermost module holds, whenever that module is called. Here a module is called as
often as a rank's data asks for (a tower once a chunk of frames, the head once a chunk of labels), and recomputed layers
call it again in the backward pass: ranks with unlike data would issue unlike gathers, which hangs. A unit is a module
that is called once a forward pass, whatever the data: the tower, the projector, a decoder layer, the head around all
its chunks. Its parameters are gathered around it, and nothing inside it gathers.
"""

from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from keye.model.keye import KeyeForConditionalGeneration
from keye.model.vision import KeyeVisionModel, Projector


def units(module: nn.Module) -> dict[nn.Module, list[nn.Module]]:
    """Unit → the modules whose parameters it needs; no unit is inside another one."""
    found: dict[nn.Module, list[nn.Module]] = {}
    inside: set[nn.Module] = set()
    for part in module.modules():
        if isinstance(part, KeyeForConditionalGeneration):
            found[part.readout] = [part.lm_head]
        if isinstance(part, KeyeVisionModel | Projector | GradientCheckpointingLayer) and part not in inside:
            found[part] = [part]
            inside |= set(part.modules())
    return found


def gather_by_units(engine: Any) -> None:
    """Arrange it in a DeepSpeed engine of ZeRO-3, before its first forward pass."""
    from deepspeed import zero

    silenced: set[int] = set()
    for unit, parts in units(engine.module).items():
        for inner in {inner for part in parts for inner in part.modules()} - {unit}:
            silenced |= {id(inner._forward_pre_hooks), id(inner._forward_hooks)}
            for parameter in inner.parameters(recurse=False):
                zero.register_external_parameter(unit, parameter)
    offload = engine.optimizer.parameter_offload
    for handle in [*offload.forward_hooks, *offload.backward_hooks]:
        if id(handle.hooks_dict_ref()) in silenced:
            handle.remove()
