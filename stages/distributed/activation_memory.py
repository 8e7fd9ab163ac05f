"""Activation memory: recomputation, offloading to host memory, tiled MLPs, and compiled layers.

No option changes a loss or a gradient. For a pack of L tokens on one rank:

- `checkpointing` keeps a decoder layer's input and its attention's output, `[L, hidden]` each, and recomputes the rest
  in the backward pass. Attention grows with the square of L; because its output is kept, it is computed once.
- `offload` also moves the layers' inputs to host memory until the backward pass needs them. Attention is then computed
  twice, because its output would take as much GPU memory as the inputs.
- `mlp_tiles` runs each MLP over this many parts of the tokens, one after the other: its wide activations
  `[L, intermediate]` exist for one part at a time (Arctic Long Sequence Training, arXiv 2506.13996).
- `compile` compiles the forward function of a layer of each kind (decoder, tower) once for all layers of the kind and
  all lengths. Attention is then an operator inside the graph, so with `checkpointing` it is computed twice: the result
  of an operator in a compiled graph cannot be kept, because the graph may reuse its buffers.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from keye.errors import RecipeError
from keye.model.keye import KeyeForConditionalGeneration


def apply_memory_options(
    model: KeyeForConditionalGeneration, checkpointing: bool, offload: bool = False, mlp_tiles: int = 1,
    compiled: bool = False, backend: str = "inductor",
) -> None:  # fmt: skip
    """Apply the options of a stage's recipe to a model; see the module's docstring.

    backend: of `torch.compile`.

    Raises:
        RecipeError: `offload` without `checkpointing`, or `mlp_tiles` for a decoder whose layers have no `mlp`.
    """
    if offload and not checkpointing:
        raise RecipeError(
            "offload = true moves the inputs of recomputed layers and needs checkpointing; "
            "set checkpointing = true, or offload = false"
        )
    if compiled:
        compile_layers(model, backend)
    if checkpointing:
        # Tower and projector divide their frames into chunks themselves. A decoder layer is recomputed inside its own
        # call, so the recomputation does not include ZeRO-3's work around the call (gather, release).
        model.visual.gradient_checkpointing = model.projector.gradient_checkpointing = True
        for layer in model.language_model.layers:
            layer.forward = partial(_recomputed, layer, layer.forward, offload, not (offload or compiled))
    if mlp_tiles > 1:
        for layer in model.language_model.layers:
            if not hasattr(layer, "mlp"):
                name = model.config.text_config.model_type
                raise RecipeError(f"mlp_tiles = {mlp_tiles}: the layers of a {name} decoder have no MLP to tile; set 1")
            layer.mlp.forward = partial(in_tiles, layer.mlp.forward, mlp_tiles)


def compile_layers(model: KeyeForConditionalGeneration, backend: str = "inductor") -> None:
    """Compile one function for all decoder layers and one for all layers of the tower.

    The functions are compiled, not the modules, so the names of parameters do not change. Lengths are dynamic, so packs
    of different lengths share a graph.
    """
    mixer = model.config.vision_config.mixer
    if mixer != "attention":
        raise RecipeError(f"compile = true: layers with mixer {mixer!r} are not compiled; set compile = false")
    compiled: dict[type[nn.Module], Callable[..., Any]] = {}
    for layer in (*model.language_model.layers, *model.visual.encoder.layers):
        kind = type(layer)
        if kind not in compiled:
            compiled[kind] = torch.compile(kind.forward, dynamic=True, backend=backend)
        layer.forward = partial(compiled[kind], layer)


def _recomputed(
    layer: nn.Module, run: Callable[..., Any], offload: bool, keep_attention: bool, /, *args: Any, **kwargs: Any
) -> Any:
    """The forward pass of a decoder layer, recomputed in training."""
    if layer.training and torch.is_grad_enabled():
        return recompute(partial(run, **kwargs), *args, offload=offload, keep_attention=keep_attention)
    return run(*args, **kwargs)


def recompute(run: Callable[..., Any], *args: Any, offload: bool = False, keep_attention: bool | None = None) -> Any:
    """`run(*args)`; only the arguments and the attention's output are kept until the backward pass.

    keep_attention: whether the attention's output is kept; by default not with `offload`.
    """
    keeps = not offload if keep_attention is None else keep_attention
    kept: dict[str, Any] = {"context_fn": _keep_attention} if keeps else {}
    # Around the checkpoint alone, so only the arguments, which it does not recompute, are moved.
    with save_on_cpu(pin_memory=True) if offload else nullcontext():
        return checkpoint(run, *args, use_reentrant=False, **kept)


def _keep_attention() -> tuple[AbstractContextManager, AbstractContextManager]:
    return create_selective_checkpoint_contexts(_policy)


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep the output of any attention kernel: torch's, flash-attn's, and the operator of the compiled sdpa."""
    name = str(operator)
    kernel = ("attention" in name or "attn" in name) and "backward" not in name
    return CheckpointPolicy.MUST_SAVE if kernel else CheckpointPolicy.PREFER_RECOMPUTE


def in_tiles(run: Callable[[Tensor], Tensor], tiles: int, x: Tensor) -> Tensor:
    """`run` over `tiles` parts of the tokens of x `[B, L, hidden]`, each recomputed in the backward pass.

    Exact if `run` treats tokens independently; parameters receive the sum of all tiles' gradients.
    """
    parts = x.split(max(1, -(-x.shape[1] // tiles)), dim=1)
    if not torch.is_grad_enabled():
        return torch.cat([run(part) for part in parts], dim=1)
    return torch.cat([checkpoint(run, part, use_reentrant=False) for part in parts], dim=1)
