"""The arithmetic of FLOPs against torch's own counter and against values computed by hand."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, Qwen3ForCausalLM

from keye import KeyeConfig, KeyeForConditionalGeneration
from keye.model import flops
from keye.model.config import KeyeVisionConfig


def counted(call, *args: torch.Tensor, **kwargs: torch.Tensor) -> int:
    """Operations of the matrix products that run; attention as products, so that none is missed.

    transformers 5.17 computes the angles of RoPE as a matrix product of positions and frequencies, transformers 5.23 by
    broadcasting. No weight takes part, so the angles are left out, as they are in keye.model.flops.
    """
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        call(*args, **kwargs)
    by_module = counter.get_flop_counts()
    angles = sum(sum(one.values()) for name, one in by_module.items() if name.endswith(".rotary_emb"))
    return counter.get_total_flops() - angles


def test_tower_and_projector_equal_the_counter() -> None:
    torch.manual_seed(0)
    model = KeyeForConditionalGeneration(KeyeConfig.preset("tiny", vocab_size=300))
    frames = [(4, 6), (2, 2), (10, 8)]
    grid = torch.tensor([(1, *frame) for frame in frames])
    expected = flops.tower(model.config.vision_config, frames) + flops.projector(96, 128, 108)
    assert counted(model.encode_vision, torch.randn(108, 3, 14, 14), grid) == expected.total


def test_decoder_and_head_equal_the_counter_but_for_the_pairs_that_causality_hides() -> None:
    text = KeyeConfig.preset("tiny", vocab_size=300).text_config
    model = Qwen3ForCausalLM(text)
    length, queries = 24, text.num_attention_heads * text.head_dim
    expected = flops.decoder(text, [length]) + flops.head(text, length)
    hidden = 4 * queries * (length * (length - 1) // 2) * text.num_hidden_layers
    assert counted(model, torch.randint(0, 300, (1, length))) == expected.total + hidden


def test_one_layer_by_hand() -> None:
    # Two heads of 4, one key head, MLP 10: weights 8·8 (q) + 2·8·4 (k, v) + 8·8 (o) + 3·8·10 (MLP) = 432.
    text = LlamaConfig(
        hidden_size=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=10,
        num_hidden_layers=1,
        vocab_size=7,
    )
    assert flops.decoder(text, [3, 2]) == flops.Flops(linear=2 * 5 * 432, quadratic=4 * 8 * (6 + 3))
    assert flops.head(text, 5) == flops.Flops(linear=2 * 5 * 8 * 7)
    # Weights 4·8·8 + 2·8·6 = 352 on 4 + 6 patches, 16 + 36 pairs; patches of 2×2×3 = 12 values.
    vision = KeyeVisionConfig(hidden_size=8, intermediate_size=6, num_hidden_layers=2, num_attention_heads=2)
    vision.patch_size = 2
    assert flops.tower_layers(vision, [4, 6]) == flops.Flops(2 * 2 * 10 * 352, 2 * 4 * 8 * 52)
    assert flops.tower(vision, [(2, 2), (3, 2)]).linear == 2 * 2 * 10 * 352 + 2 * 10 * 12 * 8
    assert flops.projector(8, 16, 8) == flops.Flops(2 * 2 * (32 * 32 + 32 * 16))


def test_forward_flops_are_the_sum_of_the_parts() -> None:
    config = KeyeConfig.preset("tiny", vocab_size=300)
    parts = [
        flops.tower(config.vision_config, [(2, 4)]),
        flops.projector(96, 128, 8),
        flops.decoder(config.text_config, [5, 9]),
        flops.head(config.text_config, 3),
    ]
    together = flops.forward(config, [(2, 4)], [5, 9], 3)
    assert together == flops.Flops(sum(p.linear for p in parts), sum(p.quadratic for p in parts))
    assert together.total == together.linear + together.quadratic


def test_a_step_of_the_released_8b_takes_six_operations_a_weight_and_token() -> None:
    text = KeyeConfig.preset("keye_8b").text_config
    # Qwen3-8B has 8.19e9 weights, 1.24e9 of them in the two vocabulary tables; the input table only looks up.
    step = flops.TRAINING * (flops.decoder(text, [1]).linear + flops.head(text, 1).linear)
    assert abs(step / (6 * (8.19e9 - 151_936 * 4096)) - 1) < 0.01
