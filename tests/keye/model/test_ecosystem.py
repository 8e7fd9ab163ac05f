"""The model with other tools: adapters, Trainer, torch.compile, checkpointing, tied weights, dtypes, device maps."""

import copy
from pathlib import Path

import peft
import pytest
import torch
import torch._dynamo
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, Trainer, TrainingArguments

from keye import KeyeConfig, KeyeForConditionalGeneration
from scripts.bench.common.streams import (
    IMAGE,
    VIDEO,
    family_config,
    family_model,
    frames,
    labels,
    packed,
    padded,
    stream,
)

CLIP = stream(frames((2, 2), (1, 1)), 1)
MIXED = stream([(VIDEO, 2, 2), (IMAGE, 1, 3), (VIDEO, 1, 1)], 2)


@pytest.fixture
def model() -> KeyeForConditionalGeneration:
    return family_model()


def logits(model: torch.nn.Module, inputs: dict[str, Tensor] = MIXED) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def loss_of(model: torch.nn.Module, inputs: dict[str, Tensor] = MIXED) -> Tensor:
    return model(**inputs, labels=labels(inputs["input_ids"])).loss


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    loss_of(model).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_lora_trains_saves_loads_and_merges(model: KeyeForConditionalGeneration, tmp_path: Path) -> None:
    base = copy.deepcopy(model)
    adapter = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "fc1"], task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(model, adapter)
    trained = [n for n, p in tuned.named_parameters() if p.requires_grad]
    assert any("visual" in n for n in trained) and any("language_model" in n for n in trained)
    optimizer = torch.optim.AdamW((p for p in tuned.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    tuned.train()
    for _ in range(3):
        loss = loss_of(tuned)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    tuned.eval()
    expected = logits(tuned)
    assert not torch.allclose(expected, logits(base), atol=1e-3)
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    words = tuned.generate(**MIXED, **options)
    tuned.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(logits(again), expected, atol=1e-6, rtol=1e-6)
    merged = again.merge_and_unload()
    assert isinstance(merged, KeyeForConditionalGeneration)
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-5)
    assert merged.generate(**MIXED, **options).tolist() == words.tolist()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_gradients_equal_the_plain_ones(model: KeyeForConditionalGeneration, reentrant: bool) -> None:
    model.train()
    plain = gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert model.visual.gradient_checkpointing and model.is_gradient_checkpointing
    if reentrant:  # that kind of checkpoint drops a layer none of whose inputs waits for a gradient
        model.enable_input_require_grads()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, plain[name], atol=1e-7, rtol=1e-5, msg=name)


def test_checkpointed_pack_equals_the_plain_one(model: KeyeForConditionalGeneration) -> None:
    batch = packed([CLIP, MIXED])
    model.train()
    plain = model(**batch).loss
    model.gradient_checkpointing_enable()
    again = model(**batch).loss
    again.backward()
    torch.testing.assert_close(again, plain)


@pytest.mark.slow
def test_decoder_layer_compiles_without_a_graph_break() -> None:
    """One graph for any number and size of packed documents; the derivatives are the plain ones."""
    model = family_model(num_hidden_layers=1)
    compiled = copy.deepcopy(model)
    torch._dynamo.reset()
    # "aot_eager" makes the graphs and their derivatives, and compiles no C++.
    compiled.language_model.layers[0].compile(fullgraph=True, backend="aot_eager", dynamic=True)
    counted = torch._dynamo.utils.counters["stats"]  # since the process began: other tests compile, too
    before, graphs = counted["unique_graphs"], []
    for streams in ([CLIP, MIXED], [MIXED, CLIP, stream([], 4)], [CLIP, CLIP, MIXED, CLIP]):
        batch = packed(streams)
        plain, fused = (m(**batch).loss for m in (model, compiled))
        torch.testing.assert_close(fused, plain, atol=1e-6, rtol=1e-5)
        plain.backward()
        fused.backward()
        graphs.append(counted["unique_graphs"] - before)
    assert graphs == [1, 1, 1]
    ours = dict(compiled.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name].grad, parameter.grad, atol=1e-6, rtol=1e-4, msg=name)


def test_padded_and_cached_steps_compile_without_a_graph_break() -> None:
    model = family_model(num_hidden_layers=1)
    batch = padded([CLIP, MIXED], "left")
    expected = model.generate(**batch, max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None)
    torch._dynamo.reset()
    model.language_model.layers[0].compile(fullgraph=True, backend="eager", dynamic=True)
    found = model.generate(**batch, max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("tie", [True, False])
def test_tied_weights_stay_tied(tie: bool, tmp_path: Path) -> None:
    model = family_model(tie_word_embeddings=tie)
    assert model.config.tie_word_embeddings is tie
    model.resize_token_embeddings(310)
    model.save_pretrained(tmp_path)
    again = KeyeForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert again.config.text_config.vocab_size == 310 and again.lm_head.out_features == 310
    for one in (model, again):
        one.tie_weights()
        assert (one.lm_head.weight is one.get_input_embeddings().weight) is tie
    assert torch.equal(logits(again), logits(model)) and logits(model).shape[-1] == 310


def test_config_round_trip_through_the_auto_classes(tmp_path: Path) -> None:
    config = family_config("llama3", tie_word_embeddings=True)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, KeyeConfig) and again.to_dict() | {"_name_or_path": ""} == config.to_dict()
    assert again.text_config.model_type == "llama" and again.tie_word_embeddings is True
    model = AutoModelForImageTextToText.from_config(again)
    assert isinstance(model, KeyeForConditionalGeneration)
    assert model.language_model.rotary_emb.frequencies[-1] < 500_000.0 ** (-14 / 16) / 4  # llama3's scaling is there
    shown = KeyeConfig.preset("tiny", tie_word_embeddings=False)
    assert KeyeConfig(**shown.to_dict()).to_dict() == shown.to_dict()


@pytest.mark.parametrize("device_map", [None, "auto", {"": "cpu"}])
def test_bfloat16_directory_keeps_its_rotary_in_fp32(device_map: object, tmp_path: Path) -> None:
    model = family_model("llama3").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    options = {} if device_map is None else {"device_map": device_map}
    again = KeyeForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16, **options).eval()
    assert again.dtype == torch.bfloat16 and again.lm_head.weight.dtype == torch.bfloat16
    frequencies = family_model("llama3").language_model.rotary_emb.frequencies
    for one in (again, again.to(torch.float16).to(torch.bfloat16)):
        assert one.language_model.rotary_emb.frequencies.dtype == torch.float32
        assert torch.equal(one.language_model.rotary_emb.frequencies, frequencies)
    assert torch.equal(logits(again), logits(model))


def test_layers_kept_on_the_disk_are_read_when_needed(model: KeyeForConditionalGeneration, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")
    parts = ("visual", "projector", "language_model.embed_tokens", "language_model.norm", "language_model.rotary_emb",
             "language_model.layers.0")  # fmt: skip
    device_map = {f"model.{part}": "cpu" for part in parts} | {"lm_head": "cpu"}
    device_map |= {"model.language_model.layers.1": "disk"}
    again = KeyeForConditionalGeneration.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    ).eval()
    assert again.language_model.layers[1].mlp.up_proj.weight.is_meta
    torch.testing.assert_close(logits(again), logits(model), atol=1e-6, rtol=1e-6)


def test_no_module_is_split_that_adds_to_its_input(model: KeyeForConditionalGeneration) -> None:
    assert set(model._no_split_modules) == {"VisionLayer", "Qwen3DecoderLayer"}
    assert set(family_model("llama")._no_split_modules) == {"VisionLayer", "LlamaDecoderLayer"}


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_attention_can_be_chosen(model: KeyeForConditionalGeneration, name: str, tmp_path: Path) -> None:
    assert model.config.text_config._attn_implementation == "keye"
    expected = logits(model)
    model.save_pretrained(tmp_path)
    chosen = KeyeForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=name).eval()
    model.set_attn_implementation(name)
    for one in (model, chosen):
        assert one.language_model.config._attn_implementation == name
        torch.testing.assert_close(logits(one), expected, atol=1e-5, rtol=1e-5)
    with_weights = model(**MIXED, output_attentions=True)
    assert (with_weights.attentions is not None) and (name == "sdpa" or with_weights.attentions[0].shape[1] == 4)
    model.set_attn_implementation({"text_config": "keye"})
    assert torch.equal(logits(model), expected)


def test_bfloat16_is_near_fp32(model: KeyeForConditionalGeneration) -> None:
    expected = logits(model)
    found = logits(copy.deepcopy(model).to(torch.bfloat16)).float()
    error = (found - expected).norm() / expected.norm()
    assert error < 0.03  # 2 ** -8 a rounding, of some dozens in a row


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_large_activations_stay_finite(model: KeyeForConditionalGeneration, dtype: torch.dtype) -> None:
    """Embeddings, patches and residuals a thousand times larger than normal."""
    model = model.to(dtype)
    with torch.no_grad():
        model.get_input_embeddings().weight *= 1e3
        model.visual.embeddings.patch_embedding.weight *= 1e3
        model.projector.linear_1.weight *= 30
    loss = loss_of(model)
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_no_label_is_a_loss_of_zero_that_reaches_everything(
    model: KeyeForConditionalGeneration, dtype: torch.dtype
) -> None:
    model = model.to(dtype)
    loss = model(**MIXED, labels=torch.full_like(MIXED["input_ids"], -100)).loss
    loss.backward()
    assert loss.item() == 0 and all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_loss_counts_the_items_of_the_complete_batch(model: KeyeForConditionalGeneration) -> None:
    """As in the Trainer: each part's sum divided by the number of labels of all parts, a tensor."""
    whole = padded([CLIP, MIXED], "right")
    marked = labels(whole["input_ids"]).masked_fill(whole["attention_mask"] == 0, -100)
    expected = model(**whole, labels=marked).loss
    count = (marked[:, 1:] != -100).sum()
    parts = [model(**s, labels=labels(s["input_ids"]), num_items_in_batch=count).loss for s in (CLIP, MIXED)]
    torch.testing.assert_close(sum(parts), expected, atol=1e-6, rtol=1e-5)


class Streams(torch.utils.data.Dataset):
    """Eight clips of noise."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return stream(frames((1, 1 + index % 2)), index)


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    batch = padded(rows, "right")
    return {**batch, "labels": labels(batch["input_ids"]).masked_fill(batch["attention_mask"] == 0, -100)}


@pytest.mark.slow
def test_transformers_trainer_trains_it(model: KeyeForConditionalGeneration, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")

    def run(folder: str, batch: int, accumulation: int) -> tuple[Trainer, Tensor]:
        arguments = TrainingArguments(
            str(tmp_path / folder), max_steps=4, per_device_train_batch_size=batch, learning_rate=1e-2, logging_steps=1,
            gradient_accumulation_steps=accumulation, report_to=[], use_cpu=True, save_strategy="no",
            remove_unused_columns=False, lr_scheduler_type="constant", disable_tqdm=True, seed=1,
        )  # fmt: skip
        trainer = Trainer(copy.deepcopy(model), arguments, data_collator=collate, train_dataset=Streams())
        trainer.train()
        return trainer, trainer.model.lm_head.weight.detach()

    trainer, together = run("together", 4, 1)
    _, accumulated = run("accumulated", 2, 2)
    torch.testing.assert_close(accumulated, together, atol=1e-4, rtol=1e-3)  # the same batch, in two parts
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == 4 and sum(losses[2:]) < sum(losses[:2])  # the second time through the same clips
    trainer.save_model(str(tmp_path / "saved"))
    again = KeyeForConditionalGeneration.from_pretrained(tmp_path / "saved").eval()
    torch.testing.assert_close(logits(again), logits(trainer.model.eval()))


def test_transformers_trainer_evaluates_and_loads_the_best_model(
    model: KeyeForConditionalGeneration, tmp_path: Path
) -> None:
    pytest.importorskip("accelerate")
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, per_device_eval_batch_size=8, report_to=[],
        use_cpu=True, remove_unused_columns=False, disable_tqdm=True, eval_strategy="steps", eval_steps=1,
        save_steps=1, load_best_model_at_end=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, data_collator=collate, train_dataset=Streams(), eval_dataset=Streams())
    assert trainer.label_names == ["labels"]
    with torch.no_grad():
        expected = model.eval()(**collate([Streams()[index] for index in range(8)])).loss
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
    trainer.train()
    losses = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    assert trainer.state.best_metric == min(losses[-2:]) == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-5)
