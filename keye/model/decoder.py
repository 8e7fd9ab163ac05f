"""A transformers decoder with M-RoPE in place of its rotary, and with RMS norms that are one kernel on a GPU.

Decoders that M-RoPE does not fit are refused.

Qwen3, Qwen2 and Llama are the families that the tests compare with transformers. Another decoder is accepted if its
rotary and its attention work the same way.
"""

import warnings
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig

from keye.errors import KeyeError
from keye.model.rope import MultimodalRotary

COMPARED = ("qwen3", "qwen2", "llama")
# Functions of a decoder's own head or attention that the head and the packed attention here do not apply.
UNSUPPORTED = ("final_logit_softcapping", "attn_logit_softcapping", "logits_scaling", "logit_scale")


def build_decoder(config: PreTrainedConfig) -> nn.Module:
    """The decoder of `config` without its head, with M-RoPE in place of its rotary.

    Raises:
        KeyeError: a decoder whose positions M-RoPE cannot express, or that uses functions this model does not apply.
    """
    decoder = AutoModel.from_config(config)
    name = config.model_type
    if not hasattr(decoder, "rotary_emb") or not hasattr(decoder, "embed_tokens"):
        raise KeyeError(f"text_config: a {name} decoder has no rotary to replace; use one of {', '.join(COMPARED)}")
    for key in UNSUPPORTED:
        if getattr(config, key, None) not in (None, 0, 1):
            raise KeyeError(f"text_config.{key}: Keye's head does not apply it; use one of {', '.join(COMPARED)}")
    if unknown := set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}:
        raise KeyeError(
            f"text_config.layer_types: {', '.join(sorted(unknown))} cannot be packed; use 'full_attention' or "
            "'sliding_attention'"
        )
    decoder.rotary_emb = multimodal_rotary(type(decoder.rotary_emb), config)
    fuse_norms(decoder)
    if name not in COMPARED:
        warnings.warn(
            f"a {name} decoder is accepted, but only {', '.join(COMPARED)} are compared with transformers in the tests",
            stacklevel=2,
        )
    return decoder


def multimodal_rotary(own: type[nn.Module], config: PreTrainedConfig) -> MultimodalRotary:
    """M-RoPE with the frequencies and the scale that the decoder's own rotary class computes from its config.

    Raises:
        KeyeError: frequencies that depend on the length or the layer, that rotate only a part of the head, or that pair
            dimensions in another way than half-split.
    """
    rope_type = (config.rope_parameters or {}).get("rope_type", "default")
    if rope_type in ("dynamic", "longrope"):
        raise KeyeError(
            f"text_config.rope_parameters: '{rope_type}' changes its frequencies with the length, so that cached and "
            "packed tokens would be rotated differently; use 'default', 'linear', 'llama3' or 'yarn'"
        )
    with torch.device("cpu"):  # values are needed even if the model is built on the meta device
        rotary = own(config=config)
        frequencies = getattr(rotary, "inv_freq", None)
        if frequencies is None:
            raise KeyeError(f"text_config: {own.__name__} has a rotary for each kind of layer, not one")
        sections = config.rope_parameters.get("mrope_section")
        if sections and sum(sections) != len(frequencies):
            raise KeyeError(f"text_config.rope_parameters.mrope_section: {sections} must sum to {len(frequencies)}")
        scale = float(getattr(rotary, "attention_scaling", 1.0))
        ours = MultimodalRotary(own, frequencies.detach().float().clone(), scale, sections)
        probe = torch.zeros(1, 8), torch.arange(8)[None]
        pairs = zip(rotary(*probe), ours(*probe), strict=True)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if 2 * len(frequencies) != head or not all(a.shape == b.shape and torch.allclose(a, b) for a, b in pairs):
        raise KeyeError(
            f"text_config: {own.__name__} rotates only a part of the head or pairs its dimensions differently"
        )
    return ours


class RMSNorm(nn.Module):
    """`weight · x / √(mean(x²) + eps)` over the last dimension, computed in fp32; in and out `[…, size]`.

    On a GPU it is torch's fused kernel. Transformers' norms are several kernels there, and keep an fp32 copy of x and a
    copy of the result for the backward pass: with layers of Qwen3-8B a pass over 524,288 tokens peaks 51 GB higher
    (simulated, docs/results/gpu.md).
    """

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = weight, eps

    def forward(self, x: Tensor) -> Tensor:
        # On a CPU torch has no fused kernel; nor has it one for a weight of another dtype.
        if x.device.type == "cpu" or x.dtype != self.weight.dtype:
            return _normed(x, self.weight, self.variance_epsilon)
        return F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


def fuse_norms(module: nn.Module) -> None:
    """Replace the RMS norms inside `module` by `RMSNorm` with the same weights and names.

    A norm with another formula, such as Gemma's, which adds 1 to its weight, stays as it is.
    """
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if is_rms_norm(type(child)):
                setattr(parent, name, RMSNorm(child.weight, child.variance_epsilon))


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`RMSNorm` in operations that every device has."""
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


@lru_cache(maxsize=64)
def is_rms_norm(kind: type[nn.Module]) -> bool:
    """Whether a class of norms computes what `RMSNorm` does, from its weight and epsilon alone; a small one is tried.

    Its `__init__` is not called: inside `deepspeed.zero.Init` that would partition the weight.
    """
    if not kind.__name__.endswith("RMSNorm") or issubclass(kind, RMSNorm):
        return False
    draw, eps = torch.Generator().manual_seed(0), 0.5
    x, weight = (torch.randn(size, generator=draw, device="cpu") for size in ((3, 8), (8,)))
    norm = kind.__new__(kind)
    nn.Module.__init__(norm)
    norm.weight, norm.variance_epsilon = weight, eps
    with torch.no_grad():
        try:
            found = norm.forward(x)
        except AttributeError:  # it has more than a weight and an epsilon
            return False
        return torch.allclose(found, _normed(x, weight, eps), rtol=1e-5, atol=1e-6)
