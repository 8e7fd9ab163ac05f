"""The native-resolution vision tower: SigLIP's layers over any frame sizes, with interpolated positions and 2-D RoPE.

Parameter names are SigLIP's, so that its weights load unchanged. Frames of all sizes run in one packed call; each frame
is a segment of its own (as in the release).
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from keye.errors import KeyeError
from keye.hyperzzw.mixer import FrameGroups, HyperZZWMixer
from keye.model.attention import Varlen, recording, varlen
from keye.model.config import KeyeVisionConfig
from keye.model.rope import block_coordinates, rotate, vision_tables
from keye.model.segments import segments_of
from keye.motion.pathway import MotionPathway
from keye.motion.settings import MotionSettings
from keye.slowfast.pixels import normalised

# Standard deviation of a new position table relative to a patch embedding of unit pixels. A tower learns where things
# are only from this table: M-RoPE turns columns too slowly to tell neighbours apart. With the usual deviation for both
# the table has a twentieth of a patch, and the tiny model needs twice the examples to name the corner of an object.
POSITION_SHARE = 0.5

# Patches per chunk where frames pass through the tower in chunks. It bounds the memory of activations (SigLIP-so400m in
# bf16: about 5 GB) and still gives a GPU some milliseconds of work.
FRAME_PATCHES = 4096

MIXERS = ("attention", "hyperzzw")


class Trace(NamedTuple):
    """Lists that a forward pass fills with intermediate results; None for those that are not requested.

    hidden_states: `[N, width]` before every layer and at the end. attentions: `[heads, N, N]` of every layer, float32,
    0 between frames. The weights are computed separately, because no kernel returns them.
    """

    hidden_states: list[Tensor] | None = None
    attentions: list[Tensor] | None = None


class Places(NamedTuple):
    """LongTensors `[N]`: the row and column of every patch of a packed batch in its frame, and the frame's size."""

    row: Tensor
    column: Tensor
    height: Tensor
    width: Tensor


class FramePart(NamedTuple):
    """Consecutive tokens of one large frame; other processes encode its other tokens (sequence parallelism).

    pixels: `[4n, 3, P, P]`, the four patches of each token together (`merge_order`). height, width: of the frame in
    patches. first: the first of the n tokens. most: patches of the largest part, the same on every process, so that all
    make the same choice about recomputation. varlen: attention of this part's patches to those of the complete frame.
    """

    pixels: Tensor
    height: int
    width: int
    first: int
    most: int
    varlen: Varlen

    def places(self) -> Places:
        """The places of the patches of `pixels` in the frame."""
        place = torch.arange(len(self.pixels), device=self.pixels.device)
        token, corner = self.first + place // 4, place % 4
        row = 2 * (token // (self.width // 2)) + corner // 2
        column = 2 * (token % (self.width // 2)) + corner % 2
        return Places(row, column, torch.full_like(row, self.height), torch.full_like(row, self.width))


def position_std(patch_std: float, patch_size: int) -> float:
    """Standard deviation of a new position table beside patch weights of `patch_std`; see `POSITION_SHARE`."""
    return POSITION_SHARE * patch_std * math.sqrt(3 * patch_size**2)


def chunks_of(grid_thw: Tensor) -> list[tuple[int, int]]:
    """Consecutive chunks (rows, patches) of `grid_thw` `[F, 3]`: at most `FRAME_PATCHES` patches, or a single row."""
    chunks: list[tuple[int, int]] = []
    for patches in grid_thw.prod(1).tolist():
        if chunks and chunks[-1][1] + patches <= FRAME_PATCHES:
            chunks[-1] = chunks[-1][0] + 1, chunks[-1][1] + patches
        else:
            chunks.append((1, patches))
    return chunks


def in_chunks(
    run: Callable[..., Tensor],
    values: Tensor,
    grid_thw: Tensor,
    recomputed: bool = False,
    added: Tensor | None = None,
) -> Tensor:
    """`run(values, grid_thw)` over consecutive chunks of complete frames (`chunks_of`), concatenated along dimension 0.

    recomputed: save only the inputs of a chunk, and compute it again in the backward pass. added: a third argument of
    `run`, which has a row for each of `values`.
    """
    chunks, more = chunks_of(grid_thw), () if added is None else (added,)
    if not chunks or sum(patches for _, patches in chunks) != len(values):
        return run(values, grid_thw, *more)  # it raises the error
    sizes = [patches for _, patches in chunks]
    rows = grid_thw.split([rows for rows, _ in chunks])
    parts = zip(values.split(sizes), rows, *(each.split(sizes) for each in more), strict=True)
    step = partial(checkpoint, run, use_reentrant=False) if recomputed else run
    results = [step(*part) for part in parts]
    return results[0] if len(results) == 1 else torch.cat(results)


def places_of(frames: Tensor, total: int) -> Places:
    """The places of `total` patches in raster order of frames `[F, 2]` (height, width in patches)."""
    row, column, frame = block_coordinates(frames[:, 0], frames[:, 1], total)
    return Places(row, column, frames[frame, 0], frames[frame, 1])


class PositionTable(nn.Embedding):
    """The learned positions of a grid; a class of its own so that a new one gets its own deviation."""


class VisionEmbeddings(nn.Module):
    """Patches → vectors, plus the learned position table, interpolated to the frame's own size."""

    def __init__(self, config: KeyeVisionConfig) -> None:
        super().__init__()
        self.grid = config.position_grid
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, config.patch_size, config.patch_size)
        self.position_embedding = PositionTable(self.grid**2, config.hidden_size)

    def forward(self, pixel_values: Tensor, places: Places) -> Tensor:
        """pixel_values `[N, 3, P, P]`, bytes or normalised → `[N, width]`; positions are added in float32."""
        weight = self.patch_embedding.weight
        pixels = normalised(pixel_values.flatten(1)).to(weight.dtype)
        patches = F.linear(pixels, weight.flatten(1), self.patch_embedding.bias)
        return (patches + self.positions(places)).to(patches.dtype)

    def positions(self, places: Places) -> Tensor:
        """The table interpolated bilinearly (`align_corners=False`) at every patch: `[N, width]` float32.

        One call for frames of any number of sizes: the four neighbours of a patch are one weighted bag of rows.
        """
        top, bottom, down = self._neighbours(places.row, places.height)
        left, right, along = self._neighbours(places.column, places.width)
        above, below = top * self.grid, bottom * self.grid
        cells = torch.stack((above + left, above + right, below + left, below + right), dim=1)
        weights = torch.stack(((1 - down) * (1 - along), (1 - down) * along, down * (1 - along), down * along), dim=1)
        table = self.position_embedding.weight.float()
        return F.embedding_bag(cells, table, per_sample_weights=weights, mode="sum")

    def _neighbours(self, cell: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The two table cells around the centre of cell `cell` of `count`, and the weight of the second."""
        # Integers up to the last division, so that a side of `grid` cells matches the table exactly.
        place = ((2 * cell + 1) * self.grid - count).clamp(min=0)
        first = place // (2 * count)
        return first, (first + 1).clamp(max=self.grid - 1), (place % (2 * count)).float() / (2 * count)


class VisionAttention(nn.Module):
    """Bidirectional attention inside each frame."""

    def __init__(self, config: KeyeVisionConfig) -> None:
        super().__init__()
        width, self.heads = config.hidden_size, config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor,
        tables: tuple[Tensor, Tensor] | None,
        backend: str = "auto",
        varlen_fn: Varlen | None = None,
    ) -> Tensor:
        q, k, v = (project(x).unflatten(-1, (self.heads, -1)) for project in (self.q_proj, self.k_proj, self.v_proj))
        if tables is not None:
            q, k = rotate(q, *tables), rotate(k, *tables)
        if varlen_fn is None:
            out = varlen(q, k, v, cu_seqlens, False, backend=backend)
        else:
            out = varlen_fn(q, k, v, cu_seqlens, False)
        return self.out_proj(out.flatten(1))


class VisionMLP(nn.Module):
    """Two linear layers with the tanh GELU."""

    def __init__(self, config: KeyeVisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class VisionLayer(nn.Module):
    """Pre-norm attention, or another mixer, and MLP."""

    def __init__(self, config: KeyeVisionConfig) -> None:
        super().__init__()
        norm = partial(nn.LayerNorm, config.hidden_size, eps=config.layer_norm_eps)
        self.layer_norm1, self.layer_norm2 = norm(), norm()
        if config.mixer == "attention":
            self.self_attn = VisionAttention(config)
        else:
            self.mixer = HyperZZWMixer(config.hidden_size, config.layer_norm_eps)
        self.mlp = VisionMLP(config)

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor,
        tables: tuple[Tensor, Tensor] | FrameGroups | None,
        backend: str = "auto",
        varlen_fn: Varlen | None = None,
    ) -> Tensor:
        """x `[N, width]`, cu_seqlens `[F + 1]`, tables of `vision_tables`, backend of `varlen` → `[N, width]`.

        tables: another mixer than attention takes the frames instead. varlen_fn: computes the attention instead of
        `varlen`.
        """
        normed = self.layer_norm1(x)
        if isinstance(tables, FrameGroups):
            x = x + self.mixer(normed, tables)
        else:
            x = x + self.self_attn(normed, cu_seqlens, tables, backend, varlen_fn)
        return x + self.mlp(self.layer_norm2(x))


class VisionEncoder(nn.Module):
    """The stack of layers (a module of its own so that names are SigLIP's)."""

    def __init__(self, config: KeyeVisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_hidden_layers))


class KeyeVisionModel(nn.Module):
    """Patches of any number of frames or images → one feature per patch; `attention` names the backend of `varlen`.

    It is called once for all frames, so that a trainer that partitions parameters gathers the tower once; it splits the
    frames into chunks itself.
    """

    def __init__(self, config: KeyeVisionConfig, attention: str = "auto") -> None:
        super().__init__()
        width, heads = config.hidden_size, config.num_attention_heads
        if config.mixer not in MIXERS:
            raise KeyeError(f"vision_config: mixer {config.mixer!r} is unknown; use {' or '.join(MIXERS)}")
        if config.mixer == "attention" and (width % heads or (config.rotary and width // heads % 4)):
            raise KeyeError(
                f"vision_config: hidden_size {width} does not give {heads} heads of a multiple of 4, which rows and "
                "columns of the rotary need; change num_attention_heads or hidden_size"
            )
        self.config = config
        self.attention = attention
        self.embeddings = VisionEmbeddings(config)
        self.encoder = VisionEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        if config.motion is not None:
            self.motion = MotionPathway(MotionSettings.of(config.motion), width)
        self.gradient_checkpointing = False

    def forward(
        self,
        pixel_values: Tensor | None,
        grid_thw: Tensor | None,
        parts: Sequence[FramePart] = (),
        trace: Trace | None = None,
        clips: Tensor | None = None,
    ) -> Tensor:
        """pixel_values `[N, 3, 14, 14]` in raster order, grid_thw `[F, 3]` rows (1, h, w) in patches → `[N, width]`.

        Pixels are bytes (uint8) or floats in [−1, 1]. Without a gradient, and with gradient checkpointing, frames pass
        through in chunks, so that only the activations of one chunk are in memory; with gradient checkpointing a chunk
        is computed again in the backward pass, unless the tower is frozen.

        Args:
            parts: parts of frames that other processes also encode; their features come first, in the order of their
                pixels.
            trace: filled with intermediate results; nothing is recomputed then.
            clips: `[F, 3]` of `keye.motion.timing`, for a motion pathway; None if all are stills.
        """
        added = None
        if grid_thw is not None and not torch.compiler.is_compiling():
            grid_thw = grid_thw.to("cpu", torch.long)  # read once, not in every chunk and recomputation
        if self.config.motion is not None:
            if parts:
                raise KeyeError("a motion pathway reads whole clips, and other processes encode parts of these frames")
            added = self.motion(pixel_values, grid_thw, clips)
        if trace is not None or (torch.compiler.is_compiling() and not parts):
            return self._encode(pixel_values, grid_thw, added, trace)
        values = [part.pixels for part in parts] + ([] if pixel_values is None else [pixel_values])
        trains = torch.is_grad_enabled() and any(x.requires_grad for x in (*values, *self.parameters()))
        recomputed = trains and self.gradient_checkpointing and self.training
        with torch.set_grad_enabled(trains):
            encode = partial(checkpoint, self._encode_part, use_reentrant=False) if recomputed else self._encode_part
            # The parts come first: their ranks wait for each other, before each continues with frames of its own.
            found = [encode(part) for part in parts]
            if pixel_values is not None:
                chunked = recomputed or not trains
                run = partial(in_chunks, self._encode, recomputed=recomputed) if chunked else self._encode
                found.append(run(pixel_values, grid_thw, added=added))
        return found[0] if len(found) == 1 else torch.cat(found)

    def _encode(
        self, pixel_values: Tensor, grid_thw: Tensor, added: Tensor | None = None, trace: Trace | None = None
    ) -> Tensor:
        """All frames in one call, with `added` to their patch embeddings.

        With checkpointing, layers over more than `FRAME_PATCHES` patches are recomputed.
        """
        frames = grid_thw[:, 1:]
        if torch.compiler.is_compiling():  # a graph knows the number of frames only from the rows
            torch._assert_async((grid_thw[:, 0] == 1).all(), "inside a graph every row of grid_thw is one frame")
        else:
            frames = frames.repeat_interleave(grid_thw[:, 0], dim=0)
        cu_seqlens = F.pad(frames.prod(dim=1).cumsum(0), (1, 0))
        if not torch.compiler.is_compiling():
            segments = segments_of(cu_seqlens)
            # Checked here for all layers; a GPU does not report a wrong number, and would read out of bounds.
            if segments.total != len(pixel_values):
                raise KeyeError(
                    f"grid_thw has {segments.total} patches, but pixel_values {len(pixel_values)}: "
                    "prepare both with one call of the processor"
                )
            cu_seqlens = segments.boundaries(pixel_values.device)
        places = places_of(frames.to(pixel_values.device), len(pixel_values))
        if self.config.mixer != "attention":
            groups = self._groups(frames, pixel_values.device, trace)
            hidden_states = None if trace is None else trace.hidden_states
            total = len(pixel_values)
            return self._layers(pixel_values, places, cu_seqlens, total, None, hidden_states, groups, added)
        if trace is None:
            return self._layers(pixel_values, places, cu_seqlens, len(pixel_values), added=added)
        recorded = None if trace.attentions is None else partial(recording, trace.attentions, self.attention)
        return self._layers(pixel_values, places, cu_seqlens, 0, recorded, trace.hidden_states, added=added)

    def _groups(self, frames: Tensor, device: torch.device, trace: Trace | None) -> FrameGroups:
        """The frames `[F, 2]` of patches on `device` for another mixer than attention.

        Raises:
            KeyeError: attention weights are requested, or the forward pass is compiled.
        """
        if trace is not None and trace.attentions is not None:
            raise KeyeError(f"mixer {self.config.mixer!r} has no attention weights; do not request the tower's")
        if torch.compiler.is_compiling():
            raise KeyeError(f"mixer {self.config.mixer!r} cannot be compiled; compile only the decoder's layers")
        return FrameGroups.of(frames, device)

    def _encode_part(self, part: FramePart) -> Tensor:
        """Features `[4n, width]` of the patches of a part, in their order; all processes of the frame call it."""
        if self.config.mixer != "attention":
            raise KeyeError(
                f"mixer {self.config.mixer!r} encodes a frame as a whole, but sequence parallelism divides frames of "
                f"more than {FRAME_PATCHES} patches; limit frames and stills to {FRAME_PATCHES // 4} tokens"
            )
        total = torch.tensor([0, part.height * part.width], dtype=torch.int32)  # read on the host, by every layer
        return self._layers(part.pixels, part.places(), total, part.most, part.varlen)

    def _layers(
        self,
        pixels: Tensor,
        places: Places,
        cu_seqlens: Tensor,
        most: int,
        varlen_fn: Varlen | None = None,
        hidden_states: list[Tensor] | None = None,
        groups: FrameGroups | None = None,
        added: Tensor | None = None,
    ) -> Tensor:
        x = self.embeddings(pixels, places)
        x = x if added is None else x + added
        tables: tuple[Tensor, Tensor] | FrameGroups | None = groups
        if groups is None and self.config.rotary:
            head_dim = self.config.hidden_size // self.config.num_attention_heads
            tables = vision_tables(places.row, places.column, head_dim, self.config.rope_theta)
        recomputed = self.gradient_checkpointing and self.training and most > FRAME_PATCHES
        for layer in self.encoder.layers:
            if hidden_states is not None:
                hidden_states.append(x)
            if recomputed:
                x = checkpoint(layer, x, cu_seqlens, tables, self.attention, varlen_fn, use_reentrant=False)
            else:
                x = layer(x, cu_seqlens, tables, self.attention, varlen_fn)
        x = self.post_layernorm(x)
        if hidden_states is not None:
            hidden_states.append(x)
        return x
