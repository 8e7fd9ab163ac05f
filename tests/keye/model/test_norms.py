"""RMS norms of the decoder: which are replaced, with which values, and what they keep."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel, Gemma2Config
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNorm

from keye.model.decoder import RMSNorm, build_decoder, fuse_norms, is_rms_norm
from scripts.bench.common.streams import family_config


def test_only_norms_with_the_same_formula_are_replaced() -> None:
    # Gemma and Qwen3-Next add 1 to the weight; a LayerNorm subtracts the mean.
    assert [is_rms_norm(kind) for kind in (Qwen3RMSNorm, LlamaRMSNorm)] == [True, True]
    assert [is_rms_norm(kind) for kind in (Gemma2RMSNorm, Qwen3NextRMSNorm, torch.nn.LayerNorm, RMSNorm)] == [False] * 4
    config = Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, head_dim=16,
        num_key_value_heads=1,
    )  # fmt: skip
    gemma = AutoModel.from_config(config)
    fuse_norms(gemma)
    assert isinstance(gemma.norm, Gemma2RMSNorm)


def test_a_class_is_recognised_where_new_modules_are_partitioned(monkeypatch) -> None:
    for kind in (Qwen3RMSNorm, RMSNorm):  # as inside deepspeed.zero.Init

        def partitioned(module, *args, run=kind.__init__) -> None:
            run(module, *args)
            module.weight.data = torch.empty(0)

        monkeypatch.setattr(kind, "__init__", partitioned)
    is_rms_norm.cache_clear()
    assert Qwen3RMSNorm(8).weight.shape == (0,) and is_rms_norm(Qwen3RMSNorm)


@pytest.mark.parametrize("name", ["qwen3", "qwen2", "llama3"])
def test_every_norm_of_a_decoder_is_replaced_and_keeps_its_name_and_weight(name: str) -> None:
    config = family_config(name).text_config
    torch.manual_seed(0)
    plain = AutoModel.from_config(config)
    torch.manual_seed(0)
    ours = build_decoder(config)
    names = [name for name, _ in plain.named_parameters()]
    assert [name for name, _ in ours.named_parameters()] == names
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), ours.parameters(), strict=True))
    replaced = [name for name, module in ours.named_modules() if isinstance(module, RMSNorm)]
    assert replaced == [name for name, module in plain.named_modules() if type(module).__name__.endswith("RMSNorm")]
    assert replaced and copy.deepcopy(ours).state_dict().keys() == ours.state_dict().keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_cpu_the_norm_has_the_bits_of_transformers(dtype: torch.dtype) -> None:
    theirs = Qwen3RMSNorm(48, 1e-6).to(dtype)
    torch.nn.init.normal_(theirs.weight)
    x = torch.randn(5, 7, 48, dtype=dtype)
    given = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [norm(y) for norm, y in zip((theirs, RMSNorm(theirs.weight, 1e-6)), given, strict=True)]
    assert torch.equal(*outputs)
    grads = [torch.autograd.grad(out.float().sum(), (y, theirs.weight)) for out, y in zip(outputs, given, strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def gpu_or_meta() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "meta")


def test_elsewhere_the_norm_is_torchs_and_a_weight_of_another_dtype_is_not_rounded(monkeypatch) -> None:
    calls, run = [], F.rms_norm
    monkeypatch.setattr(F, "rms_norm", lambda *args: calls.append(args) or run(*args))
    device = gpu_or_meta()
    x = torch.randn(3, 16, device=device, dtype=torch.bfloat16)
    narrow = RMSNorm(torch.nn.Parameter(torch.ones(16, device=device, dtype=torch.bfloat16)), 1e-6)
    assert narrow(x).dtype == torch.bfloat16 and len(calls) == 1
    wide = RMSNorm(torch.nn.Parameter(torch.ones(16, device=device)), 1e-6)
    assert wide(x).dtype == torch.float32 and len(calls) == 1  # as in transformers


@pytest.mark.cuda
@pytest.mark.parametrize("size", [128, 4096])
def test_on_a_gpu_the_norm_is_as_close_to_float64_as_transformers_and_keeps_its_input_alone(size: int) -> None:
    torch.manual_seed(0)
    theirs = Qwen3RMSNorm(size, 1e-6).cuda().bfloat16()
    torch.nn.init.normal_(theirs.weight)
    x = torch.randn(64, size, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn_like(x)
    exact = Qwen3RMSNorm(size, 1e-6).cuda().double()
    exact.weight.data.copy_(theirs.weight)
    exact.forward = lambda y: exact.weight * y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
    found, kept = {}, {}
    for name, norm, y in (
        ("exact", exact, x.double()), ("theirs", theirs, x.clone()), ("ours", RMSNorm(theirs.weight, 1e-6), x.clone()),
    ):  # fmt: skip
        y.requires_grad_()
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.nbytes) or t, lambda t: t):
            out = norm(y)
        found[name] = [out, *torch.autograd.grad(out, (y, norm.weight), weight.to(out.dtype))]
        kept[name] = sum(sizes)
    for ours, other, true in zip(found["ours"], found["theirs"], found["exact"], strict=True):
        errors = [float((t.double() - true).norm() / true.norm()) for t in (ours, other)]
        assert errors[0] <= 1.2 * errors[1]
    assert kept["ours"] < kept["theirs"] / 2
