"""Packed attention: every backend that runs here against an explicit softmax, and transformers' decoders."""

import math
import random
from itertools import accumulate, pairwise

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3Config, Qwen3Model

from keye.errors import KeyeError
from keye.model import backends, segments
from keye.model.attention import available, decoder_attention, varlen
from keye.model.config import KeyeConfig
from keye.model.keye import KeyeForConditionalGeneration
from keye.model.segments import segments_of

HERE = available("cpu")
LENGTHS = {
    "mixed": (13, 1, 40, 0, 13, 7, 29, 7),
    "empty at both ends": (0, 5, 9, 0),
    "one": (37,),
    "single tokens": (1, 1, 1, 1),
    "equal": (8, 8, 8),
}


def bounds(lengths: tuple[int, ...] | list[int], **options: object) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], **options)


def pack(length: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """q, k, v and a weight for the output, seeded by the shape."""
    generator = torch.Generator().manual_seed(length * 131 + heads * 17 + dim)
    shapes = [(length, h, dim) for h in (heads, kv_heads, kv_heads, heads)]
    q, k, v, weight = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    return [q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), weight]


def written_out(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], causal: bool) -> Tensor:
    """Head by head and segment by segment in double precision."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    for start, stop in pairwise([0, *accumulate(lengths)]):
        for head in range(q.shape[1]):
            shared = head // (q.shape[1] // k.shape[1])
            scores = q[start:stop, head].double() @ k[start:stop, shared].double().T / math.sqrt(q.shape[2])
            if causal:
                future = torch.ones_like(scores, dtype=torch.bool).triu(1)
                scores = scores.masked_fill(future, -math.inf)
            out[start:stop, head] = scores.softmax(-1) @ v[start:stop, shared].double()
    return out


def relative(got: Tensor, expected: Tensor) -> float:
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).norm() / expected.norm().clamp(min=1e-12))


def compare(backend: str, inputs: list[Tensor], lengths: tuple[int, ...], causal: bool) -> list[float]:
    """Relative errors of output, dq, dk, dv against `written_out` on the same (rounded) inputs."""
    *qkv, weight = inputs
    expected = written_out(*(x.detach().cpu() for x in qkv), lengths, causal)
    exact = [x.detach().cpu().double().requires_grad_() for x in qkv]
    grads = torch.autograd.grad(written_out(*exact, lengths, causal), exact, weight.cpu().double())
    out = varlen(*qkv, bounds(lengths), causal, backend=backend)
    assert out.shape == qkv[0].shape and out.dtype == qkv[0].dtype
    got = (out, *torch.autograd.grad(out, qkv, weight))
    return [relative(a.cpu(), b) for a, b in zip(got, (expected, *grads), strict=True)]


# Norms average the roundings of single numbers, of which each is at most eps / 2. Forward rounds the probabilities and
# the output to bf16 (2), backward also reads that output, rounds the scores' gradient and the result (4).
def tolerances(dtype: torch.dtype) -> list[float]:
    return [1e-6] + [2e-6] * 3 if dtype == torch.float32 else [torch.finfo(dtype).eps * n / 2 for n in (2, 4, 4, 4)]


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("heads, kv_heads, dim", [(4, 4, 32), (4, 1, 64), (3, 3, 72), (4, 2, 128), (2, 2, 20)])
def test_every_backend_equals_the_softmax_written_out(
    backend: str, dtype: torch.dtype, causal: bool, heads: int, kv_heads: int, dim: int
) -> None:
    draw = random.Random(1000 * causal + heads * dim)
    lengths = (17, *(draw.choice((0, 1, 2, 11, draw.randint(3, 60))) for _ in range(draw.randint(1, 12))))
    errors = compare(backend, pack(sum(lengths), heads, kv_heads, dim, dtype), lengths, causal)
    assert all(error <= most for error, most in zip(errors, tolerances(dtype), strict=True)), errors


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("kind", LENGTHS)
def test_segments_of_any_make(backend: str, kind: str) -> None:
    lengths = LENGTHS[kind]
    errors = compare(backend, pack(sum(lengths), 4, 2, 32, torch.float32), lengths, causal=True)
    if set(lengths) == {1}:  # one token alone attends to itself: queries and keys have no gradient
        errors[1:3] = [0.0, 0.0]
    assert all(error <= most for error, most in zip(errors, tolerances(torch.float32), strict=True)), errors


@pytest.mark.parametrize("seed", range(6))
def test_gathered_and_neighbouring_segments_are_the_same_attention(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(seed)
    lengths = tuple(draw.choice((0, 1, 3, 8, 8, 21)) for _ in range(draw.randint(2, 30))) + (8, 1, 8)
    *qkv, weight = pack(sum(lengths), 4, 2, 32, torch.float32)
    causal, results = seed % 2 == 0, []
    for call_bytes in (0, 10**12):
        monkeypatch.setitem(backends._CALL_BYTES, "cpu", call_bytes)
        order, _ = segments_of(bounds(lengths)).runs(1, call_bytes, torch.device("cpu"))
        assert (order is None) == (call_bytes == 0)
        out = varlen(*qkv, bounds(lengths), causal, backend="sdpa")
        results.append((out, *torch.autograd.grad(out, qkv, weight)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("causal", [False, True])
def test_a_document_changed_leaves_the_others_as_they_were(backend: str, causal: bool) -> None:
    lengths = (9, 14, 1, 9)
    *qkv, weight = pack(sum(lengths), 4, 2, 32, torch.float32)
    starts = [0, *accumulate(lengths)]
    for changed in range(len(lengths)):
        inside = torch.zeros(sum(lengths), dtype=torch.bool)
        inside[starts[changed] : starts[changed + 1]] = True
        other = [torch.where(inside[:, None, None], 3 * x.detach() - 1, x.detach()).requires_grad_() for x in qkv]
        before, after = (varlen(*x, bounds(lengths), causal, backend=backend) for x in (qkv, other))
        assert torch.equal(before[~inside], after[~inside])
        assert not torch.allclose(before[inside], after[inside])
        outside = weight * ~inside[:, None, None]
        grads = [torch.autograd.grad(out, x, outside) for out, x in ((before, qkv), (after, other))]
        for one, two in zip(*grads, strict=True):
            assert torch.equal(one[~inside], two[~inside]) and not one[inside].any() and not two[inside].any()
            assert one[~inside].any()


def test_key_heads_reach_the_kernel_as_they_are() -> None:
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if "scaled_dot_product" in str(op):
                seen.append((op, [x.shape[1] for x in args[:3]]))
            return op(*args, **(kwargs or {}))

    q, k, v, _ = pack(24, 8, 2, 32, torch.float32)
    with Watch(), torch.no_grad():
        varlen(q, k, v, bounds((10, 14)), True, backend="sdpa")
        mask = torch.ones(1, 1, 24, 24, dtype=torch.bool).tril()
        for part, rows in ((q, mask), (q[-1:], mask[:, :, -1:])):
            decoder_attention(torch.nn.Module(), *(x.transpose(0, 1)[None] for x in (part, k, v)), rows)
    assert len(seen) == 4 and all(heads[1:] == [2, 2] for _, heads in seen)


def test_boundaries_are_read_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    once = segments.Segments.of_lengths
    monkeypatch.setattr(segments.Segments, "of_lengths", lambda lengths: reads.append(lengths) or once(lengths))
    model = KeyeForConditionalGeneration(KeyeConfig.preset("tiny")).eval()
    ids = torch.randint(0, 2000, (1, 20))
    with torch.inference_mode():
        model(input_ids=ids, cu_seqlens=bounds((12, 8)))
        assert reads == [(12, 8)]
        model.visual(torch.randn(24, 3, 14, 14), torch.tensor([[1, 4, 4], [2, 2, 2]]))
    assert reads[1:] == [(16, 4, 4)]


def test_boundaries_changed_in_place_are_read_again() -> None:
    cu_seqlens = bounds((4, 6))
    assert segments_of(cu_seqlens) is segments_of(cu_seqlens)
    cu_seqlens[1] = 7
    assert segments_of(cu_seqlens).lengths == (7, 3)
    assert segments_of(bounds((2, 0, 1), dtype=torch.int32)).bounds_on(torch.device("cpu")).tolist() == [0, 2, 3]


def test_what_does_not_fit_is_refused() -> None:
    q, k, v, _ = pack(10, 4, 2, 32, torch.float32)
    with pytest.raises(KeyeError, match="bounds 9 tokens, but the packed row has 10"):
        varlen(q, k, v, bounds((4, 5)), True)
    for wrong in ([1, 10], [0, 6, 4, 10], []):
        with pytest.raises(KeyeError, match="cu_seqlens must rise from 0"):
            varlen(q, k, v, torch.tensor(wrong), True)
    with pytest.raises(KeyeError, match="3 query heads cannot share 2 key heads"):
        varlen(q[:, :3], k, v, bounds((10,)), True)
    assert varlen(q[:0], k[:0], v[:0], bounds((0, 0)), True).shape == (0, 4, 32)


def test_autocast_is_that_of_a_matrix_product() -> None:
    q, k, v, _ = pack(12, 4, 2, 32, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = varlen(q, k, v.bfloat16(), bounds((5, 7)), True)
    half = varlen(*(x.bfloat16() for x in (q, k, v)), bounds((5, 7)), True)
    assert out.dtype == torch.bfloat16 and torch.equal(out, half)


@pytest.mark.parametrize("backend", HERE)
def test_one_graph_serves_any_boundaries(backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: varlen(*x, False, backend=backend), fullgraph=True, backend="aot_eager")
    for lengths in ((5, 9, 5), (3, 4, 12), (19,)):
        *qkv, weight = pack(19, 4, 2, 32, torch.float32)
        results = []
        for call in (compiled, lambda *x: varlen(*x, False, backend="plain")):
            out = call(*qkv, bounds(lengths))
            results.append((out, *torch.autograd.grad(out, qkv, weight)))
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, atol=2e-6, rtol=2e-5)


# What transformers' decoders get


def decoder(**options: object) -> Qwen3Model:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen3Config(**sizes, vocab_size=50, head_dim=16, intermediate_size=32, **options)
    config._attn_implementation = "keye"
    return Qwen3Model(config).eval()


@pytest.mark.parametrize("options", [{}, {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}])
def test_padded_rows_and_the_cache_are_transformers_sdpa(options: dict[str, object]) -> None:
    model = decoder(**options)
    ids, mask = torch.randint(0, 50, (3, 12)), torch.ones(3, 12, dtype=torch.long)
    mask[1, :5] = mask[2, :1] = 0
    results = []
    for name in ("keye", "sdpa", "eager"):
        model.set_attn_implementation(name)
        whole = model(input_ids=ids, attention_mask=mask)
        first = model(input_ids=ids[:, :11], attention_mask=mask[:, :11], use_cache=True)
        last = model(input_ids=ids[:, 11:], attention_mask=mask, past_key_values=first.past_key_values)
        results.append((whole.last_hidden_state[mask.bool()], last.last_hidden_state))
    for other in results[1:]:
        for ours, theirs in zip(results[0], other, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("seam", [None, varlen], ids=["own", "seam"])
def test_packed_rows_honour_the_decoders_own_scaling(seam: object) -> None:
    model = decoder()
    for layer in model.layers:
        layer.self_attn.scaling = 0.7
    ids, lengths = torch.randint(0, 50, (1, 17)), (6, 11)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = model(
        input_ids=ids,
        position_ids=positions,
        attention_mask=torch.empty(0, 0, 0, 0),
        cu_seqlens=bounds(lengths),
        varlen_fn=seam,
        use_cache=False,
    ).last_hidden_state
    apart = torch.cat([model(input_ids=part).last_hidden_state for part in ids.split(lengths, 1)], dim=1)
    torch.testing.assert_close(packed, apart, atol=1e-5, rtol=1e-4)


def test_packed_rows_refuse_what_they_do_not_compute() -> None:
    q, k, v, _ = pack(10, 4, 2, 32, torch.float32)
    rows = [x.transpose(0, 1)[None] for x in (q, k, v)]

    def call(query: Tensor = rows[0], **options: object) -> Tensor:
        options = {"cu_seqlens": bounds((4, 6)), "scaling": 32**-0.5, "dropout": 0.0, **options}
        return decoder_attention(torch.nn.Module(), query, *rows[1:], None, **options)[0]

    assert torch.equal(call(), call(sliding_window=6))
    for options, words in (
        ({"sliding_window": 5}, "sliding_window = 5 is shorter than the longest packed document"),
        ({"dropout": 0.1}, "attention_dropout = 0.1: packed attention has no dropout"),
        ({"softcap": 50.0}, "uses 'softcap'"),
        ({"query": rows[0][:, :, :3]}, "takes one row and no cache, got 1 rows of 3 queries on 10 keys"),
        ({"query": rows[0].expand(2, -1, -1, -1)}, "got 2 rows"),
        ({"attention": "flash9"}, "attention = 'flash9' is not a backend"),
    ):
        with pytest.raises(KeyeError, match=words):
            call(**options)


def test_dropout_in_training_is_honoured_padded_and_refused_packed() -> None:
    model = KeyeForConditionalGeneration(KeyeConfig.preset("tiny", attention_dropout=0.5)).train()
    ids = torch.randint(0, 2000, (1, 12))
    with pytest.raises(KeyeError, match="attention_dropout = 0.5"):
        model(input_ids=ids, cu_seqlens=bounds((5, 7)))
    one, two = (model(input_ids=ids).logits for _ in range(2))
    assert not torch.allclose(one, two)


def test_another_attention_of_transformers_cannot_be_packed() -> None:
    model = KeyeForConditionalGeneration(KeyeConfig.preset("tiny")).eval()
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="packed rows need the attention 'keye'"):
        model(input_ids=torch.randint(0, 2000, (1, 12)), cu_seqlens=bounds((5, 7)))


def test_the_config_names_the_backend_of_tower_and_decoder() -> None:
    ids, grid = torch.randint(0, 2000, (1, 12)), torch.tensor([[1, 4, 4], [1, 2, 2]])
    with pytest.raises(KeyeError, match="attention = 'fast' is not a backend of Keye.*sdpa, plain"):
        KeyeForConditionalGeneration(KeyeConfig(**{**KeyeConfig.preset("tiny").to_dict(), "attention": "fast"}))
    config = KeyeConfig.preset("tiny")
    config.attention = "torch"
    model = KeyeForConditionalGeneration(config)
    with pytest.raises(KeyeError, match=r"attention = 'torch' cannot run on cpu \(needs CUDA\).*sdpa, plain"):
        model.visual(torch.randn(20, 3, 14, 14), grid)
    with pytest.raises(KeyeError, match="attention = 'torch' cannot run on cpu"):
        model(input_ids=ids, cu_seqlens=bounds((5, 7)))
