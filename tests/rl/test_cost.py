"""The cost of a GSPO recipe: work and memory by hand and against passes of a small model, and the command."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from keye.errors import KeyeError, RecipeError
from keye.model.keye import KeyeForConditionalGeneration
from keye.processor.processor import Sample
from rl.commands.cost import main
from rl.cost import report
from rl.cost.estimate import Assumptions, estimate
from rl.cost.memory import Loading, StepMemory, micro_batch_of, step_memory
from rl.cost.settings import Settings, lora_parameters
from rl.cost.work import Lengths, lengths_of, operations, pieces
from rl.policy.microbatch import split
from rl.policy.scoring import Group, score
from rl.recipe import load
from stages.cost.estimate import parameters_of
from stages.cost.gpus import Gpu, gpu_named
from stages.recipe import load as load_pretrain

ROOT = Path(__file__).resolve().parents[2]
GPU = Gpu("test", 140e9, 1e15, 4e12, 2.0)


def group(prompt: int, answers: list[int], frames: int = 0) -> Group:
    """A group of random tokens; the prompt begins with `frames` frames of 8 × 8 patches."""
    draw = torch.Generator().manual_seed(prompt)
    ids = torch.randint(30, 200, (prompt,), generator=draw)
    ids[: 16 * frames] = 6  # the fixture's video token, see `model`
    pixels = {
        "pixel_values_videos": torch.randn(64 * frames, 3, 14, 14),
        "video_grid_thw": torch.tensor([[1, 8, 8]] * frames),
    }
    sample = Sample(ids, ids, torch.arange(prompt).expand(3, -1), **(pixels if frames else {}))
    rows = [torch.randint(30, 200, (length,), generator=draw) for length in answers]
    return Group(sample, rows, [torch.zeros(len(row)) for row in rows], [True] * len(rows), [""] * len(rows))


def lengths(prompt: int, answer: int, frames: int = 0) -> Lengths:
    return Lengths(prompt, prompt, answer, answer, 16 * frames / prompt, 64.0, 64 if frames else 0)


@pytest.fixture
def plain(model: KeyeForConditionalGeneration) -> KeyeForConditionalGeneration:
    model.config.video_token_id = 6
    return model.train()


def test_a_step_counts_the_operations_of_its_passes(plain):
    """Torch counts a row of as many tokens, with logits of the answers; in so few tokens attention hardly counts."""
    settings, sizes = Settings(prompts=1, mini_batches=1, group_size=4), lengths(40, 6, frames=1)
    one = group(40, [6] * 4, frames=1)
    ids = torch.cat([one.sample.input_ids, *one.completions])[None]
    inputs = {"pixel_values_videos": one.sample.pixel_values_videos, "video_grid_thw": one.sample.video_grid_thw}

    def counted(backward: bool) -> int:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
            positions = torch.arange(ids.shape[1]).expand(3, 1, -1)
            logits = plain(input_ids=ids, position_ids=positions, logits_to_keep=24, **inputs).logits
            if backward:
                logits.sum().backward()
        return counter.get_total_flops()

    expected = operations(plain.config, settings, sizes)
    assert expected.score == pytest.approx(counted(False), rel=0.05)
    assert expected.update == pytest.approx(counted(True), rel=0.05)
    plain.visual.requires_grad_(False)
    frozen = operations(plain.config, replace(settings, freeze=("visual",)), sizes)
    assert frozen.update == pytest.approx(counted(True), rel=0.05) and frozen.update < expected.update


def test_a_prompt_is_read_once_for_its_group_in_every_part_of_a_step(plain):
    one, eight = (
        operations(plain.config, Settings(prompts=1, mini_batches=1, group_size=size), lengths(1000, 10))
        for size in (1, 8)
    )
    assert one.prefill == eight.prefill
    assert eight.decode == pytest.approx(8 * one.decode)
    assert eight.score < 1.2 * one.score  # 1,080 tokens instead of 1,010


def test_a_group_that_does_not_fit_reads_its_prompt_in_each_of_its_micro_batches(plain):
    sizes = lengths(100, 20)
    settings = Settings(prompts=1, mini_batches=1, group_size=8, micro_batch_tokens=150)
    made = split([group(100, [20] * 8)], torch.ones(1, 8), 150)
    assert pieces(settings, sizes) == len(made) == 4
    whole = operations(plain.config, replace(settings, micro_batch_tokens=0), sizes)
    read = operations(plain.config, settings, sizes)
    assert read.prefill == whole.prefill and read.score > whole.score and read.update > whole.update


@pytest.mark.parametrize("budget", [0, 1, 90, 130, 180, 300, 500])
def test_the_largest_micro_batch_is_that_of_the_update(budget):
    prompt, answer, size, prompts = 60, 15, 4, 6
    settings = Settings(
        prompts=prompts, mini_batches=1, group_size=size, micro_batch_tokens=budget, max_new_tokens=answer
    )
    made = split([group(prompt, [answer] * size) for _ in range(prompts)], torch.ones(prompts, size), budget)
    expected = micro_batch_of(settings, lengths(prompt, answer), 1)
    largest = max(made, key=lambda part: part.tokens)
    assert expected.tokens == largest.tokens
    assert expected.labels == sum(len(c) for g in largest.groups for c in g.completions)


def test_activations_are_those_that_autograd_keeps(plain):
    counts = parameters_of(plain.config)
    settings = Settings(prompts=2, mini_batches=1, group_size=4, max_new_tokens=24, precision="fp32")
    made = step_memory(plain.config, settings, lengths(160, 24, frames=4), 1, counts, Loading(fused=False))
    groups = [group(160, [24] * 4, frames=4), group(160, [24] * 4, frames=4)]
    passed = {p.untyped_storage().data_ptr() for p in plain.parameters()}
    held: dict[int, torch.Tensor] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in passed:
            held[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        score(plain, groups)
    kept = sum(x.untyped_storage().nbytes() for x in held.values())
    assert made.update.activations + made.update.pixels == pytest.approx(kept, rel=0.1)


def test_keys_and_values_of_a_prompt_are_counted_once_for_its_group():
    """By hand, at 8B: 2 × 36 layers × 8 heads × 128 × 2 bytes = 147,456 bytes for each token."""
    pretrain = load_pretrain(ROOT / "stages/recipes/keye_8b.toml")
    config = estimate_config(pretrain)
    settings = Settings(
        prompts=1, mini_batches=1, group_size=8, max_new_tokens=200, cache_bytes=80 << 30, precision="bf16"
    )
    sizes = Lengths(8000, 8000, 200, 200, 0.0, 64.0, 0)
    made = step_memory(config, settings, sizes, 1, parameters_of(config))
    assert made.rollout.cache == 147_456 * (8000 + 8 * 200)
    small = step_memory(config, replace(settings, cache_bytes=147_456 * 8500), sizes, 1, parameters_of(config))
    assert small.rollout.rows == 2 and small.rollout.cache <= 147_456 * 8500
    with pytest.raises(KeyeError, match="8192 MB|MB of keys and values"):
        step_memory(config, replace(settings, cache_bytes=147_456 * 8000), sizes, 1, parameters_of(config))


def estimate_config(pretrain):
    from stages.cost.estimate import config_of

    return config_of(pretrain)


def test_the_tower_keeps_nothing_for_the_backward_pass_if_it_is_frozen(plain):
    counts = parameters_of(plain.config)
    settings = Settings(prompts=1, mini_batches=1, group_size=2, max_new_tokens=8, precision="fp32")
    sizes = lengths(160, 8, frames=8)
    trains, fixed = (
        step_memory(plain.config, replace(settings, freeze=freeze), sizes, 1, counts) for freeze in ((), ("visual",))
    )
    assert fixed.update.activations < 0.8 * trains.update.activations
    assert trains.update.optimizer - fixed.update.optimizer == 12 * counts["visual"]


def test_lora_has_a_pair_of_matrices_for_each_matrix_of_the_decoder(plain):
    linear = [m for m in plain.language_model.layers.modules() if isinstance(m, torch.nn.Linear)]
    assert lora_parameters(plain.config.text_config, 3) == 3 * sum(m.in_features + m.out_features for m in linear)


def test_options_of_memory_lower_their_components(plain):
    counts, sizes = parameters_of(plain.config), lengths(160, 24, frames=4)
    base = Settings(prompts=2, mini_batches=1, group_size=4, max_new_tokens=24, precision="bf16", zero=2)

    def memory(**changes: object) -> StepMemory:
        return step_memory(plain.config, replace(base, **changes), sizes, 2, counts)

    plain_memory = memory()
    assert memory(checkpointing=True).update.activations < 0.5 * plain_memory.update.activations
    offloaded = memory(checkpointing=True, offload=True)
    assert offloaded.update.activations < memory(checkpointing=True).update.activations
    moved = memory(offload_optimizer=True)
    assert moved.update.optimizer == 0 and moved.peak < plain_memory.peak
    lora = memory(lora_rank=4)
    assert lora.update.optimizer == 12 * lora_parameters(plain.config.text_config, 4) / 2
    sharded = memory(zero=3)  # a rollout has all weights
    assert sharded.update.weights + sharded.rollout.gathered == 2 * sum(counts.values())
    assert memory(kl=0.1).reference == 2 * sum(counts.values())


def test_ranks_that_share_a_row_divide_the_activations_and_the_pixels_of_the_update_alone(plain):
    counts, sizes = parameters_of(plain.config), lengths(160, 24, frames=4)
    alone = Settings(prompts=2, mini_batches=1, group_size=4, max_new_tokens=24, precision="bf16")
    shared = replace(alone, sequence_parallel=2)
    # One row of the two prompts of two ranks, half of it on each: as much as a row of one prompt on each.
    whole, half = (step_memory(plain.config, given, sizes, 2, counts) for given in (alone, shared))
    assert half.update.activations == pytest.approx(whole.update.activations, rel=0.05)
    assert half.update.pixels == whole.update.pixels and half.rollout == whole.rollout
    limited = replace(shared, micro_batch_tokens=160 + 4 * 24)
    part = step_memory(plain.config, limited, sizes, 2, counts)
    assert micro_batch_of(limited, sizes, 2).prompts == 1 and micro_batch_of(shared, sizes, 2).prompts == 2
    assert part.update.activations == pytest.approx(whole.update.activations / 2, rel=0.15)
    assert part.update.pixels == whole.update.pixels / 2


def test_a_prompt_that_fits_no_gpu_of_the_update_is_shared_before_prompts_are_left_out():
    pretrain = load_pretrain(ROOT / "stages/recipes/keye_8b.toml")
    longer = ["gspo.max_prompt_tokens=200_000", "gspo.micro_batch_tokens=220_000", "rollout.cache_mb=30_000"]
    file, assumed = ROOT / "rl/recipes/keye_8b.toml", Assumptions(prompt=100_000)
    made = estimate(load(file, longer), pretrain, gpu_named("h100"), 2, assumed)
    assert "gspo.sequence_parallel=2" in made.remedy and "max_prompt_tokens" not in made.remedy
    changes = [word for word in made.remedy.split() if word != "--set"]
    assert estimate(load(file, [*longer, *changes]), pretrain, gpu_named("h100"), 2, assumed).fits
    with pytest.raises(RecipeError, match=r"gspo.sequence_parallel = 3 needs a multiple of 3 processes"):
        estimate(load(ROOT / "rl/recipes/tiny.toml", ["gspo.sequence_parallel=3"]), pretrain, GPU, 2)


def test_time_and_money_follow_from_the_operations():
    recipe, pretrain = load(ROOT / "rl/recipes/tiny.toml"), load_pretrain(ROOT / "stages/recipes/tiny.toml")
    assumed = Assumptions(utilisation=0.5, bandwidth=0.5)
    cost = estimate(recipe, pretrain, GPU, 2, assumed)
    rate = 2 * 0.5e15
    assert cost.seconds.prefill == pytest.approx(cost.operations.prefill / rate)
    # A pass of decoding reads the weights in bf16: 64 prompts × 8 answers on 2 GPUs, 256 at a time, 6 tokens each.
    assert cost.seconds.decode >= 6 * 2 * cost.parameters / 2e12
    steps = 4 * 7 * 4 * cost.trained / 2 / 4e12
    assert cost.seconds.update == pytest.approx((cost.operations.update + cost.operations.again) / rate + steps)
    assert cost.days == pytest.approx(cost.seconds.total * 45 / 86_400)
    assert cost.dollars == pytest.approx(cost.days * 24 * 2 * 2.0)
    assert cost.tokens == 64 * (cost.lengths.prompt + 8 * 6)


def test_lengths_follow_from_the_budgets_and_from_what_is_known():
    pretrain = load_pretrain(ROOT / "stages/recipes/keye_8b.toml")
    settings = Settings(max_new_tokens=100)
    assumed = lengths_of(settings, pretrain)
    assert 75_000 < assumed.longest_prompt < 80_000 and assumed.prompt == pytest.approx(
        assumed.longest_prompt / 2, rel=0.02
    )
    assert (assumed.answer, assumed.longest_answer) == (50, 100)
    limited = lengths_of(replace(settings, max_prompt_tokens=8192), pretrain)
    assert limited.longest_prompt == limited.prompt == 8192
    known = lengths_of(settings, pretrain, prompt=900, answer=20)
    assert (known.prompt, known.answer, known.longest_answer) == (900, 20, 100)


def test_more_processes_than_prompts_of_a_mini_batch_are_an_error():
    recipe, pretrain = load(ROOT / "rl/recipes/tiny.toml"), load_pretrain(ROOT / "stages/recipes/tiny.toml")
    with pytest.raises(RecipeError, match="gspo.prompts = 64"):
        estimate(recipe, pretrain, GPU, 32)


def test_the_sum_of_the_components_is_the_peak_and_the_largest_is_named():
    recipe, pretrain = load(ROOT / "rl/recipes/tiny.toml"), load_pretrain(ROOT / "stages/recipes/tiny.toml")
    cost = estimate(recipe, pretrain, GPU, 2)
    assert sum(cost.memory.parts.values()) == pytest.approx(cost.memory.peak)
    assert cost.memory.parts[cost.largest] == max(cost.memory.parts.values())
    assert cost.largest in report.advice(cost) and cost.lowers.startswith(("gspo.", "rollout."))
    assert cost.memory.peak == max(cost.memory.moments.values())


def test_the_8b_recipe_fits_eight_gpus_of_140_gb():
    recipe, pretrain = load(ROOT / "rl/recipes/keye_8b.toml"), load_pretrain(ROOT / "stages/recipes/keye_8b.toml")
    cost = estimate(recipe, pretrain, gpu_named("h200"), 8)
    assert cost.lengths.longest_prompt == 32_768 and cost.lengths.longest_answer == 8192
    assert cost.fits and cost.memory.peak < 140e9 and cost.remedy == ""


def test_a_recipe_that_does_not_fit_gets_changes_that_make_it_fit():
    file, pretrain = ROOT / "rl/recipes/keye_8b.toml", load_pretrain(ROOT / "stages/recipes/keye_8b.toml")
    plain = ["gspo.checkpointing=false", "gspo.micro_batch_tokens=0"]
    made = estimate(load(file, plain), pretrain, gpu_named("h200"), 8)
    assert not made.fits and "--set gspo.checkpointing=true" in made.remedy
    changes = [word for word in made.remedy.split() if word != "--set"]
    assert estimate(load(file, [*plain, *changes]), pretrain, gpu_named("h200"), 8).fits
    hopeless = estimate(load(file), pretrain, replace(GPU, memory=1e9), 8)
    assert "no setting" in hopeless.remedy


def test_the_command_prints_tables_and_json_and_refuses_impossible_options(tmp_path, monkeypatch, capsys):
    def command(*options: object) -> str:
        monkeypatch.setattr(sys, "argv", ["keye cost", *map(str, options)])
        main()
        return capsys.readouterr().out

    tiny = ROOT / "rl/recipes/tiny.toml"
    made = json.loads(command(tiny, "--gpus", 2, "--gpu", "4090", "--json", "--prompt-tokens", 300))
    assert made["lengths"]["prompt"] == 300 and made["gpu"]["name"] == "4090"
    assert made["memory"]["peak"] == sum(made["memory"]["parts"].values())
    table = command(tiny, "--gpus", 2)
    assert "while answers are decoded" in table and "What lowers it" in table
    assert "annealing" in command(ROOT / "stages/recipes/tiny.toml", "--gpus", 2)  # a pre-training recipe as before
    other = tmp_path / "mine.toml"
    other.write_text(tiny.read_text())
    with pytest.raises(KeyeError, match="--pretrain"):
        command(other)
    with pytest.raises(KeyeError, match="--answer-tokens 0"):
        command(other, "--pretrain", ROOT / "stages/recipes/tiny.toml", "--answer-tokens", 0)
    other.write_text("[sft]\nsteps = 1\n")
    with pytest.raises(KeyeError, match=r"no table \[gspo\]"):
        command(other)


def test_served_rollouts_take_no_memory_and_time_of_the_training(capsys, monkeypatch):
    recipe, pretrain = load(ROOT / "rl/recipes/keye_8b.toml"), load_pretrain(ROOT / "stages/recipes/keye_8b.toml")
    served = load(ROOT / "rl/recipes/keye_8b.toml", ["rollout.engine=served", "rollout.cache_mb=1"])
    ours, theirs = (estimate(one, pretrain, GPU, 8) for one in (recipe, served))
    assert theirs.seconds.prefill == theirs.seconds.decode == 0 < ours.seconds.decode
    assert theirs.seconds.update == ours.seconds.update and theirs.operations.score == ours.operations.score
    moments = {name for name in ours.memory.moments if name not in theirs.memory.moments}
    assert moments == {"while prompts are read", "while answers are decoded"}
    assert all(theirs.memory.moments[name] == ours.memory.moments[name] for name in theirs.memory.moments)
    path = str(ROOT / "rl/recipes/keye_8b.toml")
    monkeypatch.setattr(
        sys, "argv", ["keye cost", path, "--gpus", "8", "--gpu", "h200", "--set", "rollout.engine=served"]
    )
    main()
    shown = capsys.readouterr().out
    assert "while answers are decoded" not in shown and "sampled by other servers" in " ".join(shown.split())
