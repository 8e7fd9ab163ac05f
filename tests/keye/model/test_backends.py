"""The choice of a kernel, with simulated packages and kernels; the real ones are compared where there is a GPU."""

import math
import random
import sys
from collections.abc import Callable, Iterator
from itertools import accumulate
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.varlen import varlen_attn
from torch.utils._python_dispatch import TorchDispatchMode

from keye.errors import KeyeError
from keye.model import attention, backends
from keye.model.attention import varlen
from keye.model.segments import Segments

GPU = torch.device("cuda", 0)
FLASH = ("flash4", "flash3", "flash2")


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """Choices are cached for a process; here each test makes its own."""
    kept = (backends.choose, backends._report_once)
    for cache in kept:
        cache.cache_clear()
    yield
    for cache in kept:
        cache.cache_clear()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A machine with these packages, a GPU of this capability, and kernels that fail their trial as given."""

    def build(packages: tuple[str, ...], capability: tuple[int, int], failing: dict[str, str] | None = None) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(backends, "_trial", lambda name, *args: (failing or {}).get(name, ""))
        monkeypatch.setattr(backends, "_functions", {name: block_softmax for name in packages})

    return build


def block_softmax(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, causal: bool, scale: float) -> Tensor:
    """A kernel in place of the packages': differentiable, segment by segment."""
    assert bounds.dtype == torch.int32
    outputs, groups = [], q.shape[1] // k.shape[1]
    for start, stop in zip(bounds.tolist(), bounds.tolist()[1:], strict=False):
        q_, k_, v_ = (x[start:stop].transpose(0, 1).float() for x in (q, k, v))
        scores = q_ @ k_.repeat_interleave(groups, 0).mT * scale
        if causal:
            scores = scores + torch.full_like(scores, -math.inf).triu(1)
        outputs.append((scores.softmax(-1) @ v_.repeat_interleave(groups, 0)).transpose(0, 1))
    return torch.cat(outputs).to(q.dtype)


def flash_keywords(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False):
    lengths = cu_seqlens_q.diff()
    assert max_seqlen_q == max_seqlen_k >= int(lengths.max()) and torch.equal(cu_seqlens_q, cu_seqlens_k)
    return block_softmax(q, k, v, cu_seqlens_q, causal, softmax_scale)


def flash_without_longest(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, softmax_scale=None, causal=False):
    return block_softmax(q, k, v, cu_seqlens_q, causal, softmax_scale), torch.zeros(1)


def torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    return block_softmax(query, key, value, cu_seq_q, is_causal, query.shape[-1] ** -0.5)


def torch_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    assert window_size in ((-1, -1), (-1, 0))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return block_softmax(query, key, value, cu_seq_q, window_size == (-1, 0), scale)


def torch_2_13(
    q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False, num_splits=None
):
    assert enable_gqa == (q.shape[1] != k.shape[1])
    return torch_2_11(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)


@pytest.mark.parametrize(
    "packages, capability, chosen",
    [
        ((), (9, 0), "sdpa"),
        (("torch",), (9, 0), "torch"),
        (("torch",), (7, 5), "sdpa"),
        (("torch", "flash2"), (8, 0), "flash2"),
        (("torch", "flash3"), (8, 0), "torch"),
        ((*FLASH, "torch"), (9, 0), "flash3"),
        ((*FLASH, "torch"), (10, 0), "flash4"),
    ],
)
def test_the_best_that_the_gpu_can_run_is_chosen(
    machine: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    packages: tuple[str, ...],
    capability: tuple[int, int],
    chosen: str,
) -> None:
    machine(packages, capability)
    monkeypatch.setattr(backends, "import_module", absent)
    assert backends.choose("auto", GPU, torch.bfloat16, 128, 4) == chosen
    last = ["sdpa", "cudnn", "plain"] if capability >= (8, 0) else ["sdpa", "plain"]
    assert backends.available(GPU)[-len(last) :] == last and backends.available(GPU)[0] == chosen


def absent(module: str) -> ModuleType:
    raise ModuleNotFoundError(f"No module named {module!r}", name=module)


def test_the_choice_is_reported_once_with_its_reasons(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(backends, "_functions", {"torch": torch_2_13})
    monkeypatch.setattr(backends, "import_module", absent)
    for _ in range(2):
        for head_dim in (72, 128):
            assert backends.choose("auto", "cpu", torch.float32, head_dim) == "sdpa"
    said = capsys.readouterr()
    assert said.err == "attention: sdpa on cpu (flash-attn: not installed; torch varlen: needs CUDA)\n"
    assert said.out == ""
    machine(("flash2", "torch"), (9, 0), {"flash2": "wrong on a small pack: dq off by 30.0%"})
    assert backends.choose("auto", GPU, torch.bfloat16, 72) == "torch"
    assert capsys.readouterr().err == (
        "attention: torch on cuda (flash-attn 3: not installed; flash-attn 4: not installed; "
        "flash-attn 2: wrong on a small pack: dq off by 30.0%)\n"
    )


@pytest.mark.parametrize("name", ["auto", "torch", "flash2"])
def test_what_a_kernel_does_not_compute_goes_to_sdpa(
    machine: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    machine(("flash2", "torch"), (8, 9))
    monkeypatch.setattr(backends, "import_module", absent)
    assert backends.choose(name, GPU, torch.float32, 128) == "sdpa"
    assert "supports bfloat16 and float16, not float32" in capsys.readouterr().err
    assert backends.choose(name, GPU, torch.bfloat16, 20) == "sdpa"
    assert "does not support heads of 20" in capsys.readouterr().err
    assert backends.choose(name, GPU, torch.bfloat16, 72) == ("flash2" if name == "auto" else name)


def test_a_name_that_cannot_run_lists_those_that_can(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(("flash3", "torch"), (8, 0))
    monkeypatch.setattr(backends, "import_module", absent)
    with pytest.raises(KeyeError, match="'flash2' cannot run on cuda .not installed.: .* torch, sdpa, cudnn, plain"):
        backends.choose("flash2", GPU, torch.bfloat16, 128)
    with pytest.raises(KeyeError, match="not built for compute capability 8.0"):
        backends.choose("flash3", GPU, torch.bfloat16, 128)
    with pytest.raises(KeyeError, match="attention = 'fast' is not a backend of Keye.*torch, sdpa, cudnn, plain"):
        backends.choose("fast", GPU, torch.bfloat16, 128)
    assert backends.choose("plain", GPU, torch.float32, 20) == "plain"


def test_a_package_that_is_broken_is_named_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(module: str) -> ModuleType:
        raise ImportError("libc10.so: undefined symbol: _ZN3c10\nand more")

    monkeypatch.setattr(backends, "_functions", {})
    monkeypatch.setattr(backends, "import_module", broken)
    reason = backends.obstacle("flash2", GPU)
    assert reason == "installed, but does not import: ImportError: libc10.so: undefined symbol: _ZN3c10"
    monkeypatch.setattr(backends, "import_module", lambda module: absent("cutlass"))
    assert backends.obstacle("flash4", GPU) == "needs the package cutlass"
    monkeypatch.setattr(backends, "import_module", lambda module: ModuleType(module))
    assert "has no attribute 'varlen_attn'" in backends.obstacle("torch", GPU)


def test_detection_imports_the_modules_as_they_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("flash_attn_interface")
    module.flash_attn_varlen_func = flash_keywords
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    monkeypatch.setattr(backends, "_functions", {})
    assert backends.obstacle("flash3", torch.device("cpu")) == "needs CUDA"
    assert backends._functions == {"flash3": flash_keywords}


@pytest.mark.parametrize(
    "name, kernel",
    [
        ("flash2", flash_keywords),
        ("flash4", flash_without_longest),
        ("torch", torch_2_10),
        ("torch", torch_2_11),
        ("torch", torch_2_13),
    ],
)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [72**-0.5, 0.3])
def test_every_release_of_a_kernel_is_called_rightly(
    monkeypatch: pytest.MonkeyPatch, name: str, kernel: Callable[..., Tensor], causal: bool, scale: float
) -> None:
    monkeypatch.setattr(backends, "_functions", {name: kernel})
    monkeypatch.setattr(attention, "choose", lambda backend, *kind: backend)
    torch.manual_seed(0)
    q, k, v = (torch.randn(21, heads, 72, requires_grad=True) for heads in (4, 2, 2))
    cu_seqlens = torch.tensor([0, 5, 5, 20, 21])
    results = []
    for backend in (name, "plain"):
        out = varlen(q, k, v, cu_seqlens, causal, scale=scale, backend=backend)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-3)


class Calls(TorchDispatchMode):
    """Argument name → value of each call of torch's varlen operator."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[dict[str, object]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> object:
        if func is torch.ops.torch_attn._varlen_attn.default:
            names = [argument.name for argument in func._schema.arguments]
            self.found.append(dict(zip(names, args, strict=False)) | (kwargs or {}))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("causal", [False, True])
def test_the_installed_torch_takes_the_call(monkeypatch: pytest.MonkeyPatch, causal: bool) -> None:
    # Its kernel needs a GPU; fake tensors pass through its checks and its operators, forward and backward.
    monkeypatch.setattr(backends, "_functions", {"torch": varlen_attn})
    with FakeTensorMode(), Calls() as calls:
        q, k, v = (torch.empty(21, heads, 72, dtype=torch.bfloat16, requires_grad=True) for heads in (4, 2, 2))
        out = backends.fused("torch", q, k, v, torch.empty(4, dtype=torch.int32), 15, causal, 0.3)
        gradients = torch.autograd.grad(out, (q, k, v), torch.empty_like(out))
    assert out.shape == q.shape and [x.shape for x in gradients] == [q.shape, k.shape, v.shape]
    (call,) = calls.found
    assert (call["is_causal"], call["scale"], call["max_q"], call["max_k"]) == (causal, 0.3, 15, 15)


def test_a_compiled_model_calls_a_fused_kernel_with_boundaries_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        assert cu_seq_q.dtype == torch.int32 and max_q == max_k == len(query)
        return query * scale + cu_seq_q.sum()

    torch._dynamo.reset()
    monkeypatch.setattr(backends, "_functions", {"torch": kernel})
    monkeypatch.setattr(attention, "choose", lambda *kind: "torch")
    compiled = torch.compile(lambda *x: varlen(*x, True), fullgraph=True, backend="eager")
    q = torch.randn(9, 2, 16)
    torch.testing.assert_close(compiled(q, q, q, torch.tensor([0, 4, 9])), q / 4 + 13)


def trial(kernel: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(backends, "_functions", {"flash2": kernel})
    return backends._trial("flash2", torch.device("cpu"), torch.bfloat16, 72, 2)


def test_a_kernel_is_trusted_only_after_it_has_computed_a_pack(monkeypatch: pytest.MonkeyPatch) -> None:
    def deaf(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal):
        return block_softmax(q, k, v, cu_seqlens_q, False, softmax_scale)

    def one_document(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal):
        return block_softmax(q, k, v, cu_seqlens_q[[0, -1]], causal, softmax_scale)

    def no_backward(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal):
        return block_softmax(q, k, v, cu_seqlens_q, causal, softmax_scale).detach()

    assert trial(flash_keywords, monkeypatch) == ""
    assert trial(deaf, monkeypatch).startswith("wrong on a small pack: output off by")
    assert trial(one_document, monkeypatch).startswith("wrong on a small pack: output off by")
    assert "fails on a small pack: RuntimeError" in trial(no_backward, monkeypatch)


def test_a_trial_inside_a_forward_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    packed: list[Tensor] = []
    state = torch.get_rng_state()
    with (
        torch.no_grad(),
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x) or x, lambda x: x),
    ):
        assert trial(flash_keywords, monkeypatch) == ""
    with torch.inference_mode():
        assert trial(flash_keywords, monkeypatch) == ""
    assert packed == [] and torch.equal(state, torch.get_rng_state())


# Where there is a GPU: every kernel that runs there, in the shapes of the tower and of the decoders.


@pytest.mark.cuda
@pytest.mark.parametrize("name", [*FLASH, "torch", "cudnn", "sdpa"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("heads, kv_heads, dim", [(16, 16, 72), (32, 8, 128), (12, 4, 64), (4, 2, 32)])
def test_a_gpu_kernel_equals_plain(name: str, causal: bool, heads: int, kv_heads: int, dim: int) -> None:
    if reason := backends.obstacle(name, GPU):
        pytest.skip(f"{name}: {reason}")
    draw = random.Random(dim)
    lengths = [draw.choice((0, 1, 17, 128, 300, 577)) for _ in range(12)] + [64]
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], device=GPU)
    shapes = [(sum(lengths), h, dim) for h in (heads, kv_heads, kv_heads)]
    q, k, v = (torch.randn(s, device=GPU, dtype=torch.bfloat16, requires_grad=True) for s in shapes)
    chosen = backends.choose(name, q.device, q.dtype, dim, heads // kv_heads)
    if name == "cudnn" and chosen == "sdpa":
        pytest.skip(f"cuDNN computes no heads of {dim} here")  # its trial says so; which ones differs between releases
    assert chosen == name
    weight = torch.randn_like(q)
    results = []
    for backend in (name, "plain"):
        out = varlen(q, k, v, cu_seqlens, causal, backend=backend)
        results.append((out, *torch.autograd.grad(out, (q, k, v), weight)))
    # Roundings of forward (2) and backward (4), as in test_attention; plain rounds its results, too (1).
    for got, expected, roundings in zip(*results, (3, 5, 5, 5), strict=True):
        error = (got.detach().float() - expected.detach().float()).norm() / expected.detach().float().norm()
        assert error < roundings * torch.finfo(q.dtype).eps / 2


@pytest.mark.cuda
def test_fp32_on_a_gpu_is_sdpa_without_copied_heads() -> None:
    q, k, v = (torch.randn(900, heads, 72, device=GPU) for heads in (16, 2, 2))
    segments = Segments.of_lengths((400, 200, 300))
    assert backends.choose("auto", GPU, torch.float32, 72, 8) == "sdpa"
    expected = backends.plain(q, k, v, segments, True, 0.1)
    torch.testing.assert_close(backends.sdpa(q, k, v, segments, True, 0.1), expected, atol=2e-5, rtol=1e-4)
