"""Slow networks: coordinates of a grid → a kernel on that grid.

s_l(p) = sin(W_l p + b_l); z_0 = s_0; z_l = s_l · (A_l z_(l−1) + a_l) + bias; kernel = B z_L + b. The frequencies W_l
are those of a linear layer times 2π ω₀ γ with γ ~ Gamma(6 / (l + 1), 1) for each unit and axis (a multiplicative filter
network, as in the paper's code). Kernels are computed at least in float32.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keye.hyperzzw.operators import widened

GAMMA = 6.0  # concentration of γ in the first layer


def grid_coordinates(size: Sequence[int], ends: bool, device: torch.device | None = None) -> Tensor:
    """Coordinates `[points, axes]` of a grid in raster order, each axis from −1 to 1.

    ends: the first and last cells are at −1 and 1, as released. Otherwise cells are at their centres, so that grids of
    different sizes sample the same picture.
    """
    axes = []
    for count in size:
        places = torch.arange(count, device=device, dtype=torch.float32)
        axes.append(places * (2 / max(count - 1, 1)) - 1 if ends else (2 * places + 1) / count - 1)
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)


class SlowNet(nn.Module):
    """A kernel `[channels, *size]` for a grid of any size, or of one size only.

    Args:
        axes: of the grid.
        hidden: units of each layer.
        layers: L; there are L + 1 layers of sines.
        channels: of the kernel.
        size: the only size, with a trained bias at each of its places, as released; None: any size, without that bias.
        scale: of the initial weights B; by default 1 / √points of `size`, or 1.
        omega: ω₀.
    """

    def __init__(
        self,
        axes: int,
        hidden: int,
        layers: int,
        channels: int,
        size: Sequence[int] | None = None,
        scale: float | None = None,
        omega: float = 1.0,
    ) -> None:
        super().__init__()
        self.axes, self.hidden, self.layers, self.channels = axes, hidden, layers, channels
        self.size, self.omega = None if size is None else tuple(size), omega
        self.scale = (1.0 if size is None else math.prod(size) ** -0.5) if scale is None else scale
        device = torch.get_default_device()  # the values are drawn on the CPU, so that they are the same on all devices
        for name, value in self.initial().items():
            self.register_parameter(name, nn.Parameter(value.to(device)))

    def initial(self) -> dict[str, Tensor]:
        """New values of the module's own parameters, drawn with torch's generator."""
        hidden, layers = self.hidden, self.layers

        def uniform(gain: float, *shape: int) -> Tensor:
            return torch.empty(shape, device="cpu").uniform_(-1, 1) * gain * shape[-1] ** -0.5

        dtype = torch.get_default_dtype()  # bfloat16 where transformers loads a model in it, which has no gamma
        wide = torch.promote_types(dtype, torch.float32)
        rates = torch.tensor([GAMMA / (layer + 1) for layer in range(layers + 1)], device="cpu", dtype=wide)
        gamma = torch._standard_gamma(rates[:, None, None].expand(layers + 1, hidden, self.axes).contiguous())
        values = {
            "frequencies": uniform(2 * math.pi * self.omega, layers + 1, hidden, self.axes) * gamma.to(dtype),
            "phases": torch.zeros(layers + 1, hidden, device="cpu"),
            "weights": uniform(math.sqrt(3), layers, hidden, hidden),
            "offsets": torch.ones(layers, hidden, device="cpu"),
            "out_weight": uniform(math.sqrt(3) * self.scale, self.channels, hidden),
            "out_bias": torch.zeros(self.channels, device="cpu"),
        }
        if self.size is not None:
            values["place_bias"] = torch.zeros(math.prod(self.size), 1, device="cpu")
        return values

    def forward(self, size: Sequence[int]) -> Tensor:
        """The kernel `[channels, *size]` float32.

        Raises:
            ValueError: the network has another size only.
        """
        return self._kernel(size, lambda state, layer: state)

    def _kernel(self, size: Sequence[int], changed: Callable[[Tensor, int], Tensor]) -> Tensor:
        """`[…, channels, *size]`; changed: applied to the states `[…, points, hidden]` after layer l = 0, 1, …"""
        if self.size is not None and tuple(size) != self.size:
            raise ValueError(
                f"this slow network has a bias for each place of {self.size}, it makes no kernel of {tuple(size)}; "
                "use HyperZZWConfig.ours, whose kernels have any size"
            )
        frequencies = widened(self.frequencies)
        points = grid_coordinates(size, self.size is not None, frequencies.device).to(frequencies)
        with torch.autocast(points.device.type, enabled=False):
            sines = torch.sin(torch.einsum("pa,lha->lph", points, frequencies) + widened(self.phases)[:, None])
            state = sines[0]
            for layer in range(self.layers):
                state = sines[layer + 1] * F.linear(state, widened(self.weights[layer]), widened(self.offsets[layer]))
                if self.size is not None:
                    state = state + widened(self.place_bias)
                state = changed(state, layer)
            kernel = F.linear(state, widened(self.out_weight), widened(self.out_bias)).transpose(-1, -2)
            return kernel.unflatten(-1, tuple(size))


class ContextSlowNet(SlowNet):
    """A k×k kernel that depends on a map: its states are multiplied with a code of the map after each layer.

    The code c = GELU(F mean(R pool(map))), pool an average over k×k cells. After layer l: z ← α · z without its
    gradient + β · z / ‖z‖, the norm over the places of a unit; then z ← z · (E_l c + e_l).

    Args:
        channels: of the map and of the kernel.
        side: k.
        hidden, layers, omega: see `SlowNet`.
        shared: one kernel for all maps of a batch, from the mean of their codes, with constant α = 1 and β = 0.1, as
            released (there α and β are not registered as parameters). Otherwise one kernel for each map, α and β
            trained.
    """

    shared = True

    def __init__(
        self, channels: int, side: int, hidden: int = 32, layers: int = 2, omega: float = 1.0, shared: bool = False
    ) -> None:
        super().__init__(2, hidden, layers, channels, (side, side), omega=omega)
        self.side, self.shared = side, shared
        self.reduce, self.code = nn.Linear(channels, hidden), nn.Linear(hidden, hidden)
        device = torch.get_default_device()
        for name, value in self._shares().items():
            if shared:
                self.register_buffer(name, value.to(device), persistent=False)
            else:
                self.register_parameter(name, nn.Parameter(value.to(device)))

    def initial(self) -> dict[str, Tensor]:
        """See `SlowNet.initial`."""
        drawn = torch.empty(self.layers, self.hidden, self.hidden, device="cpu").uniform_(-1, 1)
        values = super().initial() | {
            "code_weights": drawn * (3 / self.hidden) ** 0.5,
            "code_offsets": torch.ones(self.layers, self.hidden, device="cpu"),
        }
        return values if self.shared else values | self._shares()

    def _shares(self) -> dict[str, Tensor]:
        """α and β `[layers, hidden]`."""
        shape = self.layers, self.hidden
        return {"keep": torch.ones(shape, device="cpu"), "turn": torch.full(shape, 0.1, device="cpu")}

    def forward(self, values: Tensor) -> Tensor:
        """Maps `[B, C, H, W]` → kernels `[B, C, k, k]`, or one of all `[C, k, k]`, float32."""
        pooled = F.adaptive_avg_pool2d(values, self.side).flatten(2).transpose(1, 2)
        reduced = self.reduce(pooled)
        if self.shared:
            reduced = reduced.mean(0)
        code = widened(F.gelu(self.code(reduced)))

        def changed(state: Tensor, layer: int) -> Tensor:
            direction = F.normalize(state, dim=-2)
            state = widened(self.keep[layer]) * state.detach() + widened(self.turn[layer]) * direction
            return state * F.linear(code, widened(self.code_weights[layer]), widened(self.code_offsets[layer]))

        return self._kernel((self.side, self.side), changed)
