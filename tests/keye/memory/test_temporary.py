"""The temporary LoRA: no change while empty, only its factors written, exact removal, exact continuation."""

import copy

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from keye.errors import ArgumentError, CheckpointError, KeyeError
from keye.memory import attach


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 5)).to(dtype)


def data(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(9, 6).to(dtype), torch.randn(9, 5).to(dtype)


def loss_of(model: nn.Module, dtype: torch.dtype = torch.float32):
    inputs, targets = data(dtype)
    return lambda: (model(inputs).float() - targets.float()).square().mean()


def bits(value: torch.Tensor) -> bytes:
    return value.detach().contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_empty_memory_changes_no_bit(dtype):
    model, inputs = network(dtype), torch.cat([data(dtype)[0], torch.zeros(1, 6, dtype=dtype)])
    with torch.no_grad():
        model[2].weight[0], model[2].bias[0] = -0.0, -0.0  # −0.0 + 0.0 is another bit pattern
    before = bits(model(inputs))
    memory = attach(model, rank=4)
    assert bits(model(inputs)) == before
    memory.write(loss_of(model, dtype))
    assert bits(model(inputs)) != before
    with memory.disabled():
        assert bits(model(inputs)) == before
    memory.reset()
    assert bits(model(inputs)) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_writing_leaves_the_weights_and_detaching_the_model_as_they_were(dtype):
    model = network(dtype)
    model[0].weight.requires_grad_(False)
    weights = {name: bits(value) for name, value in model.state_dict().items()}
    before = bits(model(data(dtype)[0]))
    memory = attach(model, rank=3, learning_rate=1e-2)
    losses = memory.write(loss_of(model, dtype), steps=30)
    assert losses[-1] < 0.8 * losses[0] and memory.writes == 30
    assert {name: bits(value) for name, value in model.state_dict().items()} == weights
    assert all(parameter.grad is None for parameter in model.parameters())
    memory.detach()
    memory.detach()
    assert bits(model(data(dtype)[0])) == before and not model[0]._forward_hooks
    with pytest.raises(ArgumentError, match="attach it first"):
        memory.write(loss_of(model, dtype))


def test_a_step_equals_adam_on_a_weight_with_the_product_written_out():
    """The same factors in a plain function of W + scale · B A, with the gradient of autograd on W itself."""
    model = network()
    memory = attach(model, rank=2, alpha=6.0, match="^0$", learning_rate=0.05)
    down, up = (factor.detach().clone() for factor in memory.factors["0"])
    inputs, targets = data()
    moments = [[torch.zeros_like(value), torch.zeros_like(value)] for value in (down, up)]
    for step in range(1, 4):
        memory.write(loss_of(model))
        weight = (model[0].weight + 3.0 * up @ down).detach().requires_grad_()
        output = model[2](torch.nn.functional.gelu(inputs @ weight.T + model[0].bias))
        (gradient,) = torch.autograd.grad((output - targets).square().mean(), weight)
        values = []
        for value, grad, pair in zip(
            (down, up), (3.0 * up.T @ gradient, 3.0 * gradient @ down.T), moments, strict=True
        ):
            pair[0] = 0.9 * pair[0] + 0.1 * grad
            pair[1] = 0.999 * pair[1] + 0.001 * grad**2
            mean, square = pair[0] / (1 - 0.9**step), pair[1] / (1 - 0.999**step)
            values.append(value - 0.05 * mean / (square.sqrt() + 1e-8))
        down, up = values
    torch.testing.assert_close(memory.factors["0"][0].detach(), down, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(memory.factors["0"][1].detach(), up, atol=1e-5, rtol=1e-4)


def test_merged_gives_the_outputs_of_the_hooks_and_restores_every_bit():
    model = network()
    memory = attach(model, rank=4, learning_rate=1e-2)
    memory.write(loss_of(model), steps=5)
    weights, apart = [bits(value) for value in model.parameters()], model(data()[0]).detach()
    with pytest.raises(RuntimeError, match="stop"), memory.merged():
        torch.testing.assert_close(model(data()[0]).detach(), apart, atol=1e-5, rtol=1e-5)
        assert [bits(value) for value in model.parameters()] != weights
        raise RuntimeError("stop")
    assert [bits(value) for value in model.parameters()] == weights
    assert torch.equal(model(data()[0]), apart)


def test_a_tied_weight_is_written_through_the_hooks_and_never_merged():
    tied = nn.ModuleDict({"embedding": nn.Embedding(5, 6), "head": nn.Linear(6, 5, bias=False)})
    tied["head"].weight = tied["embedding"].weight
    memory = attach(tied, rank=2, learning_rate=1e-1)
    ids = torch.arange(5)
    memory.write(lambda: nn.functional.cross_entropy(tied["head"](tied["embedding"](ids)), ids.flip(0)), steps=3)
    before, written = bits(tied["embedding"].weight), tied["head"](tied["embedding"](ids))
    with pytest.raises(ArgumentError, match="head is tied"), memory.merged():
        pass
    assert bits(tied["embedding"].weight) == before and torch.equal(tied["head"](tied["embedding"](ids)), written)


def test_small_changes_of_a_bf16_layer_reach_its_output_through_the_hooks_and_are_lost_when_merged():
    layer = nn.Linear(4, 4, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    memory = attach(layer, rank=1, learning_rate=1e-4)
    memory.write(lambda: layer(torch.eye(4, dtype=torch.bfloat16)).float().mean())
    with torch.no_grad():
        memory.factors[""][0].copy_(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
        memory.factors[""][1].fill_(1e-3)
    inputs = torch.tensor([[1.0, -1.0, 0.0, 0.0]], dtype=torch.bfloat16)
    torch.testing.assert_close(layer(inputs).float(), torch.full((1, 4), 1e-3), atol=1e-5, rtol=0)
    with memory.merged():
        assert layer(inputs).abs().max() == 0  # 1.001 is 1 in bf16


def test_a_saved_memory_continues_with_the_same_bits(tmp_path):
    model = network()
    memory = attach(model, rank=4, learning_rate=1e-2)
    memory.write(loss_of(model), steps=3)
    memory.save(tmp_path / "memory.safetensors")
    memory.write(loss_of(model), steps=4)
    uninterrupted = bits(model(data()[0]))
    memory.detach()
    other = copy.deepcopy(model)
    again = attach(other, rank=4, learning_rate=1e-2, seed=7)
    again.load(tmp_path / "memory.safetensors")
    assert again.writes == 3
    again.write(loss_of(other), steps=4)
    assert bits(other(data()[0])) == uninterrupted


def test_a_wrong_file_is_refused(tmp_path):
    model = network()
    memory = attach(model, rank=4)
    memory.save(tmp_path / "memory.safetensors")
    memory.detach()
    with pytest.raises(CheckpointError, match="rank"):
        attach(network(), rank=2).load(tmp_path / "memory.safetensors")
    with pytest.raises(CheckpointError, match="scale"):
        attach(network(), rank=4, alpha=8).load(tmp_path / "memory.safetensors")
    (tmp_path / "text").write_text("nothing")
    for name in ("text", "missing"):
        with pytest.raises(CheckpointError, match="is not a memory"):
            attach(network(), rank=4).load(tmp_path / name)


def test_writing_works_where_gradients_are_off_and_needs_a_loss_of_the_layers():
    model = network()
    memory = attach(model, rank=4, match="^2$")
    loss = loss_of(model)
    with torch.inference_mode():
        memory.write(loss)
    with torch.no_grad():
        memory.write(loss_of(model))
        with pytest.raises(ArgumentError, match="does not depend"):
            memory.write(lambda: torch.zeros(()))
    assert memory.writes == 2 and list(memory.factors) == ["2"]
    with pytest.raises(ArgumentError, match="finds no linear layer"):
        attach(model, match="attention")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 0}, "whole number of 1 or more"),
        ({"rank": 4.5}, "whole number of 1 or more"),
        ({"learning_rate": 0.0}, "must be positive"),
        ({"max_norm": -1.0}, "must be positive"),
        ({"betas": (1.0, 0.9)}, "two numbers from 0"),
        ({"match": "["}, "not a regular expression"),
        ({"match": "q_proj"}, "such as 0, 2"),
    ],
)
def test_a_refused_memory_leaves_the_model_usable(options, said):
    model = network()
    before = bits(model(data()[0]))
    with pytest.raises(ArgumentError, match=said):
        attach(model, **options)
    assert bits(model(data()[0])) == before and not any(layer._forward_hooks for layer in model)


@pytest.mark.parametrize("loss", [lambda: 1.0, lambda: torch.ones(2), lambda: torch.tensor(float("nan"))])
def test_a_loss_that_is_no_finite_number_writes_nothing(loss):
    model = network()
    memory = attach(model, rank=4)
    memory.write(loss_of(model))
    before = bits(model(data()[0]))
    with pytest.raises(ArgumentError, match="the loss is"):
        memory.write(loss)
    assert memory.writes == 1 and bits(model(data()[0])) == before


def test_a_file_of_more_layers_is_not_read_in_part(tmp_path):
    memory = attach(network(), rank=4)
    memory.save(tmp_path / "memory.safetensors")
    with pytest.raises(CheckpointError, match="1 layers are not in this memory, such as 2"):
        attach(network(), rank=4, match="^0$").load(tmp_path / "memory.safetensors")
    with pytest.raises(KeyeError, match="cannot be written"):
        memory.save(tmp_path / "missing" / "memory.safetensors")


def test_the_layers_of_gpt2_are_written_and_merged():
    config = GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    model, ids = GPT2LMHeadModel(config).eval(), torch.arange(12).view(2, 6)
    before = bits(model(ids).logits)
    memory = attach(model, rank=2, match=r"transformer\.h", learning_rate=1e-2)
    assert [tuple(memory.change(name).shape) for name in memory.layers] == [(24, 8), (8, 8), (32, 8), (8, 32)]
    losses = memory.write(lambda: model(ids, labels=ids).loss, steps=10)
    assert losses[-1] < losses[0]
    written = model(ids).logits
    with memory.merged():
        torch.testing.assert_close(model(ids).logits, written, atol=1e-5, rtol=1e-4)
    memory.detach()
    assert bits(model(ids).logits) == before


def test_two_memories_of_one_model_add_up():
    model = network()
    first, second = attach(model, rank=2, learning_rate=1e-2), attach(model, rank=3, learning_rate=1e-2, seed=1)
    first.write(loss_of(model), steps=3)
    second.write(loss_of(model), steps=3)
    both = model(data()[0]).detach()
    weight = [model[place].weight + first.change(str(place)) + second.change(str(place)) for place in (0, 2)]
    inner = torch.nn.functional.gelu(data()[0] @ weight[0].T + model[0].bias)
    torch.testing.assert_close(both, (inner @ weight[1].T + model[2].bias).detach(), atol=1e-5, rtol=1e-4)


def test_bytes_are_those_of_the_factors():
    assert attach(network(), rank=3).nbytes == 4 * 3 * (6 + 16 + 16 + 5)


def test_merged_and_disabled_exclude_each_other():
    memory = attach(network(), rank=4)
    with memory.merged(), pytest.raises(ArgumentError, match="merged memory cannot be disabled"):
        memory.disabled().__enter__()
    with memory.disabled(), pytest.raises(ArgumentError, match="disabled or merged cannot be merged"):
        memory.merged().__enter__()
