"""Parameter names of SlowFast's model zoo, whose files come in two formats, and ours.

The files are of PySlowFast (`s2.pathway0_res0.branch2.a.weight`) or of PyTorchVideo
(`blocks.1.multipathway_blocks.0.res_blocks.0.branch2.conv_a.weight`).
"""

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from keye.errors import CheckpointError

PATHWAYS = {"slow": 0, "fast": 1}


def pyslowfast(name: str) -> str:
    """PySlowFast's name of a parameter or buffer of `SlowFastNet`."""
    match name.split("."):
        case ["stem", path, kind, last]:
            return f"s1.pathway{PATHWAYS[path]}_stem.{'bn' if kind == 'norm' else 'conv'}.{last}"
        case ["lateral", stage, kind, last]:
            return f"s{int(stage) + 1}_fuse.{'bn' if kind == 'norm' else 'conv_f2s'}.{last}"
        case ["stages", stage, path, block, *parts, last]:
            start = f"s{int(stage) + 2}.pathway{PATHWAYS[path]}"
            if block.startswith("nonlocal"):
                return f"{start}_{block}.{'bn' if parts == ['norm'] else f'conv_{parts[0]}'}.{last}"
            start = f"{start}_res{block.removeprefix('block')}"
            if parts[0] == "shortcut":
                return f"{start}.branch1{'_bn' if parts[1] == 'norm' else ''}.{last}"
            return f"{start}.branch2.{parts[0].replace('_norm', '_bn')}.{last}"
    return name.replace("head.", "head.projection.")


def pytorchvideo(name: str) -> str:
    """PyTorchVideo's name of a parameter or buffer of `SlowFastNet` without non-local blocks."""
    match name.split("."):
        case ["stem", path, kind, last]:
            return f"blocks.0.multipathway_blocks.{PATHWAYS[path]}.{kind}.{last}"
        case ["lateral", stage, kind, last]:
            return f"blocks.{stage}.multipathway_fusion.{'norm' if kind == 'norm' else 'conv_fast_to_slow'}.{last}"
        case ["stages", stage, path, block, *parts, last]:
            start = f"blocks.{int(stage) + 1}.multipathway_blocks.{PATHWAYS[path]}"
            start = f"{start}.res_blocks.{block.removeprefix('block')}"
            if parts[0] == "shortcut":
                return f"{start}.branch1_{parts[1]}.{last}"
            letter = parts[0][0]
            return f"{start}.branch2.{'norm' if parts[0].endswith('_norm') else 'conv'}_{letter}.{last}"
    return name.replace("head.", "blocks.6.proj.")


FORMATS: dict[str, Callable[[str], str]] = {"PySlowFast": pyslowfast, "PyTorchVideo": pytorchvideo}


def load_zoo(network: nn.Module, state: Mapping[str, Tensor]) -> str:
    """Load the weights of a model zoo's file into a `SlowFastNet`.

    Args:
        network: with the settings of the file's model.
        state: the file's `model_state`, name → tensor, of either format.

    Returns:
        The format's name.

    Raises:
        CheckpointError: `state` is not a mapping of tensors, or a weight is missing, is not ours, or has another shape.
    """
    if not isinstance(state, Mapping) or "model_state" in state:
        raise CheckpointError(
            f"give the weights by name, not {'the complete file' if isinstance(state, Mapping) else f'{state!r:.60}'}: "
            "torch.load(path)['model_state']"
        )
    if other := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise CheckpointError(f"{other[0]} is a {type(state[other[0]]).__name__}; give tensors (torch.as_tensor)")
    ours = network.state_dict()
    names = {form: {own: rename(own) for own in ours} for form, rename in FORMATS.items()}
    form = max(names, key=lambda form: len(set(names[form].values()) & set(state)))
    if not set(names[form].values()) & set(state):
        raise CheckpointError(
            f"no weight has a name of {' or '.join(FORMATS)}, such as {next(iter(names[form].values()))}; the first is "
            f"{next(iter(state), 'none')}: remove a prefix such as 'module.', or use load_state_dict for our own names"
        )
    missing = [theirs for theirs in names[form].values() if theirs not in state]
    extra = sorted(set(state) - set(names[form].values()))
    wrong = [
        f"{theirs} is {list(state[theirs].shape)} instead of {list(ours[own].shape)}"
        for own, theirs in names[form].items()
        if theirs in state and state[theirs].shape != ours[own].shape
    ]
    for title, found in (("are missing", missing), ("are not of this network", extra), ("have another shape", wrong)):
        if found:
            raise CheckpointError(
                f"{len(found)} weights {title}, such as {found[0]}; read as a file of {form}: give the network the "
                "preset of the file"
            )
    network.load_state_dict({own: state[theirs] for own, theirs in names[form].items()})
    return form
