"""The keys and values of a rollout: each prompt's once, whatever the size of its group, and each completion's own.

Completions are rows of one buffer for each layer. Rows in use are the first ones; a row that ends is replaced by the
last one. The buffers double in length when the longest completion does, up to the limit on new tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from keye.errors import KeyeError
from keye.model.attention import varlen
from rl.rollout.attention import Members, SharedPrompts, shared_attention

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
    """The `varlen` function of a pass over P packed prompts; keeps each layer's keys and values.

    layers: keys and values [P, Hkv, L, D] of each layer, padded at the end.
    """

    lengths: list[int]
    backend: str
    layers: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool) -> Tensor:
        self.layers.append((self._padded(k), self._padded(v)))
        return varlen(q, k, v, cu_seqlens, causal, backend=self.backend)

    def _padded(self, x: Tensor) -> Tensor:
        return pad_sequence(list(x.split(self.lengths)), batch_first=True).transpose(1, 2).contiguous()


@dataclass
class PromptBlock:
    """Prompts that were read together. layers: keys and values [P, Hkv, L, D]; names, lengths: of the P prompts."""

    names: list[int]
    lengths: list[int]
    layers: list[tuple[Tensor, Tensor]]

    @property
    def tokens(self) -> int:
        """The tokens that it holds, with padding."""
        return len(self.lengths) * max(self.lengths)

    def keep(self, names: Collection[int]) -> None:
        """Free all prompts but these, layer by layer."""
        places = [place for place, name in enumerate(self.names) if name in names]
        self.names = [self.names[place] for place in places]
        self.lengths = [self.lengths[place] for place in places]
        longest = max(self.lengths)
        for layer, pair in enumerate(self.layers):
            self.layers[layer] = tuple(x[places, :, :longest].contiguous() for x in pair)

    def members(self, rows: Mapping[int, list[int]], device: torch.device) -> Members:
        """The rows that continue its prompts, from the rows of each name."""
        own = [torch.tensor(rows.get(name, []), dtype=torch.long) for name in self.names]
        index = pad_sequence(own, batch_first=True, padding_value=-1)
        padding = None
        if min(self.lengths) < max(self.lengths):
            padding = torch.arange(max(self.lengths), device=device) >= torch.tensor(self.lengths).to(device)[:, None]
        real = tuple(places.to(device) for places in (index >= 0).nonzero(as_tuple=True))
        return Members(index.clamp_min(0).to(device), real, padding)


class RolloutCache:
    """Keys and values of the prompts and rows in flight.

    Args:
        layers: attention layers of the model. rows: rows at most. new_tokens: of a row at most.
    """

    def __init__(self, layers: int, rows: int, new_tokens: int) -> None:
        self.layers, self.rows, self.new_tokens = layers, rows, new_tokens
        self._own: list[list[Tensor]] = []  # of each layer keys and values [rows, Hkv, T, D]
        self._blocks: list[PromptBlock] = []
        self._members: list[Members] = []
        self._lengths = torch.zeros(0, dtype=torch.long)
        self._padding = torch.zeros(0, 0, dtype=torch.bool)
        self._layer = 0

    @property
    def prompt_tokens(self) -> int:
        """Tokens that are held of prompts, with padding."""
        return sum(block.tokens for block in self._blocks)

    def add(self, block: PromptBlock) -> None:
        """Hold the prompts of a block."""
        self._blocks.append(block)

    def release(self, held: Collection[int]) -> None:
        """Free the prompts that are not in `held`: a block when all have ended, a part of it when half have."""
        for block in self._blocks:
            left = sum(name in held for name in block.names)
            if 0 < left <= len(block.names) // 2:
                block.keep(held)
        self._blocks = [block for block in self._blocks if any(name in held for name in block.names)]

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
        self._members = [block.members(members, device) for block in self._blocks]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool) -> Tensor:
        """The `varlen` function of a pass over one new token per row: q [R, H, D], k and v [R, Hkv, D] → [R, H, D]."""
        layer, self._layer = self._layer, self._layer + 1
        keys, values = self._append(layer, k, v)
        pairs = zip(self._members, self._blocks, strict=True)
        blocks = [SharedPrompts(members, *block.layers[layer]) for members, block in pairs if members.index.numel()]
        return shared_attention(q, keys, values, self._padding, blocks)

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
