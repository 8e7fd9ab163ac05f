"""The parts of a causal language model that a trace reads: blocks, attention, final norm and head."""

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from keye.errors import KeyeError

MASKABLE = ("keye", "sdpa", "eager")
"""Attention implementations that apply a mask of four dimensions."""


@dataclass(frozen=True)
class Anatomy:
    """Parts of a model, found by name and class; nothing is copied.

    Attributes:
        model: the model with its head.
        blocks: the decoder's blocks, first to last.
        attentions: the attention module of each block.
        norm: the norm after the last block.
        head: hidden states → logits.
        softcap: logits are `softcap · tanh(logits / softcap)`; None without a cap.
    """

    model: nn.Module
    blocks: tuple[nn.Module, ...]
    attentions: tuple[nn.Module, ...]
    norm: nn.Module
    head: nn.Module
    softcap: float | None = None

    @classmethod
    def of(cls, model: nn.Module) -> "Anatomy":
        """The parts of a `KeyeForConditionalGeneration` or of a causal LM of transformers.

        Raises:
            KeyeError: a model without such parts, or one whose attention takes no mask.
        """
        decoder = getattr(model, "language_model", None) or _decoder(model)
        config = decoder.config
        blocks = _blocks(decoder, config.num_hidden_layers)
        attentions = tuple(_attention(block) for block in blocks)
        norm = next((getattr(decoder, name) for name in ("norm", "ln_f", "final_layernorm", "final_layer_norm")
                     if isinstance(getattr(decoder, name, None), nn.Module)), None)  # fmt: skip
        head = model.get_output_embeddings()
        if norm is None or head is None:
            missing = "norm after its last block" if norm is None else "head"
            raise KeyeError(f"{type(model).__name__} has no {missing} that a trace can read; give a causal LM")
        if config._attn_implementation not in MASKABLE:
            raise KeyeError(
                f"the attention {config._attn_implementation!r} takes no mask, so no token can be knocked out; load the"
                ' model with attn_implementation="sdpa"'
            )
        return cls(model, blocks, attentions, norm, head, getattr(config, "final_logit_softcapping", None))

    @property
    def depth(self) -> int:
        """The number of blocks."""
        return len(self.blocks)

    @property
    def unembedding(self) -> Tensor:
        """The head's weight `[vocab, hidden]`."""
        return self.head.weight

    @property
    def decoder_config(self) -> object:
        """The config of the decoder."""
        return getattr(self.model.config, "text_config", None) or self.model.config

    @property
    def cache_is_cropped(self) -> bool:
        """Whether the key cache holds all tokens in every block, so that a run can continue from a prefix."""
        kinds = set(getattr(self.decoder_config, "layer_types", None) or ())
        return kinds <= {"full_attention"} and not getattr(self.decoder_config, "sliding_window", None)

    @property
    def takes_logits_to_keep(self) -> bool:
        """Whether `forward` can compute the logits of the last tokens only."""
        return "logits_to_keep" in inspect.signature(self.model.forward).parameters

    def read_out(self, states: Tensor, normed: bool = True) -> Tensor:
        """States `[…, hidden]` of the residual stream → logits `[…, vocab]` fp32, normed: through the final norm."""
        states = states.to(self.unembedding.dtype)
        logits = self.head(self.norm(states) if normed else states).float()
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def _decoder(model: nn.Module) -> nn.Module:
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if decoder is None or decoder is model:
        raise KeyeError(f"{type(model).__name__} is no causal language model with a decoder; give another model")
    return decoder


def _blocks(decoder: nn.Module, depth: int) -> tuple[nn.Module, ...]:
    for child in decoder.children():
        if isinstance(child, nn.ModuleList) and len(child) == depth:
            return tuple(child)
    raise KeyeError(f"{type(decoder).__name__} has no list of {depth} blocks, so its layers cannot be traced")


def _attention(block: nn.Module) -> nn.Module:
    found = [child for child in block.children() if "attention" in type(child).__name__.lower()]
    if len(found) != 1:
        raise KeyeError(
            f"a block of {type(block).__name__} has {len(found)} attention modules; a trace needs exactly one in each"
        )
    return found[0]
