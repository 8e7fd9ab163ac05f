"""The temporary LoRA of SlowFast-VGen (arXiv 2410.23277): low-rank weights that are written while a model is used.

The model's own weights never change: forward hooks add `scale · B A x` to the outputs of linear layers. Writing is the
one place where inference takes a gradient. Sources: SlowFast-VGen, section 3.3 (rank 32, Adam, learning rate 1e-4, a
new LoRA for each episode); its ancestor for text, Temp-LoRA (arXiv 2401.11504).
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from keye.checks import integer
from keye.errors import ArgumentError, CheckpointError, writing
from keye.files import atomic_file

FORMAT = "keye temporary lora 1"
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def attach(
    model: nn.Module,
    rank: int = 32,
    alpha: float | None = None,
    match: str = "",
    *,
    learning_rate: float = 1e-4,
    betas: tuple[float, float] = (0.9, 0.999),
    max_norm: float | None = None,
    seed: int = 0,
) -> "TemporaryLora":
    """Attach an empty memory to the linear layers of a model; until the first `write` no output changes.

    Args:
        model: any module. Its parameters may be bf16, frozen, or in inference mode.
        rank: columns of A and rows of B; less where a layer is narrower.
        alpha: the product of the two matrices is scaled by alpha / rank (default: rank, so by 1).
        match: regular expression; a layer takes part if its name contains a match (default: all linear layers, which
            are `nn.Linear` and the `Conv1D` of transformers' GPT-2).
        learning_rate, betas: of Adam. max_norm: clips the gradient's norm over all factors.
        seed: of the factors' initial values.

    Raises:
        ArgumentError: no layer matches, or a value is impossible.
    """
    rank = integer("rank of a memory", rank, error=ArgumentError)
    if learning_rate <= 0 or any(value is not None and value <= 0 for value in (alpha, max_norm)):
        raise ArgumentError(
            f"alpha {alpha}, learning_rate {learning_rate} and max_norm {max_norm} of a memory must be positive; the "
            "paper uses a learning rate of 1e-4"
        )
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ArgumentError(f"betas of a memory are {betas}; give two numbers from 0 to below 1")
    try:
        pattern = re.compile(match)
    except (re.error, TypeError) as error:
        raise ArgumentError(
            f"match {match!r} is not a regular expression ({error}); give text such as 'q_proj'"
        ) from error
    every = {name: module for name, module in model.named_modules() if _is_linear(module)}
    layers = {name: module for name, module in every.items() if pattern.search(name)}
    if not layers:
        known = f"such as {', '.join(list(every)[:3])}" if every else "and the model has none"
        raise ArgumentError(f"match {match!r} finds no linear layer, {known}; see the names in model.named_modules()")
    scale = (rank if alpha is None else alpha) / rank
    memory = TemporaryLora(layers, rank, scale, learning_rate, betas, max_norm, seed)
    holders = Counter(id(weight) for module in model.modules() for weight in module.parameters(recurse=False))
    memory.shared = tuple(name for name, layer in layers.items() if holders[id(layer.weight)] > 1)
    return memory


class TemporaryLora:
    """Low-rank changes of linear layers, written with Adam; made by `attach`.

    Attributes:
        layers: name → the linear layer.
        factors: name → (A float32 [r, in], B float32 [out, r]) on the layer's device.
        writes: Adam steps since the last `reset`.
        shared: names of layers whose weight another module has too, such as a head tied to the embeddings.
    """

    shared: tuple[str, ...] = ()

    def __init__(
        self,
        layers: dict[str, nn.Module],
        rank: int,
        scale: float,
        learning_rate: float,
        betas: tuple[float, float],
        max_norm: float | None,
        seed: int,
    ) -> None:
        self.layers, self.rank, self.scale, self.seed = layers, rank, scale, seed
        self.learning_rate, self.betas, self.max_norm = learning_rate, betas, max_norm
        self.factors: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
        self._recording = self._merged = self._disabled = False
        self.reset()
        self._hooks = [layer.register_forward_hook(self._hook(name)) for name, layer in layers.items()]

    # Use

    def write(self, loss: Callable[[], Tensor], steps: int = 1) -> list[float]:
        """Take Adam steps on the factors alone; the model's parameters get neither gradients nor changes.

        Args:
            loss: computes the loss with a forward pass of the model; called once a step, with gradients enabled also
                under `torch.no_grad` and `torch.inference_mode`. Tensors that it uses must not be made in
                inference mode: clone them outside it.
            steps: number of steps.

        Returns:
            The loss before each step.

        Raises:
            ArgumentError: the memory is detached, merged or disabled, or the loss is not a finite number that depends
                on the layers; the step is then not taken.
        """
        if not self._hooks or self._merged or self._disabled:
            raise ArgumentError("a memory that is detached, merged or disabled cannot be written; attach it first")
        losses, every = [], self._all()
        for _ in range(steps):
            with torch.inference_mode(False), torch.enable_grad():
                gradients, value = self._gradients(loss, every)
                for factor, gradient in zip(every, gradients, strict=True):
                    factor.grad = gradient
                if self.max_norm is not None:
                    nn.utils.clip_grad_norm_(every, self.max_norm)
                self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
            self.writes += 1
            losses.append(value)
        return losses

    def reset(self) -> None:
        """Forget everything: B is zero, A as at the start, Adam's moments are empty."""
        numbers = torch.Generator().manual_seed(self.seed)
        for name, layer in self.layers.items():
            inputs, outputs = _features(layer)
            rank = min(self.rank, inputs, outputs)
            bound = inputs**-0.5
            down = torch.empty(rank, inputs).uniform_(-bound, bound, generator=numbers)
            self._put(name, down, torch.zeros(outputs, rank))
        self._optimizer = torch.optim.Adam(self._all(), lr=self.learning_rate, betas=self.betas)
        self.writes = 0

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The model without the memory, for the block.

        Raises:
            ArgumentError: the memory is merged, so the weights contain it.
        """
        if self._merged:
            raise ArgumentError("a merged memory cannot be disabled; leave the block of `merged` first")
        before, self._disabled = self._disabled, True
        try:
            yield
        finally:
            self._disabled = before

    @contextmanager
    def merged(self) -> Iterator[None]:
        """The change added to the weights, for the block: generation then costs what it costs without a memory.

        Afterwards the weights have their previous bits, from a copy. In a bf16 layer the sum is rounded to bf16, which
        loses changes of less than about 0.4 % of a weight; the hooks add in float32.

        Raises:
            ArgumentError: the memory is detached, disabled or merged already, or a layer's weight is partitioned
                (ZeRO-3) or shared with another module, which would change too.
        """
        if not self._hooks or self._merged or self._disabled:
            raise ArgumentError("a memory that is detached, disabled or merged cannot be merged; attach it first")
        if self.shared:
            raise ArgumentError(
                f"the weight of {self.shared[0]} is tied to that of another module; attach with a match that leaves it "
                "out, or use the memory without merging it"
            )
        for name, layer in self.layers.items():
            if layer.weight.numel() != math.prod(_features(layer)):
                raise ArgumentError(f"the weight of {name} is partitioned; use the memory without merging it")
        kept = {name: layer.weight.detach().clone() for name, layer in self.layers.items()}
        try:
            self._merged = True
            with torch.no_grad():
                for name, layer in self.layers.items():
                    if self.writes:
                        change = self.change(name)
                        change = change if isinstance(layer, nn.Linear) else change.T  # Conv1D has [in, out]
                        layer.weight.copy_(layer.weight.float() + change)
            yield
        finally:
            with torch.no_grad():
                for name, layer in self.layers.items():
                    layer.weight.copy_(kept[name])
            self._merged = False

    def change(self, name: str) -> Tensor:
        """What the memory adds to the weight of a layer, float32 [out, in]."""
        down, up = (factor.detach() for factor in self.factors[name])
        return self.scale * (up @ down)

    def detach(self) -> None:
        """Remove the memory from the model, which is then as before `attach`; may be called twice."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @property
    def nbytes(self) -> int:
        """Bytes of the factors, without Adam's moments."""
        return sum(factor.numel() * factor.element_size() for factor in self._all())

    # State

    def state(self) -> dict[str, Tensor]:
        """A copy of the factors and of Adam's moments: name.A, name.B, name.A.exp_avg, …"""
        found = {}
        for name, pair in self.factors.items():
            for letter, factor in zip("AB", pair, strict=True):
                found[f"{name}.{letter}"] = factor.detach().clone()
                for key, value in self._optimizer.state.get(factor, {}).items():
                    found[f"{name}.{letter}.{key}"] = value.clone()
        return found

    def restore(self, state: dict[str, Tensor], writes: int) -> None:
        """Continue from `state` exactly: the next write takes the step that it would have taken there.

        Args:
            state: from `state`. writes: the attribute at that time.

        Raises:
            CheckpointError: a factor is missing or has another shape.
        """
        self._check(state, "the state of the memory")
        for name, pair in self.factors.items():
            for letter, factor in zip("AB", pair, strict=True):
                with torch.no_grad():
                    factor.copy_(state[f"{name}.{letter}"])
                moments = {key: state.get(f"{name}.{letter}.{key}") for key in MOMENTS}
                self._optimizer.state.pop(factor, None)
                if all(value is not None for value in moments.values()):
                    self._optimizer.state[factor] = {
                        key: value.to("cpu" if key == "step" else factor.device).clone()
                        for key, value in moments.items()
                    }
        self.writes = writes

    def save(self, path: str | Path) -> None:
        """Write the memory to a safetensors file, completely or not at all.

        Raises:
            KeyeError: the file cannot be written.
        """
        from safetensors.torch import save_file

        about = {"format": FORMAT, "writes": str(self.writes), "scale": repr(self.scale), "rank": str(self.rank)}
        state = {name: value.contiguous().cpu() for name, value in self.state().items()}
        with writing(path, "the memory"), atomic_file(path) as part:
            save_file(state, part, metadata={"about": json.dumps(about)})

    def load(self, path: str | Path) -> None:
        """Read a memory that `save` wrote for the same layers, rank and alpha; writing continues from there.

        Raises:
            CheckpointError: no such file, not a memory, or one of other layers.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), "pt") as file:
                about: dict[str, Any] = json.loads((file.metadata() or {}).get("about", "{}"))
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError) as error:
            raise CheckpointError(f"{path} is not a memory ({error}); give a file that `save` wrote") from error
        if about.get("format") != FORMAT or float(about["scale"]) != self.scale:
            raise CheckpointError(
                f"{path} is not a memory of scale {self.scale:g}; attach with the rank and alpha that it was saved with"
            )
        self._check(state, str(path))
        self.restore(state, int(about["writes"]))

    # Parts

    def _gradients(
        self, loss: Callable[[], Tensor], every: list[nn.Parameter]
    ) -> tuple[Sequence[Tensor | None], float]:
        self._recording = True
        try:
            value = loss()
            if not isinstance(value, Tensor) or value.numel() != 1:
                found = f"of shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
                raise ArgumentError(
                    f"the loss is {found}; return one number as a tensor, such as `model(**batch).loss`"
                )
            if not value.isfinite():
                raise ArgumentError(f"the loss is {float(value)}; check the inputs, or give a lower learning_rate")
            if not value.requires_grad:
                raise ArgumentError("the loss does not depend on the layers of the memory; see `match`")
            return torch.autograd.grad(value.float(), every, allow_unused=True), float(value.detach())
        finally:
            self._recording = False

    def _all(self) -> list[nn.Parameter]:
        return [factor for pair in self.factors.values() for factor in pair]

    def _put(self, name: str, down: Tensor, up: Tensor) -> None:
        device = self.layers[name].weight.device
        with torch.inference_mode(False):
            self.factors[name] = tuple(nn.Parameter(value.to(device, torch.float32)) for value in (down, up))

    def _check(self, state: dict[str, Tensor], source: str) -> None:
        written = {name[:-2] for name in state if name.endswith(".B")}
        if other := sorted(written - set(self.factors)):
            raise CheckpointError(
                f"{source}: {len(other)} layers are not in this memory, such as {other[0]}; attach with the match that "
                "it was saved with"
            )
        for name, pair in self.factors.items():
            for letter, factor in zip("AB", pair, strict=True):
                value = state.get(f"{name}.{letter}")
                if value is None or value.shape != factor.shape:
                    found = "missing" if value is None else f"of shape {list(value.shape)}"
                    raise CheckpointError(
                        f"{source}: {name}.{letter} is {found}, not {list(factor.shape)}; attach with the match and"
                        " rank that it was saved with"
                    )

    def _hook(self, name: str) -> Callable[[nn.Module, Sequence[Tensor], Tensor], Tensor | None]:
        """Adds the change of one layer to its output [..., out], in float32."""

        def add(layer: nn.Module, inputs: Sequence[Tensor], output: Tensor) -> Tensor | None:
            # An empty memory leaves outputs untouched: −0.0 + 0.0 would already be another bit pattern.
            if self._merged or self._disabled or not (self.writes or self._recording):
                return None
            down, up = self.factors[name]
            if not self._recording:
                down, up = down.detach(), up.detach()
            with torch.autocast(output.device.type, enabled=False):
                low = nn.functional.linear(inputs[0].float(), down)
                return (output.float() + self.scale * nn.functional.linear(low, up)).to(output.dtype)

        return add


def _is_linear(module: nn.Module) -> bool:
    """Whether it is `nn.Linear` or the `Conv1D` of transformers, which is known by its name: nothing is imported."""
    conv1d = type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"
    return isinstance(module, nn.Linear) or conv1d


def _features(layer: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a layer; not from the weight, which ZeRO-3 partitions and which may be packed."""
    return (layer.in_features, layer.out_features) if isinstance(layer, nn.Linear) else (layer.nx, layer.nf)
