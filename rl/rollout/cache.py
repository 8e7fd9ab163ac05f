"""The keys and values of a rollout: each prompt's once, whatever the size of its group, and each completion's own.

Completions are rows of one buffer for each layer. Rows in use are the first ones; a row that ends is replaced by the
last one. The buffers double in length when the longest completion does, up to the limit on new tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from keye.errors import KeyeError
from keye.model.attention import varlen
from rl.rollout.attention import SharedPrompt, shared_attention

FIRST_TOKENS = 32  # length of the buffers at the start


@dataclass(frozen=True)
class Room:
    """How much may be in flight: rows, and tokens of the prompts that are held for them."""

    rows: int
    prompt_tokens: int


def token_bytes(model: nn.Module) -> int:
    """Bytes of the keys and values of one token in all layers."""
    text = model.config.text_config
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    size = next(model.parameters()).element_size()
    return 2 * text.num_hidden_layers * text.num_key_value_heads * head * size


def room_for(longest: int, group_size: int, new_tokens: int, rows: int, budget: int, per_token: int) -> Room:
    """The room for prompts of up to `longest` tokens with groups of completions of up to `new_tokens`.

    Args:
        rows: rows at most. budget: bytes of keys and values. per_token: see `token_bytes`.

    Raises:
        KeyeError: not even one completion of the longest prompt fits into the budget.
    """
    tokens = budget // per_token
    groups = tokens // (longest + group_size * new_tokens)
    fitting = groups * group_size if groups else (tokens - longest) // new_tokens
    if fitting < 1:
        needed = (longest + new_tokens) * per_token
        raise KeyeError(
            f"a prompt of {longest} tokens with one answer of up to {new_tokens} needs {-(-needed >> 20)} MB of keys "
            f"and values, and rollout.cache_mb allows {budget >> 20}: raise it, or use shorter prompts or a smaller "
            "max_new_tokens"
        )
    rows = min(rows, fitting)
    return Room(rows, tokens - rows * new_tokens)


@dataclass
class PromptPass:
    """The `varlen` function of a pass over packed prompts; keeps each layer's keys and values of each prompt.

    kept: for each layer the keys and values [Hkv, L, D] of each prompt.
    """

    lengths: list[int]
    backend: str
    kept: list[list[tuple[Tensor, Tensor]]] = field(default_factory=list)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool) -> Tensor:
        parts = zip(k.split(self.lengths), v.split(self.lengths), strict=True)
        self.kept.append([tuple(x.transpose(0, 1).contiguous() for x in pair) for pair in parts])
        return varlen(q, k, v, cu_seqlens, causal, backend=self.backend)


class RolloutCache:
    """Keys and values of the prompts and rows in flight.

    Args:
        layers: attention layers of the model. rows: rows at most. new_tokens: of a row at most.
    """

    def __init__(self, layers: int, rows: int, new_tokens: int) -> None:
        self.layers, self.rows, self.new_tokens = layers, rows, new_tokens
        self._own: list[list[Tensor]] = []  # of each layer keys and values [rows, Hkv, T, D]
        self._prompts: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._members: dict[int, Tensor] = {}
        self._lengths = torch.zeros(0, dtype=torch.long)
        self._padding = torch.zeros(0, 0, dtype=torch.bool)
        self._layer = 0

    def add_prompt(self, name: int, layers: list[tuple[Tensor, Tensor]]) -> None:
        """Hold a prompt's keys and values [Hkv, L, D], those of each layer."""
        self._prompts[name] = layers

    def remove_prompt(self, name: int) -> None:
        """Free a prompt without rows."""
        del self._prompts[name]

    def move(self, sources: list[int], targets: list[int]) -> None:
        """Copy rows to the places of rows that have ended."""
        if sources and self._own:
            for pair in self._own:
                for x in pair:
                    x[targets] = x[sources]

    def begin(self, prompts: list[int], lengths: list[int], device: torch.device) -> None:
        """Prepare the next pass over the rows in use.

        Args:
            prompts: of each row. lengths: tokens of each row before the pass.
        """
        self._lengths, self._layer = torch.tensor(lengths).to(device), 0
        self._padding = torch.arange(max(lengths) + 1, device=device) > self._lengths[:, None]
        members: dict[int, list[int]] = {}
        for row, name in enumerate(prompts):
            members.setdefault(name, []).append(row)
        flat = torch.tensor([row for rows in members.values() for row in rows]).to(device)
        parts = flat.split([len(rows) for rows in members.values()])
        self._members = dict(zip(members, parts, strict=True))

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool) -> Tensor:
        """The `varlen` function of a pass over one new token per row: q [R, H, D], k and v [R, Hkv, D] → [R, H, D]."""
        layer, self._layer = self._layer, self._layer + 1
        keys, values = self._append(layer, k, v)
        prompts = [SharedPrompt(rows, *self._prompts[name][layer]) for name, rows in self._members.items()]
        return shared_attention(q, keys, values, self._padding, prompts)

    def check_end(self) -> None:
        """Refuse a model whose number of attention calls is not that of its layers.

        Raises:
            KeyeError: the calls of a pass could not be assigned to layers.
        """
        if self._layer != self.layers:
            raise KeyeError(
                f"the decoder called attention {self._layer} times for {self.layers} layers, so that its keys cannot "
                "be assigned to layers; use another decoder"
            )

    def _append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new keys and values behind those of their rows; all of them [R, Hkv, T, D]."""
        rows, longest = self._padding.shape
        if layer == len(self._own):
            shape = (self.rows, k.shape[1], min(FIRST_TOKENS, self.new_tokens), k.shape[2])
            self._own.append([k.new_zeros(shape), v.new_zeros(shape)])
        pair = self._own[layer]
        held = pair[0].shape[2]
        if longest > held:  # layer by layer, so that only one layer is in memory twice
            more = min(self.new_tokens, max(longest, 2 * held)) - held
            pair[:] = [pad(x, (0, 0, 0, more)) for x in pair]
        index = torch.arange(rows, device=k.device)
        for x, new in zip(pair, (k, v), strict=True):
            x[index, :, self._lengths] = new
        return pair[0][:rows, :, :longest], pair[1][:rows, :, :longest]


def compaction(ended: list[bool]) -> tuple[list[int], list[int], list[int]]:
    """How the rows that continue become the first ones with the fewest moves.

    Returns:
        The former place of each remaining row, and the moves: sources and targets.
    """
    left = [place for place, end in enumerate(ended) if not end]
    order = list(range(len(left)))
    holes = [place for place in order if ended[place]]
    tail = [place for place in left if place >= len(left)]
    for hole, source in zip(holes, tail, strict=True):
        order[hole] = source
    return order, tail, holes
