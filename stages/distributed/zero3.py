"""ZeRO-3 gathers parameters by units: once when a unit is called, and once before its backward pass.

DeepSpeed gathers the parameters of each innermost module at every call of it. Here the number of calls depends on a
rank's data (the tower is called for each chunk of frames, the head for each chunk of labels), and recomputed layers are
called again in the backward pass. Ranks with different data would issue different gathers, which hangs. A unit is a
module that is called exactly once in a forward pass: the tower, the projector, a decoder layer, the head around all its
chunks. Its parameters are gathered around its call, and no module inside it gathers.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from keye.checkpoint.shards import Stored
from keye.errors import CheckpointError, KeyeError
from keye.model.keye import KeyeForConditionalGeneration
from keye.model.projector import Projector
from keye.model.vision import KeyeVisionModel
from stages.distributed.ranks import agree, waiting_group


def units(module: nn.Module) -> dict[nn.Module, list[nn.Module]]:
    """Unit → the modules with the parameters that it needs; no unit is inside another one."""
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
    """Make a DeepSpeed engine of ZeRO-3 gather by units; call it before the first forward pass."""
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


@torch.no_grad()
def read_partitioned(
    module: nn.Module, sources: Mapping[nn.Parameter, Stored], config: dict[str, Any], device: torch.device
) -> None:
    """Read every parameter on the meta device from `sources` and partition it before the next one; collective.

    A rank keeps its shares and has one complete parameter at a time. Parameters stay the same objects. Parameters on
    other devices move to `device` in the dtype of training, and DeepSpeed partitions them later. DeepSpeed does neither
    for a module that has partitioned parameters already.

    Args:
        module: has at least one parameter on the meta device.
        sources: the file of each parameter.
        config: DeepSpeed's, of ZeRO-3.
        device: of the training.

    Raises:
        KeyeError: on all ranks, if a rank cannot map a file.
    """
    from deepspeed import zero
    from deepspeed.utils import groups

    dtype = torch.bfloat16 if config["bf16"]["enabled"] else torch.float32
    for buffer in module.buffers():
        buffer.data = buffer.data.to(device)
    agree(_unmapped(module, sources), waiting_group(dist.group.WORLD))
    first: nn.Parameter | None = None
    for parameter in module.parameters():
        if not parameter.is_meta:
            parameter.data = parameter.data.to(device, dtype if parameter.is_floating_point() else None)
            continue
        value = torch.empty(parameter.shape, dtype=parameter.dtype, device=device).copy_(sources[parameter].mapped())
        torch.utils.swap_tensors(parameter, nn.Parameter(value, parameter.requires_grad))
        del value  # the last reference to the complete parameter except that of DeepSpeed, which drops it
        if first is None:
            within_node = groups._get_zero_param_intra_parallel_group()  # of hpZ, if an earlier stage created it
            zero.Init(
                module=nn.ParameterList([parameter]), config_dict_or_path=config, zero_param_parallel_group=within_node
            )
            first = parameter
        else:
            first.convert_to_zero_parameters([parameter])


def _unmapped(module: nn.Module, sources: Mapping[nn.Parameter, Stored]) -> Exception | None:
    """The error of the first stored tensor that this rank cannot map; the others would wait for this rank."""
    for parameter in module.parameters():
        if parameter.is_meta:
            try:
                sources[parameter].mapped()
            except (OSError, ValueError) as error:
                where = f"{sources[parameter].path} cannot be read on rank {dist.get_rank()}"
                return CheckpointError(f"{where} ({error}); copy the model again")
            except KeyeError as error:
                return CheckpointError(f"rank {dist.get_rank()}: {error}")
            except Exception as error:
                return error
    return None
