"""Attention of completions to the prompt that they share and to themselves, without copies of the prompt's keys.

For a completion's token the keys are those of its prompt and the earlier ones of its completion. Attention over each of
the two sets gives an output and the log-sum-exp of its scores; the outputs, weighted by exp(lse − lse of both sets),
add up to attention over both. All completions of a group are the queries of one call on the prompt's keys.

In the backward pass each set's kernel gets the merged output and log-sum-exp. From these it computes the probabilities
that the merged softmax gave its own keys, so the gradients are exact, and no scores are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

QUERIES = 1024  # of a chunk whose scores are in memory where there is no fused kernel


class Kernel(Protocol):
    """Attention of packed segments that returns the log-sum-exp. `cu_q`, `cu_k`: S + 1 boundaries each."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, cu_q: Sequence[int], cu_k: Sequence[int], causal: bool
    ) -> tuple[Tensor, Tensor]:
        """q [Lq, H, D], k and v [Lk, Hkv, D] → output [Lq, H, D] and log-sum-exp fp32 (fp64 of fp64) [H, Lq]."""
        ...

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        cu_q: Sequence[int], cu_k: Sequence[int], causal: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Gradients of q, k and v, of the probabilities exp(score − lse)."""
        ...


class CpuKernel:
    """torch's flash kernel of the CPU, one call for each segment."""

    def forward(self, q, k, v, cu_q, cu_k, causal):  # noqa: ANN001, ANN201
        parts = [
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*map(_heads_first, rows), 0.0, causal)
            for rows in _segments(cu_q, cu_k, q, k, v)
        ]
        return torch.cat([out[0].transpose(0, 1) for out, _ in parts]), torch.cat([lse[0] for _, lse in parts], dim=1)

    def backward(self, grad, q, k, v, out, lse, cu_q, cu_k, causal):  # noqa: ANN001, ANN201
        run = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        parts = []
        bounds = zip(_segments(cu_q, cu_k, q, k, v), _segments(cu_q, cu_q, grad, out, out), _pairs(cu_q), strict=True)
        for (q_, k_, v_), (grad_, out_, _), (first, end) in bounds:
            rows = map(_heads_first, (grad_, q_, k_, v_, out_))
            parts.append(run(*rows, lse[None, :, first:end].contiguous(), 0.0, causal))
        return tuple(torch.cat([x[0].transpose(0, 1) for x in column]) for column in zip(*parts, strict=True))


class PlainKernel:
    """Matrix products in fp32, over chunks of queries: for devices and dtypes without a fused kernel."""

    def forward(self, q, k, v, cu_q, cu_k, causal):  # noqa: ANN001, ANN201
        outs, lses = [], []
        for q_, k_, v_ in _segments(cu_q, cu_k, q, k, v):
            for first in range(0, len(q_), QUERIES):
                scores = self._scores(q_, k_, first, causal)
                lses.append(scores.logsumexp(-1).flatten(0, 1))
                weights = scores.softmax(-1)
                outs.append(torch.einsum("kglm,mkd->lkgd", weights, _wide(v_)).flatten(1, 2).to(q.dtype))
        return torch.cat(outs), torch.cat(lses, dim=1)

    def backward(self, grad, q, k, v, out, lse, cu_q, cu_k, causal):  # noqa: ANN001, ANN201
        grads = [torch.zeros_like(_wide(x)) for x in (q, k, v)]
        delta = (_wide(grad) * _wide(out)).sum(-1).T.unflatten(0, (k.shape[1], -1))  # [Hkv, H / Hkv, Lq]
        lse, scale = lse.unflatten(0, (k.shape[1], -1)), q.shape[-1] ** -0.5
        for (q0, q1), (k0, k1) in zip(_pairs(cu_q), _pairs(cu_k), strict=True):
            for first in range(q0, q1, QUERIES):
                rows, keys = slice(first, min(first + QUERIES, q1)), slice(k0, k1)
                weights = (self._scores(q[q0:q1], k[keys], first - q0, causal) - lse[:, :, rows, None]).exp()
                of_out = _grouped(grad[rows], k)
                of_scores = torch.einsum("lkgd,mkd->kglm", of_out, _wide(v[keys])) - delta[:, :, rows, None]
                of_scores = of_scores * weights * scale
                grads[0][rows] = torch.einsum("kglm,mkd->lkgd", of_scores, _wide(k[keys])).flatten(1, 2)
                grads[1][keys] += torch.einsum("kglm,lkgd->mkd", of_scores, _grouped(q[rows], k))
                grads[2][keys] += torch.einsum("kglm,lkgd->mkd", weights, of_out)
        return tuple(g.to(x.dtype) for g, x in zip(grads, (q, k, v), strict=True))

    @staticmethod
    def _scores(q: Tensor, k: Tensor, first: int, causal: bool) -> Tensor:
        """[Hkv, H / Hkv, l, Lk] of the queries from `first` on; masked where causal (then Lq = Lk)."""
        rows = q[first : first + QUERIES]
        scores = torch.einsum("lkgd,mkd->kglm", _grouped(rows, k), _wide(k)) * q.shape[-1] ** -0.5
        if causal:
            hidden = torch.arange(len(k), device=q.device) > torch.arange(len(rows), device=q.device)[:, None] + first
            scores = scores.masked_fill(hidden, -torch.inf)
        return scores


class FlashKernel:
    """torch's flash kernel of CUDA, one call for all segments, in bf16 and fp16."""

    def forward(self, q, k, v, cu_q, cu_k, causal):  # noqa: ANN001, ANN201
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, *self._bounds(q, cu_q, cu_k), 0.0, causal, False
        )
        return out, lse

    def backward(self, grad, q, k, v, out, lse, cu_q, cu_k, causal):  # noqa: ANN001, ANN201
        unused = torch.empty(2, dtype=torch.uint64, device=q.device)  # the state of dropout
        bounds = self._bounds(q, cu_q, cu_k)
        run = torch.ops.aten._flash_attention_backward
        return run(grad.contiguous(), q, k, v, out, lse, *bounds, 0.0, causal, unused, unused)

    @staticmethod
    def _bounds(q: Tensor, cu_q: Sequence[int], cu_k: Sequence[int]) -> tuple[Tensor, Tensor, int, int]:
        longest = (max(end - first for first, end in _pairs(cu)) for cu in (cu_q, cu_k))
        return (_on(tuple(cu_q), q.device), _on(tuple(cu_k), q.device), *longest)


def choose(q: Tensor, groups: int) -> Kernel:
    """The kernel for these queries, with `groups` query heads to a key head."""
    if q.device.type == "cpu":
        return CpuKernel()
    half = q.dtype in (torch.bfloat16, torch.float16)
    if q.device.type == "cuda" and half and not _fault(q.device, q.dtype, q.shape[-1], groups):
        return FlashKernel()
    return PlainKernel()


@lru_cache(maxsize=8)
def _fault(device: torch.device, dtype: torch.dtype, size: int, groups: int) -> str:
    """Why the flash kernel fails on a small tree, compared with `PlainKernel`; empty if it agrees."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"q": (90, 2 * groups), "trunk": (150, 2), "leaf": (90, 2)}
    made = {name: torch.randn(*shape, size, generator=generator).to(device, dtype) for name, shape in shapes.items()}
    layout = Layout((0, 60, 90), (0, 130, 150), (0, 40, 60, 90))
    rows = [made[name] for name in ("q", "trunk", "trunk", "leaf", "leaf")]
    results = []
    try:
        for kernel in (FlashKernel(), PlainKernel()):
            inputs = [x.detach().clone().requires_grad_() for x in rows]
            out = _Merged.apply(*inputs, layout, kernel)
            results.append((out.detach(), *torch.autograd.grad(out, inputs, made["q"])))
    except Exception as error:  # whatever the kernel raises, the plain one computes
        return f"{type(error).__name__}: {error}"
    for got, expected in zip(*results, strict=True):
        if not (got.float() - expected.float()).norm() <= 8 * torch.finfo(dtype).eps * expected.float().norm():
            return "differs from matrix products"
    return ""


@dataclass(frozen=True)
class Layout:
    """Boundaries in packed rows: of each group's completions, of each prompt, and of each completion."""

    groups: tuple[int, ...]
    prompts: tuple[int, ...]
    completions: tuple[int, ...]


def shared_attention(q: Tensor, trunk_k: Tensor, trunk_v: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """Completions of P prompts attend to their prompt and, causally, to themselves; scores are scaled by D ** -0.5.

    Args:
        q: [T, H, D], of the completions. trunk_k, trunk_v: [L, Hkv, D], of the prompts. k, v: [T, Hkv, D].

    Returns:
        [T, H, D].
    """
    return _Merged.apply(q, trunk_k, trunk_v, k, v, layout, choose(q, q.shape[1] // k.shape[1]))


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, trunk_k: Tensor, trunk_v: Tensor, k: Tensor, v: Tensor, layout: Layout, kernel: Kernel
    ) -> Tensor:
        q, trunk_k, trunk_v, k, v = (x.contiguous() for x in (q, trunk_k, trunk_v, k, v))
        of_prompt, prompt = kernel.forward(q, trunk_k, trunk_v, layout.groups, layout.prompts, False)
        of_own, own = kernel.forward(q, k, v, layout.completions, layout.completions, True)
        lse = torch.logaddexp(prompt, own)
        shares = ((part - lse).exp().T[..., None] for part in (prompt, own))  # [T, H, 1]
        out = sum(_wide(part) * share for part, share in zip((of_prompt, of_own), shares, strict=True)).to(q.dtype)
        ctx.layout, ctx.kernel = layout, kernel
        ctx.save_for_backward(q, trunk_k, trunk_v, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, trunk_k, trunk_v, k, v, out, lse = ctx.saved_tensors
        layout, merged = ctx.layout, (out, lse)
        grad = grad.contiguous()
        first = ctx.kernel.backward(grad, q, trunk_k, trunk_v, *merged, layout.groups, layout.prompts, False)
        second = ctx.kernel.backward(grad, q, k, v, *merged, layout.completions, layout.completions, True)
        return first[0] + second[0], *first[1:], *second[1:], None, None


def _pairs(bounds: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(bounds[:-1], bounds[1:], strict=True))


def _segments(cu_q: Sequence[int], cu_k: Sequence[int], q: Tensor, k: Tensor, v: Tensor) -> list[tuple[Tensor, ...]]:
    """The rows of each segment, as views."""
    return [(q[a:b], k[c:d], v[c:d]) for (a, b), (c, d) in zip(_pairs(cu_q), _pairs(cu_k), strict=True)]


def _heads_first(rows: Tensor) -> Tensor:
    """[L, H, D] → [1, H, L, D], a view."""
    return rows.transpose(0, 1)[None]


@lru_cache(maxsize=64)
def _on(bounds: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 boundaries on a device, copied once for all layers."""
    return torch.tensor(bounds, dtype=torch.int32, device=device)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _grouped(rows: Tensor, k: Tensor) -> Tensor:
    """[l, H, D] → [l, Hkv, H / Hkv, D], at least in fp32."""
    return _wide(rows).unflatten(1, (k.shape[1], -1))
