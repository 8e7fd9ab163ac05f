"""Layers of the tower and the decoder, ours and those of transformers' Qwen2.5-VL, over the same packed tokens.

Qwen2.5-VL's vision layers have gated MLPs (three matrices where SigLIP has two), so theirs are two thirds as wide
inside: both then take the same number of operations. Everything else has the same shapes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Qwen3Config
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig, Qwen2_5_VLVisionConfig
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from keye.model import flops
from keye.model.config import KeyeVisionConfig
from keye.model.decoder import build_decoder, fuse_norms
from keye.model.rope import block_coordinates, vision_tables
from keye.model.vision import VisionLayer

Layer = Callable[[nn.Module, Tensor], Tensor]


@dataclass
class Stack:
    """Some layers with their input; `flops` are those of a forward pass, without what is recomputed."""

    layers: nn.ModuleList
    inputs: Tensor
    call: Layer
    flops: int

    def forget(self) -> None:
        """Drop all gradients."""
        for tensor in (self.inputs, *self.layers.parameters()):
            tensor.grad = None

    def forward(self, recompute: bool = False) -> Tensor:
        """The layers' output; with `recompute` each keeps its input alone."""
        x = self.inputs
        for layer in self.layers:
            x = checkpoint(self.call, layer, x, use_reentrant=False) if recompute else self.call(layer, x)
        return x

    def backward(self, output: Tensor) -> None:
        output.backward(self.inputs.detach())  # any gradient will do, and this one is there already

    def step(self, recompute: bool = False) -> None:
        """Forward and backward once; the gradients are replaced."""
        self.forget()
        self.backward(self.forward(recompute))

    def compile(self, backend: str, fullgraph: bool) -> None:
        """Compile every layer in place; layers of one kind share their code."""
        for layer in self.layers:
            layer.compile(backend=backend, fullgraph=fullgraph, dynamic=False)


def bounds(lengths: Sequence[int], device: torch.device) -> Tensor:
    """cu_seqlens int32 `[S + 1]`."""
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int().to(device)


def gated_width(width: int) -> int:
    """The inner width at which a gated MLP takes as many operations as a plain one of `width`, to a multiple of 8."""
    return round(width * 2 / 3 / 8) * 8


def our_vision(
    config: KeyeVisionConfig, frames: Sequence[tuple[int, int]], device: torch.device, dtype: torch.dtype, backend: str
) -> Stack:
    """VisionLayers over frames of (height, width) patches, each a segment."""
    patches = [height * width for height, width in frames]
    cu_seqlens, (row, column) = bounds(patches, device), _places(frames, device)
    tables = vision_tables(row, column, config.hidden_size // config.num_attention_heads, config.rope_theta)
    layers = _made(lambda _: VisionLayer(config), config.num_hidden_layers, device, dtype)
    work = flops.tower_layers(config, patches).total
    x = _input((sum(patches), config.hidden_size), device, dtype)
    return Stack(layers, x, lambda layer, x: layer(x, cu_seqlens, tables, backend), work)


def their_vision(
    config: KeyeVisionConfig, frames: Sequence[tuple[int, int]], device: torch.device, dtype: torch.dtype
) -> Stack:
    """Qwen2.5-VL's vision layers over the same frames, sdpa frame by frame as transformers calls it."""
    patches = [height * width for height, width in frames]
    inner = gated_width(config.intermediate_size)
    theirs = Qwen2_5_VLVisionConfig(
        depth=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        intermediate_size=inner,
        num_heads=config.num_attention_heads,
    )
    theirs._attn_implementation = "sdpa"
    cu_seqlens, (row, column) = bounds(patches, device), _places(frames, device)
    tables = vision_tables(row, column, config.hidden_size // config.num_attention_heads)
    tables = tuple(table[:, 0].to(dtype) for table in tables)
    layers = _made(lambda _: qwen.Qwen2_5_VLVisionBlock(theirs), config.num_hidden_layers, device, dtype)
    same = SimpleNamespace(
        hidden_size=config.hidden_size, intermediate_size=inner * 3 // 2, num_hidden_layers=config.num_hidden_layers
    )
    work = flops.tower_layers(same, patches).total
    x = _input((sum(patches), config.hidden_size), device, dtype)
    return Stack(layers, x, lambda layer, x: layer(x, cu_seqlens=cu_seqlens, position_embeddings=tables), work)


def our_decoder(
    config: Qwen3Config, lengths: Sequence[int], device: torch.device, dtype: torch.dtype, backend: str,
    fused: bool = True,
) -> Stack:  # fmt: skip
    """Qwen3's layers with M-RoPE, documents of these lengths packed into one row; fused: with the model's own norms."""
    config._attn_implementation = "keye"
    with torch.device("meta"):
        rotary = build_decoder(config).rotary_emb
    x = _input((1, sum(lengths), config.hidden_size), device, dtype)
    tables, cu_seqlens = rotary(x, _positions(lengths, device)), bounds(lengths, device)
    layers = _made(lambda number: Qwen3DecoderLayer(config, number), config.num_hidden_layers, device, dtype)
    if fused:
        fuse_norms(layers)

    def call(layer: nn.Module, x: Tensor) -> Tensor:
        return _first(
            layer(
                x,
                attention_mask=None,
                position_embeddings=tables,
                cu_seqlens=cu_seqlens,
                varlen_fn=None,
                attention=backend,
            )
        )

    return Stack(layers, x, call, flops.decoder(config, lengths).total)


def their_decoder(config: Qwen3Config, lengths: Sequence[int], device: torch.device, dtype: torch.dtype) -> Stack:
    """Qwen2.5-VL's layers with sdpa; documents are kept apart by a mask, a single one needs none."""
    half = config.hidden_size // config.num_attention_heads // 2
    sections = [half // 4, half * 3 // 8, half - half // 4 - half * 3 // 8]
    theirs = Qwen2_5_VLTextConfig(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        vocab_size=config.vocab_size,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections},
    )
    theirs._attn_implementation = "sdpa"
    x = _input((1, sum(lengths), config.hidden_size), device, dtype)
    rotary = qwen.Qwen2_5_VLRotaryEmbedding(theirs).to(device)
    tables, mask = rotary(x, _positions(lengths, device)), None
    if len(lengths) > 1:
        document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)
        mask = (document[:, None] == document[None]).tril()[None, None]
    layers = _made(lambda n: qwen.Qwen2_5_VLDecoderLayer(theirs, n), config.num_hidden_layers, device, dtype)

    def call(layer: nn.Module, x: Tensor) -> Tensor:
        return _first(layer(x, attention_mask=mask, position_embeddings=tables))

    return Stack(layers, x, call, flops.decoder(theirs, lengths).total)


def _made(make: Callable[[int], nn.Module], count: int, device: torch.device, dtype: torch.dtype) -> nn.ModuleList:
    torch.manual_seed(0)
    with device:
        return nn.ModuleList(make(number) for number in range(count)).to(dtype).train()


def _input(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return drawn.to(device, dtype).requires_grad_()


def _places(frames: Sequence[tuple[int, int]], device: torch.device) -> tuple[Tensor, Tensor]:
    sides = torch.tensor(frames)
    row, column, _ = block_coordinates(sides[:, 0], sides[:, 1])
    return row.to(device), column.to(device)


def _positions(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Text positions `[3, 1, L]`, from 0 in each document."""
    return torch.cat([torch.arange(length) for length in lengths]).to(device).expand(3, 1, -1)


def _first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """A decoder layer's hidden states; some releases of transformers return them in a tuple."""
    return output[0] if isinstance(output, tuple) else output
