"""A space-time transformer that predicts the noise of video frames, each frame with its own noise level and action.

The actions also say where the camera is: a token's rotary position is its place in the world relative to the first
frame of the window, so that attention finds the same place in another frame. Beyond the window nothing is known of
positions.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from keye.dream.scenes import ACTIONS, MOVES, SIZE, STEP
from keye.errors import ArgumentError, CheckpointError, loading, writing
from keye.files import atomic_file, write_atomically


@dataclass(frozen=True)
class DreamConfig:
    """Sizes of a `DreamModel`."""

    size: int = SIZE
    """Side of a frame in pixels."""

    patch: int = 4
    """Side of a patch in pixels; a patch of a frame is a token."""

    window: int = 8
    """Frames of the past and new ones together, at most."""

    width: int = 96
    """Width of a token."""

    depth: int = 3
    """Number of blocks."""

    heads: int = 4
    """Attention heads of a block."""

    def __post_init__(self) -> None:
        if self.size % self.patch or self.width % (4 * self.heads) or min(dataclasses.astuple(self)) < 1:
            raise ArgumentError(
                f"size {self.size} must be a multiple of patch {self.patch}, width {self.width} one of 4 · heads"
                f" = {4 * self.heads}, and all sizes positive"
            )


class DreamModel(nn.Module):
    """Noise of each frame, given all frames of the window, their noise levels and their actions.

    Every matrix is an `nn.Linear`, so that `keye.memory.attach` can reach it.
    """

    def __init__(self, config: DreamConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or DreamConfig()
        cells, width = (config.size // config.patch) ** 2, config.width
        self.read = nn.Linear(3 * config.patch**2, width)
        self.place = nn.Parameter(torch.randn(cells, width) * 0.1)
        self.time = nn.Parameter(torch.randn(config.window, width) * 0.1)
        self.action = nn.Embedding(len(ACTIONS) + 1, width)
        self.level = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(Block(width, config.heads) for _ in range(config.depth))
        self.last = nn.LayerNorm(width)
        self.paint = nn.Linear(width, 3 * config.patch**2)
        nn.init.zeros_(self.paint.weight)
        nn.init.zeros_(self.paint.bias)
        side = config.size // config.patch
        moves = torch.tensor([*MOVES, (0, 0)]) * STEP / config.patch
        cells = torch.cartesian_prod(torch.arange(side), torch.arange(side)).float()
        self.register_buffer("moves", moves, persistent=False)  # [actions + 1, 2] in patches
        self.register_buffer("cells", cells, persistent=False)  # [side², 2]

    def forward(self, frames: Tensor, level: Tensor, action: Tensor) -> Tensor:
        """The predicted noise.

        Args:
            frames: noised or clean, float [B, F, 3, S, S]; the last frame is the latest.
            level: noise level of each frame, float [B, F] in 0 (clean) … 1 (noise).
            action: what moves the camera into each frame, int64 [B, F], or `NO_ACTION`.

        Returns:
            float [B, F, 3, S, S]; that of clean frames has no meaning.
        """
        batch, count = frames.shape[:2]
        if count > self.config.window:
            raise ArgumentError(f"{count} frames exceed the window of {self.config.window}; give fewer past frames")
        dtype = self.read.weight.dtype
        tokens = self.read(self._cut(frames).to(dtype))  # [B, F, cells, width]
        tokens = tokens + self.place + self.time[-count:, None]
        condition = self.level(_waves(level, self.config.width).to(dtype)) + self.action(action)
        tokens, rotation = tokens.flatten(1, 2), self._rotation(action).to(dtype)
        for block in self.blocks:
            tokens = block(tokens, condition, rotation)
        return self._join(self.paint(self.last(tokens)).view(batch, count, -1, 3 * self.config.patch**2)).float()

    def _rotation(self, action: Tensor) -> Tensor:
        """Cosines and sines of every token's place in the world, [2, B, 1, F · cells, head / 2]."""
        camera = self.moves[action].cumsum(1)  # [B, F, 2]
        places = (camera[:, :, None] + self.cells).flatten(1, 2)  # [B, F · cells, 2]
        half = self.config.width // self.config.heads // 2
        rates = math.pi * torch.logspace(0, -1.2, half // 2, device=places.device)
        angles = (places[..., None] * rates).flatten(-2)[:, None]
        return torch.stack([angles.cos(), angles.sin()])

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors.

        Raises:
            KeyeError: the folder cannot be written.
        """
        from safetensors.torch import save_file

        folder = Path(folder)
        with writing(folder, "the model"):
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_file(folder / "model.safetensors") as part:
                save_file({name: value.contiguous() for name, value in self.state_dict().items()}, part)
            about = {"model_type": "keye_dream", **dataclasses.asdict(self.config)}
            write_atomically(folder / "config.json", json.dumps(about, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "DreamModel":
        """Read what `save_pretrained` wrote, in evaluation mode.

        Raises:
            CheckpointError: no such model.
        """
        from safetensors.torch import load_file

        with loading(folder):
            about = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
            if about.pop("model_type", None) != "keye_dream":
                raise CheckpointError(f"{folder} is not a model of keye dream; train one with keye dream train")
            model = cls(DreamConfig(**about))
            model.load_state_dict(load_file(Path(folder) / "model.safetensors"))
        return model.eval()

    def _cut(self, frames: Tensor) -> Tensor:
        """[B, F, 3, S, S] → [B, F, cells, 3 · patch²]"""
        batch, count, side, patch = *frames.shape[:2], self.config.size // self.config.patch, self.config.patch
        cut = frames.view(batch, count, 3, side, patch, side, patch).permute(0, 1, 3, 5, 2, 4, 6)
        return cut.reshape(batch, count, side * side, -1)

    def _join(self, patches: Tensor) -> Tensor:
        batch, count, side, patch = *patches.shape[:2], self.config.size // self.config.patch, self.config.patch
        joined = patches.view(batch, count, side, side, 3, patch, patch).permute(0, 1, 4, 2, 5, 3, 6)
        return joined.reshape(batch, count, 3, side * patch, side * patch)


class Block(nn.Module):
    """Attention over all tokens of the window and an MLP; each frame's condition scales, shifts and gates them."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.modulation = nn.Linear(width, 6 * width)
        self.query_key_value, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        nn.init.zeros_(self.modulation.weight)
        with torch.no_grad():  # both branches are open at the start, by half
            self.modulation.bias.copy_(torch.tensor([0.0, 0.0, 0.5, 0.0, 0.0, 0.5]).repeat_interleave(width))

    def forward(self, tokens: Tensor, condition: Tensor, rotation: Tensor) -> Tensor:
        """Tokens [B, F · cells, width], the condition [B, F, width] of frames, and the rotation of places."""
        cells = tokens.shape[1] // condition.shape[1]
        given = self.modulation(nn.functional.silu(condition)).repeat_interleave(cells, dim=1).chunk(6, dim=-1)
        scale, shift, gate, scale_mlp, shift_mlp, gate_mlp = given
        inner = self.norms[0](tokens) * (1 + scale) + shift
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.query_key_value(inner).chunk(3, dim=-1)
        )
        query, key = _rotated(query, rotation), _rotated(key, rotation)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        tokens = tokens + gate * self.output(mixed)
        inner = self.norms[1](tokens) * (1 + scale_mlp) + shift_mlp
        return tokens + gate_mlp * self.down(nn.functional.gelu(self.up(inner)))


def _rotated(value: Tensor, rotation: Tensor) -> Tensor:
    """Rotary positions (arXiv 2104.09864) on [B, heads, N, head]; the head's two halves are pairs."""
    one, other = value.chunk(2, dim=-1)
    cosine, sine = rotation
    return torch.cat([one * cosine - other * sine, one * sine + other * cosine], dim=-1)


def _waves(level: Tensor, width: int) -> Tensor:
    """Sines and cosines of a level in 0 … 1, float32 [..., width]."""
    rates = torch.exp(torch.linspace(0, math.log(1000.0), width // 2, device=level.device))
    angles = level.float()[..., None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
