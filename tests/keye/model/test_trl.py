"""TRL's trainers with Keye's model and processor, as TRL's own documentation calls them."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

trl = pytest.importorskip("trl", reason="TRL is not installed: pip install '.[trl]'")
from datasets import Dataset  # noqa: E402
from peft import LoraConfig  # noqa: E402

from keye import KeyeConfig, KeyeForConditionalGeneration, KeyeProcessor  # noqa: E402
from keye.processor.tokenizer import train_tokenizer  # noqa: E402

pytestmark = pytest.mark.slow
ROWS = 4
SIZE = 56  # pixels of the smallest still


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and its processor as a directory: TRL reads a reference model from where the model came from."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(["what is seen red ball blue system user assistant yes no"] * 5, 600)
    processor = KeyeProcessor(tokenizer, image={"min_tokens": 4, "max_tokens": 16})
    torch.manual_seed(0)
    config = processor.configure(KeyeConfig.preset("tiny", vocab_size=640))
    KeyeForConditionalGeneration(config).save_pretrained(path)
    processor.save_pretrained(path)
    return path


def rows(kind: str, images: bool) -> Dataset:
    """Rows of different lengths and image sizes in one of TRL's formats."""
    random = np.random.default_rng(0)
    return Dataset.from_list([_row(kind, images, i, random) for i in range(ROWS)])


def _row(kind: str, images: bool, index: int, random: np.random.Generator) -> dict[str, Any]:
    longer = index % 2
    question = {"role": "user", "content": "what is seen" + " red" * longer}
    answer = {"role": "assistant", "content": "red ball" * (1 + longer)}
    row = {
        "conversation": {"messages": [question, answer]},
        "completion": {"prompt": [question], "completion": [answer]},
        "preference": {
            "prompt": [question],
            "chosen": [answer],
            "rejected": [{"role": "assistant", "content": "blue" * (1 + longer)}],
        },
        "prompt": {"prompt": [question]},
    }[kind]
    if images:
        pixels = random.integers(0, 255, (SIZE, SIZE + 28 * longer, 3), dtype=np.uint8)
        row = {"images": [Image.fromarray(pixels)], **row}
    return row


def arguments(kind: type, out: Path, **options: Any) -> Any:
    return kind(
        output_dir=str(out),
        **{
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "report_to": [],
            "use_cpu": True,
            "bf16": False,
            "save_strategy": "no",
            "logging_steps": 1,
            "disable_tqdm": True,
            "learning_rate": 1e-3,
        }
        | options,
    )


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def train(trainer: Any) -> list[float]:
    """Losses of the two steps; they must be finite, and some weight must have moved."""
    before = weights(trainer.model)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses)
    after = weights(trainer.model)
    assert all(p.isfinite().all() for p in after.values())
    assert any(not torch.equal(p, after[name]) for name, p in before.items())
    return losses


LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
WHOLE = {"max_length": None}  # TRL does not cut rows with pictures
SFT = {
    "pictures": ("conversation", True, WHOLE),
    "pictures, max_length": ("conversation", True, {"max_length": 512}),
    "pictures, answers alone": ("conversation", True, {**WHOLE, "assistant_only_loss": True}),
    "pictures, prompt and completion": ("completion", True, WHOLE),
    "pictures, whole sequence": ("completion", True, {**WHOLE, "completion_only_loss": False}),
    "pictures, checkpointed": ("conversation", True, {**WHOLE, "gradient_checkpointing": True}),
    "pictures, multiple of 8": ("conversation", True, {**WHOLE, "pad_to_multiple_of": 8}),
    "text": ("conversation", False, {}),
    "text, answers alone": ("conversation", False, {"assistant_only_loss": True}),
    "text, prompt and completion": ("completion", False, {}),
    "text, packed": ("conversation", False, {"packing": True, "max_length": 64}),
}


def load(folder: Path) -> KeyeForConditionalGeneration:
    return KeyeForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("case", SFT)
def test_sft(case: str, folder: Path, tmp_path: Path) -> None:
    kind, images, options = SFT[case]
    train(_sft(load(folder), folder, rows(kind, images), tmp_path, **options))


def test_sft_of_a_directory(folder: Path, tmp_path: Path) -> None:
    train(_sft(str(folder), folder, rows("conversation", True), tmp_path, **WHOLE))


def test_sft_with_lora(folder: Path, tmp_path: Path) -> None:
    train(_sft(load(folder), folder, rows("conversation", True), tmp_path, peft_config=LORA, **WHOLE))


def test_first_sft_loss_is_the_models_own_on_the_same_rows(folder: Path, tmp_path: Path) -> None:
    """Without shuffling TRL's first batch is rows 0 and 1; each row alone, weighted by its tokens, gives its loss."""
    data = rows("completion", True)
    options = {**WHOLE, "max_steps": 2, "train_sampling_strategy": "sequential"}
    losses = train(_sft(load(folder), folder, data, tmp_path, **options))
    model, processor = load(folder).train(), KeyeProcessor.from_pretrained(folder)
    total, count = 0.0, 0
    for row in data.select(range(2)):
        question = [{"type": "image", "image": row["images"][0]}, {"type": "text", "text": row["prompt"][0]["content"]}]
        chat = [{"role": "user", "content": question}, row["completion"][0]]
        options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        prompt = processor.apply_chat_template(chat[:1], add_generation_prompt=True, **options)
        whole = processor.apply_chat_template(chat, **options)
        with torch.no_grad():
            logits = model(**whole).logits[0].float()
        start = prompt["input_ids"].shape[1]
        targets = whole["input_ids"][0, start:]
        total -= logits[start - 1 : -1].log_softmax(-1).gather(1, targets[:, None]).sum().item()
        count += len(targets)
    assert losses[0] == pytest.approx(total / count, abs=2e-4)


def _sft(model: Any, folder: Path, data: Dataset, out: Path, peft_config: Any = None, **options: Any) -> Any:
    return trl.SFTTrainer(
        model,
        args=arguments(trl.SFTConfig, out, **options),
        train_dataset=data,
        processing_class=KeyeProcessor.from_pretrained(folder),
        peft_config=peft_config,
    )


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("images", [True, False])
def test_dpo(images: bool, lora: bool, folder: Path, tmp_path: Path) -> None:
    losses = train(
        trl.DPOTrainer(
            str(folder),
            args=arguments(trl.DPOConfig, tmp_path, **WHOLE),
            train_dataset=rows("preference", images),
            processing_class=KeyeProcessor.from_pretrained(folder),
            peft_config=LORA if lora else None,
        )
    )
    # Before the first step policy and reference are one model: the loss is -log sigmoid(0).
    assert losses[0] == pytest.approx(math.log(2), abs=2e-4)


def length_reward(completions: list[Any], **_: Any) -> list[float]:
    return [float(len(str(completion)) % 5) for completion in completions]


@pytest.mark.parametrize(
    ("images", "lora", "beta"), [(True, False, 0.0), (False, False, 0.0), (True, True, 0.0), (True, False, 0.1)]
)
def test_grpo(images: bool, lora: bool, beta: float, folder: Path, tmp_path: Path) -> None:
    options = {"num_generations": 2, "max_completion_length": 6, "beta": beta}
    train(
        trl.GRPOTrainer(
            str(folder),
            reward_funcs=length_reward,
            args=arguments(trl.GRPOConfig, tmp_path, **options),
            train_dataset=rows("prompt", images),
            processing_class=KeyeProcessor.from_pretrained(folder),
            peft_config=LORA if lora else None,
        )
    )


def test_examples_of_the_guide_run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guide = (Path(__file__).parents[3] / "docs" / "model.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python trl\n(.*?)^```", guide, re.MULTILINE | re.DOTALL)
    assert blocks
    (tmp_path / "model").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        exec(compile(block, "docs/model.md", "exec"), {"__name__": "__main__"})
