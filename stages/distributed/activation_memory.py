"""How layers run: computed again, their inputs in host memory, MLPs tile by tile, compiled.

None of it changes a loss or a gradient. How the parts go together, for a pack of L tokens on one rank:

- `checkpointing` keeps a decoder layer's input and its attention's output, `[L, hidden]` each, and computes the rest
  again in the backward pass. Attention is what grows with the square of L: kept, it is not paid for twice.
- `offload` besides moves the layers' inputs to host memory until the backward pass wants them. Attention is then
  computed twice, because its output would take as much of the GPU as the inputs did.
- `mlp_tiles` runs each MLP over so many parts of the tokens, one after the other: its wide activations
  `[L, intermediate]` are alive for one part at a time (Arctic Long Sequence Training, arXiv 2506.13996).
- `compile` compiles the forward function of a layer of each kind (decoder, tower) once for all layers of the kind and
  all lengths. Attention is then an operator inside the graph, so with `checkpointing` it is computed twice: what a
  compiled graph computes cannot be kept from outside, because the graph may reuse its buffers.
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
    """Arrange a model's training as a stage's recipe wants it; see the module's docstring.

    backend: of `torch.compile`.

    Raises:
        RecipeError: `offload` without `checkpointing`, or for a decoder whose layers have no `mlp` to be tiled.
    """
    if offload and not checkpointing:
        raise RecipeError(
            "offload = true moves the inputs of layers that are computed again, and without checkpointing none is: "
            "set checkpointing = true, or offload = false"
        )
    if compiled:
        compile_layers(model, backend)
    if checkpointing:
        # Tower and projector cut their frames into chunks by themselves; a decoder layer is recomputed inside its own
        # call, so that what ZeRO-3 does around the call (gather, release) is no part of what is computed again.
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
    """Have all decoder layers, and all layers of the tower, run one compiled function each.

    The functions are compiled, not the modules: names of parameters stay as they are. Lengths are dynamic, so that
    packs of unlike lengths share a graph.
    """
    made: dict[type[nn.Module], Callable[..., Any]] = {}
    for layer in (*model.language_model.layers, *model.visual.encoder.layers):
        kind = type(layer)
        if kind not in made:
            made[kind] = torch.compile(kind.forward, dynamic=True, backend=backend)
        layer.forward = partial(made[kind], layer)


def _recomputed(
    layer: nn.Module, run: Callable[..., Any], offload: bool, keep_attention: bool, /, *args: Any, **kwargs: Any
) -> Any:
    """The forward pass of a decoder layer, recomputed when it trains."""
    if layer.training and torch.is_grad_enabled():
        return recompute(partial(run, **kwargs), *args, offload=offload, keep_attention=keep_attention)
    return run(*args, **kwargs)


def recompute(run: Callable[..., Any], *args: Any, offload: bool = False, keep_attention: bool | None = None) -> Any:
    """`run(*args)`, of which only the arguments and the attention's output stay until the backward pass.

    keep_attention: whether the latter stays; by default unless `offload`.
    """
    keeps = not offload if keep_attention is None else keep_attention
    kept: dict[str, Any] = {"context_fn": _keep_attention} if keeps else {}
    # Around the checkpoint alone: what it does not recompute are the arguments, so that nothing else is moved.
    with save_on_cpu(pin_memory=True) if offload else nullcontext():
        return checkpoint(run, *args, use_reentrant=False, **kept)


def _keep_attention() -> tuple[AbstractContextManager, AbstractContextManager]:
    return create_selective_checkpoint_contexts(_policy)


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Kept is what any attention kernel gives: torch's, flash-attn's, and the operator of the compiled sdpa."""
    name = str(operator)
    kernel = ("attention" in name or "attn" in name) and "backward" not in name
    return CheckpointPolicy.MUST_SAVE if kernel else CheckpointPolicy.PREFER_RECOMPUTE


def in_tiles(run: Callable[[Tensor], Tensor], tiles: int, x: Tensor) -> Tensor:
    """`run` over `tiles` parts of the tokens of x `[B, L, hidden]`, each computed again in the backward pass.

    Exact for whatever treats tokens one by one; parameters receive the sum of all tiles' gradients once.
    """
    parts = x.split(max(1, -(-x.shape[1] // tiles)), dim=1)
    if not torch.is_grad_enabled():
        return torch.cat([run(part) for part in parts], dim=1)
    return torch.cat([checkpoint(run, part, use_reentrant=False) for part in parts], dim=1)
